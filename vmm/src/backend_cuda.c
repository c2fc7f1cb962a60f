/*
 * Backend `cuda`: memory of an NVIDIA GPU by the driver's virtual memory management.
 *
 * Making, mapping and ending memory names its device and needs no current context; copies, memsets, waits and
 * pinned memory do. Costs are per handle and per call, so each function here makes the one driver call that
 * it has to, save a look at the current context.
 */
#include "cuda_device.h"

#include <string.h>

static kvc_cuda_device *cuda(kvc_device *device) { return (kvc_cuda_device *)device; }

static cu_ptr at(const kvc_space *space, size_t off) { return (cu_ptr)(uintptr_t)space->base + off; }

/* ---- spaces ---- */

static int cuda_reserve(kvc_device *device, size_t size, size_t align, kvc_space *space) {
  kvc_cuda_device *d = cuda(device);
  *space = (kvc_space){0};
  /* Behind the space one granule stays empty: running over the end faults even where another space follows.
     The driver aligns to powers of two; for any other alignment there is room to move up. */
  size_t guard = device->granularity;
  size_t power = align & (align - 1) ? 0 : align;
  size_t slack = power || align == 0 ? 0 : align;
  if (size > SIZE_MAX - guard - slack)
    return kvc_fail(KVCACHED_E_NOMEM, "%zu bytes are more than there are addresses", size);
  size_t total = size + guard + slack;
  /* The slack need not be whole granules, what is asked for does. */
  total += (guard - total % guard) % guard;
  cu_ptr raw = 0;
  cu_result r = d->driver->address_reserve(&raw, total, power, 0, 0);
  if (r != CU_OK)
    return kvc_cuda_fail(d->driver, r, "reserving %zu bytes of addresses on %s", size, device->name);
  cu_ptr lead = slack ? (slack - raw % slack) % slack : 0;
  *space = (kvc_space){.base = (void *)(uintptr_t)(raw + lead),
                       .size = size,
                       .raw = (void *)(uintptr_t)raw,
                       .raw_size = total};
  return KVCACHED_OK;
}

static void cuda_unreserve(kvc_device *device, kvc_space *space) {
  if (space->raw) (void)cuda(device)->driver->address_free((cu_ptr)(uintptr_t)space->raw, space->raw_size);
  *space = (kvc_space){0};
}

/* ---- memory ---- */

static void count(const kvc_cuda_device *d, int64_t bytes) {
  kvc_cuda_handles *h = kvc_cuda_handles_of(d);
  atomic_fetch_add_explicit(&h->bytes, (uint64_t)bytes, memory_order_relaxed);
  atomic_fetch_add_explicit(&h->changes, 1, memory_order_relaxed);
}

static int cuda_create(kvc_device *device, size_t size, kvc_handle *out) {
  kvc_cuda_device *d = cuda(device);
  cu_handle handle = 0;
  cu_result r = d->driver->mem_create(&handle, size, &d->prop, 0);
  if (r != CU_OK) return kvc_cuda_fail(d->driver, r, "%zu bytes of memory on %s", size, device->name);
  count(d, (int64_t)size);
  *out = handle;
  return KVCACHED_OK;
}

static int cuda_destroy(kvc_device *device, size_t size, kvc_handle handle) {
  kvc_cuda_device *d = cuda(device);
  cu_result r = d->driver->mem_release(handle);
  if (r != CU_OK) return kvc_cuda_fail(d->driver, r, "giving %zu bytes back to %s", size, device->name);
  count(d, -(int64_t)size);
  return KVCACHED_OK;
}

static int cuda_map(kvc_device *device, kvc_space *space, size_t off, size_t size, kvc_handle handle) {
  kvc_cuda_device *d = cuda(device);
  cu_result r = d->driver->mem_map(at(space, off), size, 0, handle, 0);
  if (r == CU_OK) return KVCACHED_OK;
  return kvc_cuda_fail(d->driver, r, "mapping %zu bytes at offset %zu on %s", size, off, device->name);
}

static int cuda_access(kvc_device *device, kvc_space *space, size_t off, size_t len) {
  kvc_cuda_device *d = cuda(device);
  cu_result r = d->driver->mem_set_access(at(space, off), len, &d->access, 1);
  if (r == CU_OK) return KVCACHED_OK;
  return kvc_cuda_fail(d->driver, r, "giving access to %zu bytes at offset %zu on %s", len, off,
                       device->name);
}

static int cuda_unmap(kvc_device *device, kvc_space *space, size_t off, size_t len) {
  kvc_cuda_device *d = cuda(device);
  cu_result r = d->driver->mem_unmap(at(space, off), len);
  if (r == CU_OK) return KVCACHED_OK;
  return kvc_cuda_fail(d->driver, r, "unmapping %zu bytes at offset %zu on %s", len, off, device->name);
}

/* ---- content ---- */

static int cuda_zero(kvc_device *device, kvc_lane lane, kvc_space *space, size_t off, size_t len) {
  kvc_cuda_device *d = cuda(device);
  int pushed, err = kvc_cuda_enter(d, &pushed);
  if (err) return err;
  cu_result r = d->driver->memset_async(at(space, off), 0, len, d->lane[lane]);
  kvc_cuda_leave(d, pushed);
  if (r == CU_OK) return KVCACHED_OK;
  return kvc_cuda_fail(d->driver, r, "zeroing %zu bytes at offset %zu on %s", len, off, device->name);
}

static int cuda_read(kvc_device *device, kvc_lane lane, kvc_space *space, size_t off, void *dst, size_t len) {
  kvc_cuda_device *d = cuda(device);
  int pushed, err = kvc_cuda_enter(d, &pushed);
  if (err) return err;
  cu_result r = d->driver->copy_to_host(dst, at(space, off), len, d->lane[lane]);
  kvc_cuda_leave(d, pushed);
  if (r == CU_OK) return KVCACHED_OK;
  return kvc_cuda_fail(d->driver, r, "reading %zu bytes at offset %zu from %s", len, off, device->name);
}

static int cuda_write(kvc_device *device, kvc_lane lane, kvc_space *space, size_t off, const void *src,
                      size_t len) {
  kvc_cuda_device *d = cuda(device);
  int pushed, err = kvc_cuda_enter(d, &pushed);
  if (err) return err;
  cu_result r = d->driver->copy_to_device(at(space, off), src, len, d->lane[lane]);
  kvc_cuda_leave(d, pushed);
  if (r == CU_OK) return KVCACHED_OK;
  return kvc_cuda_fail(d->driver, r, "writing %zu bytes at offset %zu to %s", len, off, device->name);
}

static int cuda_finish(kvc_device *device, kvc_lane lane) {
  kvc_cuda_device *d = cuda(device);
  int pushed, err = kvc_cuda_enter(d, &pushed);
  if (err) return err;
  cu_result r = d->driver->stream_synchronize(d->lane[lane]);
  kvc_cuda_leave(d, pushed);
  return r == CU_OK ? KVCACHED_OK
                    : kvc_cuda_fail(d->driver, r, "waiting for the library's work on %s", device->name);
}

/* Every stream of the primary context, which the CUDA runtime and all that is built on it use. */
static int cuda_quiesce(kvc_device *device) {
  kvc_cuda_device *d = cuda(device);
  int pushed, err = kvc_cuda_enter(d, &pushed);
  if (err) return err;
  cu_result r = d->driver->ctx_synchronize();
  kvc_cuda_leave(d, pushed);
  return r == CU_OK ? KVCACHED_OK : kvc_cuda_fail(d->driver, r, "waiting for %s to be idle", device->name);
}

/* ---- host memory, figures ---- */

/* Pinned memory is limited by more than memory (locked pages, the driver's own tables): where there is none
   ordinary memory does, at about half the speed. */
static int cuda_host_alloc(kvc_device *device, size_t size, void **out, int *pinned) {
  kvc_cuda_device *d = cuda(device);
  *out = NULL;
  *pinned = 0;
  int pushed, err = kvc_cuda_enter(d, &pushed);
  if (err) return err;
  void *p = NULL;
  cu_result r = d->driver->mem_host_alloc(&p, size, CU_HOST_ALLOC_PORTABLE);
  kvc_cuda_leave(d, pushed);
  if (r != CU_OK) return kvc_pageable_alloc(size, out, pinned);
  *out = p;
  *pinned = 1;
  return KVCACHED_OK;
}

static int cuda_host_free(kvc_device *device, void *p, size_t size, int pinned) {
  if (!pinned) return kvc_pageable_free(p, size);
  kvc_cuda_device *d = cuda(device);
  int pushed, err = kvc_cuda_enter(d, &pushed);
  if (err) return err;
  cu_result r = d->driver->mem_free_host(p);
  kvc_cuda_leave(d, pushed);
  return r == CU_OK ? KVCACHED_OK
                    : kvc_cuda_fail(d->driver, r, "giving back %zu bytes of pinned memory", size);
}

static int cuda_memory(kvc_device *device, uint64_t *free_bytes, uint64_t *total_bytes) {
  kvc_cuda_device *d = cuda(device);
  size_t available = 0, total = 0;
  int pushed, err = kvc_cuda_enter(d, &pushed);
  if (err) return err;
  cu_result r = d->driver->mem_get_info(&available, &total);
  kvc_cuda_leave(d, pushed);
  if (r != CU_OK) return kvc_cuda_fail(d->driver, r, "asking %s for its free memory", device->name);
  *free_bytes = available;
  *total_bytes = total;
  return KVCACHED_OK;
}

static int cuda_beside(kvc_device *device, uint64_t *bytes) {
  kvc_cuda_device *d = cuda(device);
  kvc_cuda_handles *h = kvc_cuda_handles_of(d);
  if (!d->nvml.nvml) return kvc_nvml_open(device->id, &d->nvml); /* again, for what it says */
  uint64_t changes = atomic_load(&h->changes), ours = atomic_load(&h->bytes), used;
  int err = kvc_nvml_used_here(&d->nvml, &used);
  if (err) {
    *bytes = d->made;
    return d->made > 0 ? KVCACHED_OK : err;
  }
  if (atomic_load(&h->changes) != changes || used < ours)
    return kvc_fail(KVCACHED_E_BUSY, "memory came or went on %s meanwhile", device->name);
  *bytes = used - ours;
  return KVCACHED_OK;
}

const kvc_backend kvc_backend_cuda = {
    .name = "cuda",
    .pools = 1,
    .fresh_is_zero = 0, /* seen so, promised nowhere */
    .open = kvc_cuda_open,
    .close = kvc_cuda_close,
    .reserve = cuda_reserve,
    .unreserve = cuda_unreserve,
    .create = cuda_create,
    .destroy = cuda_destroy,
    .map = cuda_map,
    .access = cuda_access,
    .unmap = cuda_unmap,
    .zero = cuda_zero,
    .read = cuda_read,
    .write = cuda_write,
    .finish = cuda_finish,
    .quiesce = cuda_quiesce,
    .host_alloc = cuda_host_alloc,
    .host_free = cuda_host_free,
    .memory = cuda_memory,
    .beside = cuda_beside,
};
