/*
 * The part of the CUDA driver's interface that the library uses: our own declarations of its types, numbers
 * and entry points, so that nothing of CUDA is needed to build. They are those of CUDA 11.0 to 13.
 */
#ifndef KVC_CUDA_DRIVER_H
#define KVC_CUDA_DRIVER_H

#include "error.h"

/* Where the driver library is looked for: by name, in the system's way. */
#define KVC_CUDA_LIBRARY "libcuda.so.1"

typedef int cu_result; /* an enum there */
typedef int cu_device;
typedef struct cu_context_object *cu_context;
typedef struct cu_stream_object *cu_stream;
typedef unsigned long long cu_ptr;    /* CUdeviceptr (v2) */
typedef unsigned long long cu_handle; /* CUmemGenericAllocationHandle */

typedef struct cu_uuid {
  unsigned char bytes[16];
} cu_uuid;

typedef struct cu_location {
  int type;
  int id;
} cu_location;

typedef struct cu_allocation_prop {
  int type;
  int requested_handle_types;
  cu_location location;
  void *win32_handle_meta_data;
  struct {
    unsigned char compression_type;
    unsigned char gpu_direct_rdma_capable;
    unsigned short usage;
    unsigned char reserved[4];
  } flags;
} cu_allocation_prop;

typedef struct cu_access_desc {
  cu_location location;
  int flags;
} cu_access_desc;

enum {
  CU_OK = 0,
  CU_INVALID_VALUE = 1,
  CU_OUT_OF_MEMORY = 2,
  CU_NOT_INITIALIZED = 3,
  CU_STUB_LIBRARY = 34,
  CU_NO_DEVICE = 100,
  CU_INVALID_DEVICE = 101,
  CU_ECC_UNCORRECTABLE = 214,
  CU_ILLEGAL_ADDRESS = 700,
  CU_LAUNCH_FAILED = 719,
  CU_NOT_SUPPORTED = 801,
  CU_SYSTEM_DRIVER_MISMATCH = 803,
  CU_COMPAT_NOT_SUPPORTED_ON_DEVICE = 804
};

enum {
  CU_ATTRIBUTE_MAJOR = 75, /* compute capability */
  CU_ATTRIBUTE_MINOR = 76,
  CU_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT = 102,

  CU_ALLOCATION_TYPE_PINNED = 1,
  CU_LOCATION_TYPE_DEVICE = 1,
  CU_ACCESS_READWRITE = 3,
  CU_GRANULARITY_MINIMUM = 0,
  CU_STREAM_NON_BLOCKING = 1,
  CU_HOST_ALLOC_PORTABLE = 1 /* pinned for every context of the process */
};

/* Every entry point: XX(member, symbol, parameters). Where an interface grew, the symbol has a suffix and the
   plain name is an old one with narrower types. */
#define KVC_CUDA_ENTRIES(XX)                                                                             \
  XX(get_error_name, cuGetErrorName, (cu_result, const char **))                                         \
  XX(get_error_string, cuGetErrorString, (cu_result, const char **))                                     \
  XX(init, cuInit, (unsigned flags))                                                                     \
  XX(device_get_count, cuDeviceGetCount, (int *))                                                        \
  XX(device_get, cuDeviceGet, (cu_device *, int ordinal))                                                \
  XX(device_get_by_pci_bus_id, cuDeviceGetByPCIBusId, (cu_device *, const char *))                       \
  XX(device_get_name, cuDeviceGetName, (char *, int size, cu_device))                                    \
  XX(device_get_attribute, cuDeviceGetAttribute, (int *, int attribute, cu_device))                      \
  XX(primary_retain, cuDevicePrimaryCtxRetain, (cu_context *, cu_device))                                \
  XX(primary_release, cuDevicePrimaryCtxRelease_v2, (cu_device))                                         \
  XX(ctx_get_current, cuCtxGetCurrent, (cu_context *))                                                   \
  XX(ctx_push, cuCtxPushCurrent_v2, (cu_context))                                                        \
  XX(ctx_pop, cuCtxPopCurrent_v2, (cu_context *))                                                        \
  XX(ctx_synchronize, cuCtxSynchronize, (void))                                                          \
  XX(stream_create, cuStreamCreate, (cu_stream *, unsigned flags))                                       \
  XX(stream_destroy, cuStreamDestroy_v2, (cu_stream))                                                    \
  XX(stream_synchronize, cuStreamSynchronize, (cu_stream))                                               \
  XX(mem_get_info, cuMemGetInfo_v2, (size_t *, size_t *))                                                \
  XX(mem_granularity, cuMemGetAllocationGranularity, (size_t *, const cu_allocation_prop *, int kind))   \
  XX(address_reserve, cuMemAddressReserve, (cu_ptr *, size_t, size_t align, cu_ptr, unsigned long long)) \
  XX(address_free, cuMemAddressFree, (cu_ptr, size_t))                                                   \
  XX(mem_create, cuMemCreate, (cu_handle *, size_t, const cu_allocation_prop *, unsigned long long))     \
  XX(mem_release, cuMemRelease, (cu_handle))                                                             \
  XX(mem_map, cuMemMap, (cu_ptr, size_t, size_t off, cu_handle, unsigned long long flags))               \
  XX(mem_unmap, cuMemUnmap, (cu_ptr, size_t))                                                            \
  XX(mem_set_access, cuMemSetAccess, (cu_ptr, size_t, const cu_access_desc *, size_t count))             \
  XX(mem_host_alloc, cuMemHostAlloc, (void **, size_t, unsigned flags))                                  \
  XX(mem_free_host, cuMemFreeHost, (void *))                                                             \
  XX(memset_async, cuMemsetD8Async, (cu_ptr, unsigned char, size_t, cu_stream))                          \
  XX(copy_to_host, cuMemcpyDtoHAsync_v2, (void *, cu_ptr, size_t, cu_stream))                            \
  XX(copy_to_device, cuMemcpyHtoDAsync_v2, (cu_ptr, const void *, size_t, cu_stream))

typedef struct kvc_cuda_driver {
#define KVC_XX(member, symbol, parameters) cu_result(*member) parameters;
  KVC_CUDA_ENTRIES(KVC_XX)
#undef KVC_XX
  /* The newer one also knows MIG instances; where the driver lacks it this is the older one. */
  cu_result (*device_get_uuid)(cu_uuid *, cu_device);
} kvc_cuda_driver;

/* The driver library, loaded and initialised by the first call that can; it stays loaded. Any thread.
   E_UNSUPPORTED: it is not there, lacks entry points (all are named) or finds no device; E_NOMEM; E_DEVICE.
 */
int kvc_cuda_load(const kvc_cuda_driver **out);

/* The library's error for a driver's, with the detail "<what was tried>: <the driver's name for it> (number):
   <its sentence>" and what can be done. */
int kvc_cuda_fail(const kvc_cuda_driver *driver, cu_result result, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

#endif
