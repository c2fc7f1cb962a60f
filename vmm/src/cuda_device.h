/* An open CUDA device: its finding, its description, its context and its streams. */
#ifndef KVC_CUDA_DEVICE_H
#define KVC_CUDA_DEVICE_H

#include "backend.h"
#include "cuda_driver.h"
#include "cuda_nvml.h"

#include <stdatomic.h>

typedef struct kvc_cuda_device {
  kvc_device base; /* first: the table hands these about */
  const kvc_cuda_driver *driver;
  cu_device number;
  cu_context context; /* the primary one, which the CUDA runtime uses too */
  cu_stream lane[KVC_LANES];
  cu_allocation_prop prop; /* of the memory made here */
  cu_access_desc access;
  kvc_nvml_device nvml;
  uint64_t made; /* bytes that the device had less after its context was made: that context, or nothing */
} kvc_cuda_device;

/* Bytes of the handles that this process has of a device, whatever opened it, and how often that changed. */
typedef struct kvc_cuda_handles {
  _Atomic uint64_t bytes, changes;
} kvc_cuda_handles;
kvc_cuda_handles *kvc_cuda_handles_of(const kvc_cuda_device *d);

int kvc_cuda_open(const kvc_device_options *options, kvc_device **out);
void kvc_cuda_close(kvc_device *device);

/* Around calls that work in the current context: makes the device's current if it is not, and the caller's
   again after. `pushed` carries between the two what was done. */
int kvc_cuda_enter(kvc_cuda_device *d, int *pushed);
void kvc_cuda_leave(kvc_cuda_device *d, int pushed);

#endif
