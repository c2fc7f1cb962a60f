/* What a process holds of a GPU's memory, by NVML, which is loaded at run time where it is there. */
#ifndef KVC_CUDA_NVML_H
#define KVC_CUDA_NVML_H

#include "error.h"

/* The name that every driver installs NVML under. */
#define KVC_NVML_LIBRARY "libnvidia-ml.so.1"

typedef struct kvc_nvml kvc_nvml; /* the library, loaded and initialised once */
typedef struct kvc_nvml_device {
  const kvc_nvml *nvml; /* NULL: it could not be had */
  void *handle;
} kvc_nvml_device;

/* Finds a device by its UUID, as kvc_device.id has it. E_UNSUPPORTED, E_DEVICE. */
int kvc_nvml_open(const char *id, kvc_nvml_device *out);

/* Bytes of the device that are in use, by all; and by this process alone. E_UNSUPPORTED: NVML does not know
   this process, as in a container with pids of its own; E_DEVICE; E_NOMEM. */
int kvc_nvml_used(const kvc_nvml_device *device, uint64_t *bytes);
int kvc_nvml_used_here(const kvc_nvml_device *device, uint64_t *bytes);

#endif
