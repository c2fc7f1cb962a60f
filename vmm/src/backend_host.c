/*
 * Backend `host`: private anonymous memory.
 *
 * A space is one mapping without access. Mapping a run gives it access and populates it at once: the pages
 * are then resident, so the library's count and the system's Rss agree, and running out of memory shows here
 * rather than at some later touch. Runs of equal protection merge into one kernel mapping by themselves, as
 * long as they share an anon_vma; the number of mappings a process may have (vm.max_map_count) therefore
 * bounds the number of holes, not of pages.
 */
#include "backend.h"

#include <errno.h>
#include <stdatomic.h>
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

static size_t system_page(void) { return (size_t)sysconf(_SC_PAGESIZE); }

static char *at(const kvc_space *space, size_t off) { return (char *)space->base + off; }

static int host_page_size(size_t asked, size_t *out) {
  size_t page = system_page();
  if (asked == 0) asked = page;
  if (asked != page && asked != HUGE_PAGE)
    return kvc_fail(KVCACHED_E_INVAL, "page_size %zu: host memory has pages of %zu or %zu bytes", asked, page,
                    HUGE_PAGE);
  *out = asked;
  return KVCACHED_OK;
}

static int access_run(const kvc_space *space, size_t off, size_t len, int prot) {
  if (mprotect(at(space, off), len, prot) == 0) return KVCACHED_OK;
  int e = errno;
  return kvc_fail_errno(e == ENOMEM ? KVCACHED_E_NOMEM : KVCACHED_E_SYSTEM, e,
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

static int populate_run(const kvc_space *space, size_t off, size_t len) {
  static atomic_int unknown_to_kernel; /* before Linux 5.14 */
  char *p = at(space, off);
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

static int host_map(kvc_space *space, size_t off, size_t len) {
  int err = access_run(space, off, len, PROT_READ | PROT_WRITE);
  if (err) return err;
  err = populate_run(space, off, len);
  if (err) {
    (void)madvise(at(space, off), len, MADV_DONTNEED);
    (void)mprotect(at(space, off), len, PROT_NONE);
  }
  return err;
}

static int host_unmap(kvc_space *space, size_t off, size_t len) {
  /* Access first: it is the step that can fail for want of a mapping, and then nothing has been lost. */
  int err = access_run(space, off, len, PROT_NONE);
  if (err) return err;
  err = discard_run(space, off, len);
  if (err) (void)mprotect(at(space, off), len, PROT_READ | PROT_WRITE);
  return err;
}

static int host_zero(kvc_space *space, size_t off, size_t len) {
  memset(at(space, off), 0, len);
  return KVCACHED_OK;
}

/* A mapping gets its anon_vma at its first page, and parts that got different ones never merge again: filling
   every other page and then the holes would leave thousands of mappings. One page touched while all is still
   one mapping gives every later part the same one. */
static int share_anon_vma(const kvc_space *space) {
  size_t page = system_page();
  int err = access_run(space, 0, page, PROT_READ | PROT_WRITE);
  if (err) return err;
  *(volatile char *)at(space, 0) = 0;
  err = discard_run(space, 0, page);
  if (err) return err;
  return access_run(space, 0, page, PROT_NONE);
}

static int host_reserve(size_t size, size_t page_size, kvc_space *space) {
  /* Behind the space one page stays without access: running over the end faults even where another space
     follows, and smaps never shows the two as one mapping. */
  size_t guard = system_page();
  size_t slack = page_size > guard ? page_size : 0;
  if (size > SIZE_MAX - guard - slack)
    return kvc_fail(KVCACHED_E_NOMEM, "%zu bytes are more than there are addresses", size);
  size_t total = size + guard + slack;
  char *raw = mmap(NULL, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED)
    return kvc_fail_errno(KVCACHED_E_NOMEM, errno, "reserving %zu bytes of addresses", size);

  size_t lead = slack ? (page_size - (uintptr_t)raw % page_size) % page_size : 0;
  char *base = raw + lead;
  size_t span = size + guard; /* what stays */
  if (lead) (void)munmap(raw, lead);
  if (slack - lead) (void)munmap(base + span, slack - lead);

  *space = (kvc_space){.base = base, .size = size, .page_size = page_size};
  /* Otherwise a forked child would keep pages after the process that claims them has ended. */
  if (madvise(base, size, MADV_DONTFORK) != 0) {
    int err = kvc_fail_errno(errno == ENOMEM ? KVCACHED_E_NOMEM : KVCACHED_E_SYSTEM, errno,
                             "keeping %zu bytes out of children", size);
    (void)munmap(base, span);
    return err;
  }
  /* Hints, absent from some kernels: 4 KiB pages must not be grown into huge ones (memory nobody asked for),
     2 MiB ones may as well be huge. */
  (void)madvise(base, size, page_size == HUGE_PAGE ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  (void)prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, base, size, "kvcached");
  int err = share_anon_vma(space);
  if (err) (void)munmap(base, span);
  return err;
}

static void host_release(kvc_space *space) {
  (void)munmap(space->base, space->size + system_page());
  *space = (kvc_space){0};
}

const kvc_backend kvc_backend_host = {
    .name = "host",
    .page_size = host_page_size,
    .reserve = host_reserve,
    .map = host_map,
    .unmap = host_unmap,
    .zero = host_zero,
    .release = host_release,
};

const kvc_backend *kvc_backend_get(int backend) {
  const kvc_backend *table = backend == KVCACHED_BACKEND_HOST ? &kvc_backend_host : NULL;
#ifdef KVCACHED_TEST
  if (table) table = kvc_test_backend(table);
#endif
  return table;
}
