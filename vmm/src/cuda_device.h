/* An open CUDA device: its finding, its description, its context and its streams. */
#ifndef KVC_CUDA_DEVICE_H
#define KVC_CUDA_DEVICE_H

#include "backend.h"
#include "cuda_driver.h"

typedef struct kvc_cuda_device {
  kvc_device base; /* first: the table hands these about */
  const kvc_cuda_driver *driver;
  cu_device number;
  cu_context context; /* the primary one, which the CUDA runtime uses too */
  cu_stream lane[KVC_LANES];
  cu_allocation_prop prop; /* of the memory made here */
  cu_access_desc access;
} kvc_cuda_device;

int kvc_cuda_open(const kvc_device_options *options, kvc_device **out);
void kvc_cuda_close(kvc_device *device);

/* Around calls that work in the current context: makes the device's current if it is not, and the caller's
   again after. `pushed` carries between the two what was done. */
int kvc_cuda_enter(kvc_cuda_device *d, int *pushed);
void kvc_cuda_leave(kvc_cuda_device *d, int pushed);

#endif
