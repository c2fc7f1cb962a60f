/*
 * The other side of every comparison: the system's own calls with nothing around them. One table for CUDA's
 * virtual memory (raw_cuda.c, with its own dlopen of the driver) and one for the host's (raw_host.c).
 *
 * Functions return 0, or not 0 with raw_error() saying why. One thread at a time.
 */
#ifndef RAW_H
#define RAW_H

#include <stddef.h>
#include <stdint.h>

typedef struct raw_device raw_device; /* an open device */

typedef uint64_t raw_handle; /* physical memory */

typedef struct raw_ops {
  const char *name;
  int handles; /* 1: physical memory is a thing by itself, and can be mapped again after an unmap */

  int (*open)(int ordinal, raw_device **out);
  void (*close)(raw_device *dev);
  /* Name of the device and of its driver, for people. */
  void (*describe)(raw_device *dev, char *device, size_t device_size, char *driver, size_t driver_size);

  int (*reserve)(raw_device *dev, size_t size, char **base);
  int (*unreserve)(raw_device *dev, char *base, size_t size);
  int (*create)(raw_device *dev, size_t size, raw_handle *out);
  int (*destroy)(raw_device *dev, raw_handle handle);
  int (*map)(raw_device *dev, char *at, size_t size, raw_handle handle);
  int (*access)(raw_device *dev, char *at, size_t len); /* one call for a run of mapped handles */
  int (*unmap)(raw_device *dev, char *at, size_t len);  /* the same */

  /* Queued; done once finish returns. */
  int (*zero)(raw_device *dev, char *at, size_t len);
  int (*to_device)(raw_device *dev, char *at, const void *src, size_t len);
  int (*to_host)(raw_device *dev, void *dst, const char *at, size_t len);
  int (*finish)(raw_device *dev);

  int (*host_alloc)(raw_device *dev, size_t size, void **out); /* pinned where there is such a thing */
  int (*host_free)(raw_device *dev, void *p, size_t size);
  int (*memory)(raw_device *dev, uint64_t *free_bytes, uint64_t *total_bytes);
} raw_ops;

/* Every backend's structure begins with this. */
struct raw_device {
  const raw_ops *ops;
};

extern const raw_ops raw_host, raw_cuda;

const char *raw_error(void);
/* Notes why, and returns 1. */
int raw_fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* A run of memory made of handles of `unit` bytes (the last may be shorter). */
typedef struct raw_run {
  char *base;
  size_t size, unit, n;
  raw_handle *handle;
} raw_run;
int raw_run_reserve(raw_device *dev, raw_run *run, size_t size, size_t unit);
int raw_run_create(raw_device *dev, raw_run *run);
int raw_run_map(raw_device *dev, raw_run *run);
int raw_run_access(raw_device *dev, raw_run *run);
int raw_run_zero(raw_device *dev, raw_run *run); /* and waits for it */
int raw_run_unmap(raw_device *dev, raw_run *run);
int raw_run_destroy(raw_device *dev, raw_run *run);
int raw_run_unreserve(raw_device *dev, raw_run *run);

#endif
