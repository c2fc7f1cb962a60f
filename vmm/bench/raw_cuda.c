/*
 * Raw calls of CUDA's driver: virtual memory management, copies from pinned memory, one stream. The
 * declarations are the driver's binary interface as its users see it; no header of CUDA is needed.
 */
#define _GNU_SOURCE
#include "raw.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t device_ptr; /* CUdeviceptr */

/* CUmemLocation, CUmemAllocationProp, CUmemAccessDesc */
typedef struct mem_location {
  int type; /* 1: a device */
  int id;
} mem_location;
typedef struct allocation_prop {
  int type; /* 1: pinned to its location */
  int handle_types;
  mem_location location;
  void *win32_meta;
  unsigned char flags[8];
} allocation_prop;
typedef struct access_desc {
  mem_location location;
  int flags; /* 3: read and write */
} access_desc;

/* The driver's functions: XX(member, exported name, parameters). */
#define DRIVER_FUNCTIONS(XX)                                                                       \
  XX(init, "cuInit", (unsigned flags))                                                             \
  XX(error_name, "cuGetErrorName", (int code, const char **name))                                  \
  XX(device_get, "cuDeviceGet", (int *device, int ordinal))                                        \
  XX(device_name, "cuDeviceGetName", (char *name, int size, int device))                           \
  XX(primary_retain, "cuDevicePrimaryCtxRetain", (void **context, int device))                     \
  XX(primary_release, "cuDevicePrimaryCtxRelease_v2", (int device))                                \
  XX(set_current, "cuCtxSetCurrent", (void *context))                                              \
  XX(stream_create, "cuStreamCreate", (void **stream, unsigned flags))                             \
  XX(stream_destroy, "cuStreamDestroy_v2", (void *stream))                                         \
  XX(stream_sync, "cuStreamSynchronize", (void *stream))                                           \
  XX(reserve, "cuMemAddressReserve",                                                               \
     (device_ptr * p, size_t size, size_t align, device_ptr hint, unsigned long long flags))       \
  XX(unreserve, "cuMemAddressFree", (device_ptr p, size_t size))                                   \
  XX(create, "cuMemCreate",                                                                        \
     (raw_handle * handle, size_t size, const allocation_prop *prop, unsigned long long flags))    \
  XX(release, "cuMemRelease", (raw_handle handle))                                                 \
  XX(map, "cuMemMap",                                                                              \
     (device_ptr p, size_t size, size_t offset, raw_handle handle, unsigned long long flags))      \
  XX(set_access, "cuMemSetAccess", (device_ptr p, size_t size, const access_desc *desc, size_t n)) \
  XX(unmap, "cuMemUnmap", (device_ptr p, size_t size))                                             \
  XX(set_bytes, "cuMemsetD8Async", (device_ptr p, unsigned char byte, size_t len, void *stream))   \
  XX(copy_in, "cuMemcpyHtoDAsync_v2", (device_ptr to, const void *from, size_t len, void *stream)) \
  XX(copy_out, "cuMemcpyDtoHAsync_v2", (void *to, device_ptr from, size_t len, void *stream))      \
  XX(host_alloc, "cuMemHostAlloc", (void **p, size_t size, unsigned flags))                        \
  XX(host_free, "cuMemFreeHost", (void *p))                                                        \
  XX(mem_info, "cuMemGetInfo_v2", (size_t * free_bytes, size_t * total_bytes))

typedef struct raw_gpu {
  raw_device base;
  void *library, *context, *stream;
  int device;
  allocation_prop prop;
  access_desc access;
#define XX(member, name, parameters) int(*member) parameters;
  DRIVER_FUNCTIONS(XX)
#undef XX
  int (*driver_version)(int *version); /* NULL where the library does not tell */
} raw_gpu;

static raw_gpu *gpu(raw_device *dev) { return (raw_gpu *)(void *)dev; }

static device_ptr address(const char *p) { return (device_ptr)(uintptr_t)p; }

static int check(const raw_gpu *g, int code, const char *call) {
  if (code == 0) return 0;
  const char *name = NULL;
  if (!g->error_name || g->error_name(code, &name) != 0 || !name) name = "an error without a name";
  return raw_fail("%s: %s (%d)", call, name, code);
}
#define CU(g, member, ...) check(g, (g)->member(__VA_ARGS__), #member)

static int look_up(raw_gpu *g) {
#define XX(member, name, parameters)                                                        \
  {                                                                                         \
    void *p = dlsym(g->library, name);                                                      \
    if (!p) return raw_fail("the driver has no function %s", name);                         \
    memcpy(&g->member, &p, sizeof(p)); /* C has no cast from object to function pointers */ \
  }
  DRIVER_FUNCTIONS(XX)
#undef XX
  void *version = dlsym(g->library, "cuDriverGetVersion");
  memcpy(&g->driver_version, &version, sizeof(version));
  return 0;
}

static void cuda_close(raw_device *dev) {
  raw_gpu *g = gpu(dev);
  if (g->stream) (void)g->stream_destroy(g->stream);
  if (g->context) (void)g->primary_release(g->device);
  /* The driver's library stays: it does not bear being unloaded while others in the process use it. */
  free(g);
}

static int cuda_open(int ordinal, raw_device **out) {
  raw_gpu *g = calloc(1, sizeof(*g));
  if (!g) return raw_fail("no memory");
  g->base.ops = &raw_cuda;
  g->library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!g->library) {
    int err = raw_fail("%s", dlerror());
    free(g);
    return err;
  }
  int err = look_up(g);
  if (!err) err = CU(g, init, 0);
  if (!err) err = CU(g, device_get, &g->device, ordinal);
  if (!err) err = CU(g, primary_retain, &g->context, g->device);
  if (!err) err = CU(g, set_current, g->context);
  if (!err) err = CU(g, stream_create, &g->stream, 1); /* does not wait for the default stream */
  if (err) {
    cuda_close(&g->base);
    return err;
  }
  g->prop = (allocation_prop){.type = 1, .location = {1, g->device}};
  g->access = (access_desc){.location = {1, g->device}, .flags = 3};
  *out = &g->base;
  return 0;
}

/* The version of the kernel's driver ("580.159.04"), or "". */
static void kernel_driver(char *out, size_t size) {
  out[0] = 0;
  FILE *f = fopen("/proc/driver/nvidia/version", "re");
  if (!f) return;
  char line[256];
  if (fgets(line, sizeof(line), f)) {
    for (char *word = strtok(line, " \t\n"); word; word = strtok(NULL, " \t\n")) {
      if (word[0] < '0' || word[0] > '9' || !strchr(word, '.')) continue;
      (void)snprintf(out, size, "%s, ", word);
      break;
    }
  }
  (void)fclose(f);
}

static void cuda_describe(raw_device *dev, char *device, size_t device_size, char *driver,
                          size_t driver_size) {
  raw_gpu *g = gpu(dev);
  char version_text[64];
  int version = 0;
  if (g->device_name(device, (int)device_size, g->device) != 0) (void)snprintf(device, device_size, "?");
  kernel_driver(version_text, sizeof(version_text));
  if (!g->driver_version || g->driver_version(&version) != 0) {
    (void)snprintf(driver, driver_size, "%sof unknown version", version_text);
    return;
  }
  (void)snprintf(driver, driver_size, "%sCUDA %d.%d", version_text, version / 1000, version % 1000 / 10);
}

static int cuda_reserve(raw_device *dev, size_t size, char **base) {
  device_ptr p = 0;
  int err = CU(gpu(dev), reserve, &p, size, 0, 0, 0);
  *base = (char *)(uintptr_t)p;
  return err;
}

static int cuda_unreserve(raw_device *dev, char *base, size_t size) {
  return CU(gpu(dev), unreserve, address(base), size);
}

static int cuda_create(raw_device *dev, size_t size, raw_handle *out) {
  return CU(gpu(dev), create, out, size, &gpu(dev)->prop, 0);
}

static int cuda_destroy(raw_device *dev, raw_handle handle) { return CU(gpu(dev), release, handle); }

static int cuda_map(raw_device *dev, char *at, size_t size, raw_handle handle) {
  return CU(gpu(dev), map, address(at), size, 0, handle, 0);
}

static int cuda_access(raw_device *dev, char *at, size_t len) {
  return CU(gpu(dev), set_access, address(at), len, &gpu(dev)->access, 1);
}

static int cuda_unmap(raw_device *dev, char *at, size_t len) { return CU(gpu(dev), unmap, address(at), len); }

static int cuda_zero(raw_device *dev, char *at, size_t len) {
  return CU(gpu(dev), set_bytes, address(at), 0, len, gpu(dev)->stream);
}

static int cuda_to_device(raw_device *dev, char *at, const void *src, size_t len) {
  return CU(gpu(dev), copy_in, address(at), src, len, gpu(dev)->stream);
}

static int cuda_to_host(raw_device *dev, void *dst, const char *at, size_t len) {
  return CU(gpu(dev), copy_out, dst, address(at), len, gpu(dev)->stream);
}

static int cuda_finish(raw_device *dev) { return CU(gpu(dev), stream_sync, gpu(dev)->stream); }

static int cuda_host_alloc(raw_device *dev, size_t size, void **out) {
  return CU(gpu(dev), host_alloc, out, size, 1); /* pinned for every context of the process */
}

static int cuda_host_free(raw_device *dev, void *p, size_t size) {
  (void)size;
  return CU(gpu(dev), host_free, p);
}

static int cuda_memory(raw_device *dev, uint64_t *free_bytes, uint64_t *total_bytes) {
  size_t free_now = 0, total = 0;
  int err = CU(gpu(dev), mem_info, &free_now, &total);
  *free_bytes = free_now;
  *total_bytes = total;
  return err;
}

const raw_ops raw_cuda = {
    .name = "cuda",
    .handles = 1,
    .open = cuda_open,
    .close = cuda_close,
    .describe = cuda_describe,
    .reserve = cuda_reserve,
    .unreserve = cuda_unreserve,
    .create = cuda_create,
    .destroy = cuda_destroy,
    .map = cuda_map,
    .access = cuda_access,
    .unmap = cuda_unmap,
    .zero = cuda_zero,
    .to_device = cuda_to_device,
    .to_host = cuda_to_host,
    .finish = cuda_finish,
    .host_alloc = cuda_host_alloc,
    .host_free = cuda_host_free,
    .memory = cuda_memory,
};
