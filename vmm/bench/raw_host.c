/* Raw calls for ordinary memory: mmap, mprotect, madvise, memset. A handle is nothing; memory comes with the
   first touch. */
#define _GNU_SOURCE
#include "raw.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/utsname.h>

#define HUGE_PAGE ((size_t)2 << 20)

static int fail(const char *call, size_t len) {
  return raw_fail("%s of %zu bytes: %s", call, len, strerror(errno));
}

static int host_open(int ordinal, raw_device **out) {
  (void)ordinal;
  *out = calloc(1, sizeof(**out));
  if (!*out) return raw_fail("no memory");
  (*out)->ops = &raw_host;
  return 0;
}

static void host_close(raw_device *dev) { free(dev); }

static void host_describe(raw_device *dev, char *device, size_t device_size, char *driver,
                          size_t driver_size) {
  (void)dev;
  struct utsname u;
  if (uname(&u) != 0) memset(&u, 0, sizeof(u));
  (void)snprintf(device, device_size, "ordinary memory (%s)", u.machine);
  (void)snprintf(driver, driver_size, "%s %s", u.sysname, u.release);
}

static int host_reserve(raw_device *dev, size_t size, char **base) {
  (void)dev;
  char *p = mmap(NULL, size + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return fail("mmap", size);
  size_t lead = (HUGE_PAGE - (uintptr_t)p % HUGE_PAGE) % HUGE_PAGE;
  if (lead) (void)munmap(p, lead);
  if (HUGE_PAGE - lead) (void)munmap(p + lead + size, HUGE_PAGE - lead);
  *base = p + lead;
  return 0;
}

static int host_unreserve(raw_device *dev, char *base, size_t size) {
  (void)dev;
  return munmap(base, size) == 0 ? 0 : fail("munmap", size);
}

static int host_create(raw_device *dev, size_t size, raw_handle *out) {
  (void)dev, (void)size;
  *out = 1;
  return 0;
}

static int host_destroy(raw_device *dev, raw_handle handle) {
  (void)dev, (void)handle;
  return 0;
}

static int host_map(raw_device *dev, char *at, size_t size, raw_handle handle) {
  (void)dev, (void)at, (void)size, (void)handle;
  return 0;
}

static int host_access(raw_device *dev, char *at, size_t len) {
  (void)dev;
  return mprotect(at, len, PROT_READ | PROT_WRITE) == 0 ? 0 : fail("mprotect", len);
}

static int host_unmap(raw_device *dev, char *at, size_t len) {
  (void)dev;
  if (madvise(at, len, MADV_DONTNEED) != 0) return fail("madvise", len);
  return mprotect(at, len, PROT_NONE) == 0 ? 0 : fail("mprotect", len);
}

static int host_zero(raw_device *dev, char *at, size_t len) {
  (void)dev;
  memset(at, 0, len);
  return 0;
}

static int host_to_device(raw_device *dev, char *at, const void *src, size_t len) {
  (void)dev;
  memcpy(at, src, len);
  return 0;
}

static int host_to_host(raw_device *dev, void *dst, const char *at, size_t len) {
  (void)dev;
  memcpy(dst, at, len);
  return 0;
}

static int host_finish(raw_device *dev) {
  (void)dev;
  return 0;
}

static int host_alloc(raw_device *dev, size_t size, void **out) {
  (void)dev;
  *out = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (*out == MAP_FAILED) return fail("mmap", size);
  memset(*out, 0, size); /* pages there, as pinned memory has them */
  return 0;
}

static int host_free(raw_device *dev, void *p, size_t size) {
  (void)dev;
  return munmap(p, size) == 0 ? 0 : fail("munmap", size);
}

static int host_memory(raw_device *dev, uint64_t *free_bytes, uint64_t *total_bytes) {
  (void)dev;
  FILE *f = fopen("/proc/meminfo", "re");
  if (!f) return raw_fail("/proc/meminfo: %s", strerror(errno));
  char line[128];
  unsigned long long kib;
  *free_bytes = *total_bytes = 0;
  while (fgets(line, sizeof(line), f)) {
    if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1) *free_bytes = kib << 10;
    if (sscanf(line, "MemTotal: %llu kB", &kib) == 1) *total_bytes = kib << 10;
  }
  (void)fclose(f);
  return *total_bytes ? 0 : raw_fail("/proc/meminfo has no MemTotal");
}

const raw_ops raw_host = {
    .name = "host",
    .handles = 0,
    .open = host_open,
    .close = host_close,
    .describe = host_describe,
    .reserve = host_reserve,
    .unreserve = host_unreserve,
    .create = host_create,
    .destroy = host_destroy,
    .map = host_map,
    .access = host_access,
    .unmap = host_unmap,
    .zero = host_zero,
    .to_device = host_to_device,
    .to_host = host_to_host,
    .finish = host_finish,
    .host_alloc = host_alloc,
    .host_free = host_free,
    .memory = host_memory,
};
