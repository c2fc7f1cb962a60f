/*
 * Backend `host`: private anonymous memory.
 *
 * A space is one mapping without access. Handles are tokens: a run gets its memory when it is given access,
 * and is populated then and there, so that the library's count and the system's Rss agree and running out of
 * memory shows here rather than at some later touch. Runs of equal protection merge into one kernel mapping
 * by themselves, as long as they share an anon_vma; the number of mappings a process may have
 * (vm.max_map_count) therefore bounds the number of holes, not of pages.
 */
#include "backend.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

/* Newer than some of the C libraries this has to build with; values from the kernel's interface. */
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif

#define HUGE_PAGE ((size_t)2 << 20)
#define LARGE_PAGE_MAX ((size_t)256 << 20)

static size_t system_page(void) { return (size_t)sysconf(_SC_PAGESIZE); }

static char *at(const kvc_space *space, size_t off) { return (char *)space->base + off; }

static int system_error(int e) { return e == ENOMEM ? KVCACHED_E_NOMEM : KVCACHED_E_SYSTEM; }

/* ---- the device ---- */

static int host_open(const kvc_device_options *options, kvc_device **out) {
  *out = NULL;
  size_t small = system_page();
  size_t page = options->page_size ? options->page_size : small;
  if (page != small && page != HUGE_PAGE)
    return kvc_fail(KVCACHED_E_INVAL, "page_size %zu: host memory has pages of %zu or %zu bytes", page, small,
                    HUGE_PAGE);
  size_t large = options->large_page ? options->large_page : HUGE_PAGE;
  if (large % page != 0 || large > LARGE_PAGE_MAX)
    return kvc_fail(KVCACHED_E_INVAL,
                    "large_page %zu: it has to be a multiple of page_size (%zu bytes), up to %zu", large,
                    page, LARGE_PAGE_MAX);
  kvc_device *device = calloc(1, sizeof(*device));
  if (!device) return kvc_fail(KVCACHED_E_NOMEM, "no memory to open the host's memory as a device");
  *device = (kvc_device){.id = "host",
                         .name = "host memory",
                         .granularity = small,
                         .page_size = page,
                         .large_page = large,
                         .edits_anytime = 1};
  *out = device;
  return KVCACHED_OK;
}

static void host_close(kvc_device *device) { free(device); }

/* MemTotal and MemAvailable: what the kernel thinks can be had without swapping. */
static int host_memory(kvc_device *device, uint64_t *free_bytes, uint64_t *total_bytes) {
  (void)device;
  FILE *f = fopen("/proc/meminfo", "re");
  if (!f) return kvc_fail_errno(KVCACHED_E_SYSTEM, errno, "opening /proc/meminfo");
  char line[256];
  unsigned long long kib, total = 0, available = 0;
  int found = 0;
  while (found != 3 && fgets(line, sizeof(line), f)) {
    if (sscanf(line, "MemTotal: %llu kB", &kib) == 1) {
      total = kib;
      found |= 1;
    } else if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1) {
      available = kib;
      found |= 2;
    }
  }
  (void)fclose(f);
  if (found != 3)
    return kvc_fail(KVCACHED_E_SYSTEM, "/proc/meminfo has no MemTotal or MemAvailable: is /proc mounted?");
  *free_bytes = (uint64_t)available * 1024;
  *total_bytes = (uint64_t)total * 1024;
  return KVCACHED_OK;
}

/* ---- runs of pages ---- */

static int protect_run(const kvc_space *space, size_t off, size_t len, int prot) {
  if (mprotect(at(space, off), len, prot) == 0) return KVCACHED_OK;
  int e = errno;
  return kvc_fail_errno(system_error(e), e,
                        "changing the access of %zu bytes (no memory, or no mappings left: vm.max_map_count)",
                        len);
}

/* Frees the memory of a run, whatever its access. Pages somebody locked (mlock) have to be unlocked first. */
static int discard_run(const kvc_space *space, size_t off, size_t len) {
  if (madvise(at(space, off), len, MADV_DONTNEED) == 0) return KVCACHED_OK;
  if (errno == EINVAL && munlock(at(space, off), len) == 0 &&
      madvise(at(space, off), len, MADV_DONTNEED) == 0)
    return KVCACHED_OK;
  return kvc_fail_errno(KVCACHED_E_SYSTEM, errno, "giving %zu bytes back to the system", len);
}

static int populate(char *p, size_t len) {
  static atomic_int unknown_to_kernel; /* before Linux 5.14 */
  if (!atomic_load(&unknown_to_kernel)) {
    int rc;
    do rc = madvise(p, len, MADV_POPULATE_WRITE);
    while (rc != 0 && errno == EINTR);
    if (rc == 0) return KVCACHED_OK;
    if (errno != EINVAL) return kvc_fail_errno(KVCACHED_E_NOMEM, errno, "filling %zu bytes with memory", len);
    atomic_store(&unknown_to_kernel, 1);
  }
  size_t step = system_page();
  for (size_t i = 0; i < len; i += step) *(volatile char *)(p + i) = 0;
  return KVCACHED_OK;
}

static int host_create(kvc_device *device, size_t size, kvc_handle *out) {
  (void)device;
  *out = (kvc_handle)size; /* a token: nobody looks at it */
  return KVCACHED_OK;
}

static int host_destroy(kvc_device *device, size_t size, kvc_handle handle) {
  (void)device, (void)size, (void)handle;
  return KVCACHED_OK;
}

static int host_map(kvc_device *device, kvc_space *space, size_t off, size_t size, kvc_handle handle) {
  (void)device, (void)space, (void)off, (void)size, (void)handle;
  return KVCACHED_OK;
}

static int host_access(kvc_device *device, kvc_space *space, size_t off, size_t len) {
  (void)device;
  int err = protect_run(space, off, len, PROT_READ | PROT_WRITE);
  if (err) return err;
  err = populate(at(space, off), len);
  if (err) {
    (void)madvise(at(space, off), len, MADV_DONTNEED);
    (void)mprotect(at(space, off), len, PROT_NONE);
  }
  return err;
}

static int host_unmap(kvc_device *device, kvc_space *space, size_t off, size_t len) {
  (void)device;
  /* Access first: it is the step that can fail for want of a mapping, and then nothing has been lost.
     Whichever fails, access may be gone, and is the caller's to ask for again. */
  int err = protect_run(space, off, len, PROT_NONE);
  return err ? err : discard_run(space, off, len);
}

/* ---- spaces ---- */

/* A mapping gets its anon_vma at its first page, and parts that got different ones never merge again: filling
   every other page and then the holes would leave thousands of mappings. One page touched while all is still
   one mapping gives every later part the same one. */
static int share_anon_vma(const kvc_space *space) {
  size_t page = system_page();
  int err = protect_run(space, 0, page, PROT_READ | PROT_WRITE);
  if (err) return err;
  *(volatile char *)at(space, 0) = 0;
  err = discard_run(space, 0, page);
  if (err) return err;
  return protect_run(space, 0, page, PROT_NONE);
}

static int host_reserve(kvc_device *device, size_t size, size_t align, kvc_space *space) {
  (void)device;
  *space = (kvc_space){0};
  /* Behind the space one page stays without access: running over the end faults even where another space
     follows, and smaps never shows the two as one mapping. */
  size_t guard = system_page();
  size_t slack = align > guard ? align : 0;
  if (size > SIZE_MAX - guard - slack)
    return kvc_fail(KVCACHED_E_NOMEM, "%zu bytes are more than there are addresses", size);
  size_t total = size + guard + slack;
  char *raw = mmap(NULL, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED)
    return kvc_fail_errno(KVCACHED_E_NOMEM, errno, "reserving %zu bytes of addresses", size);

  size_t lead = slack ? (align - (uintptr_t)raw % align) % align : 0;
  char *base = raw + lead;
  size_t span = size + guard; /* what stays */
  if (lead) (void)munmap(raw, lead);
  if (slack - lead) (void)munmap(base + span, slack - lead);

  kvc_space made = {.base = base, .size = size, .raw = base, .raw_size = span};
  /* Otherwise a forked child would keep pages after the process that claims them has ended. */
  if (madvise(base, size, MADV_DONTFORK) != 0) {
    int e = errno;
    (void)munmap(base, span);
    return kvc_fail_errno(system_error(e), e, "keeping %zu bytes out of children", size);
  }
  /* Hints, absent from some kernels: 4 KiB pages must not be grown into huge ones (memory nobody asked for),
     2 MiB ones may as well be huge. */
  (void)madvise(base, size, align && align % HUGE_PAGE == 0 ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  (void)prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, base, size, "kvcached");
  int err = share_anon_vma(&made);
  if (err) {
    (void)munmap(base, span);
    return err;
  }
  *space = made;
  return KVCACHED_OK;
}

static void host_unreserve(kvc_device *device, kvc_space *space) {
  (void)device;
  if (space->raw) (void)munmap(space->raw, space->raw_size);
  *space = (kvc_space){0};
}

/* ---- content: the CPU does it at once, so that there is never anything to wait for ---- */

static int host_zero(kvc_device *device, kvc_lane lane, kvc_space *space, size_t off, size_t len) {
  (void)device, (void)lane;
  memset(at(space, off), 0, len);
  return KVCACHED_OK;
}

static int host_read(kvc_device *device, kvc_lane lane, kvc_space *space, size_t off, void *dst, size_t len) {
  (void)device, (void)lane;
  memcpy(dst, at(space, off), len);
  return KVCACHED_OK;
}

static int host_write(kvc_device *device, kvc_lane lane, kvc_space *space, size_t off, const void *src,
                      size_t len) {
  (void)device, (void)lane;
  memcpy(at(space, off), src, len);
  return KVCACHED_OK;
}

static int host_finish(kvc_device *device, kvc_lane lane) {
  (void)device, (void)lane;
  return KVCACHED_OK;
}

static int host_quiesce(kvc_device *device) {
  (void)device;
  return KVCACHED_OK;
}

/* ---- host memory for copies: ordinary memory, which no device reads ---- */

static int host_host_alloc(kvc_device *device, size_t size, void **out, int *pinned) {
  (void)device;
  return kvc_pageable_alloc(size, out, pinned);
}

static int host_host_free(kvc_device *device, void *p, size_t size, int pinned) {
  (void)device, (void)pinned;
  return kvc_pageable_free(p, size);
}

int kvc_pageable_alloc(size_t size, void **out, int *pinned) {
  *out = NULL;
  *pinned = 0;
  void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED)
    return kvc_fail_errno(KVCACHED_E_NOMEM, errno, "%zu bytes of host memory for a copy", size);
  /* A forked child must not keep the content of a sleeping region after its owner. */
  (void)madvise(p, size, MADV_DONTFORK);
  int err = populate(p, size);
  if (err) {
    (void)munmap(p, size);
    return err;
  }
  *out = p;
  return KVCACHED_OK;
}

int kvc_pageable_free(void *p, size_t size) {
  if (munmap(p, size) == 0) return KVCACHED_OK;
  int e = errno;
  return kvc_fail_errno(system_error(e), e, "giving back %zu bytes of host memory", size);
}

const kvc_backend kvc_backend_host = {
    .name = "host",
    .pools = 0,
    .fresh_is_zero = 1,
    .open = host_open,
    .close = host_close,
    .reserve = host_reserve,
    .unreserve = host_unreserve,
    .create = host_create,
    .destroy = host_destroy,
    .map = host_map,
    .access = host_access,
    .unmap = host_unmap,
    .zero = host_zero,
    .read = host_read,
    .write = host_write,
    .finish = host_finish,
    .quiesce = host_quiesce,
    .host_alloc = host_host_alloc,
    .host_free = host_host_free,
    .memory = host_memory,
};
