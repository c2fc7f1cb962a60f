/* Regions on host memory and the kernel: its mappings, its refusals, locked and huge pages. */
#include "support.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

/* In a huge page the kernel cannot give a small one back, though Rss would say so. */
TEST_HOST(system, small_pages_stay_small) {
  kvcached_ctx_t ctx = open_alone(4096, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 8 * MIB);
  CHECK_OK(kvcached_ensure(r, 0, 8 * MIB));
  CHECK_EQ(resident(kvcached_region_base(r), 8 * MIB), 8 * MIB);
  CHECK_EQ(huge_pages(kvcached_region_base(r), 8 * MIB), 0);
  kvcached_shutdown(ctx);
}

/* Every other page, then the holes: the kernel must end with one mapping, not with one a page. */
TEST_HOST(system, mappings_merge) {
  const size_t page = 4096, n = 400;
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, n * page);
  CHECK_EQ(mappings(kvcached_region_base(r), n * page), 1);
  for (size_t i = 0; i < n; i += 2) CHECK_OK(kvcached_ensure(r, i * page, page));
  CHECK_EQ(mappings(kvcached_region_base(r), n * page), n);
  for (size_t i = 1; i < n; i += 2) CHECK_OK(kvcached_ensure(r, i * page, page));
  CHECK_EQ(mappings(kvcached_region_base(r), n * page), 1);
  for (size_t i = 0; i < n; i += 3) CHECK_OK(kvcached_release(r, i * page, page));
  CHECK_OK(kvcached_trim(ctx, 0, NULL));
  check_region(r);
  CHECK_OK(kvcached_release(r, 0, n * page));
  CHECK_OK(kvcached_trim(ctx, 0, NULL));
  CHECK_EQ(mappings(kvcached_region_base(r), n * page), 1);
  kvcached_shutdown(ctx);
}

/* Sleep and wake too: a region is one mapping without access while it sleeps, and one with it after. */
TEST_HOST(system, sleep_leaves_no_mappings) {
  const size_t page = 4096, n = 64;
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, n * page);
  for (size_t i = 0; i < n; i += 2) CHECK_OK(kvcached_ensure(r, i * page, page));
  CHECK_EQ(mappings(kvcached_region_base(r), n * page), n);
  CHECK_OK(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 1000, NULL));
  CHECK_EQ(mappings(kvcached_region_base(r), n * page), 1);
  CHECK_EQ(resident(kvcached_region_base(r), n * page), 0);
  CHECK(!accessible(kvcached_region_base(r)));
  CHECK_OK(kvcached_wake(ctx, KVCACHED_ALL_KINDS));
  for (size_t i = 1; i < n; i += 2) CHECK_OK(kvcached_ensure(r, i * page, page));
  CHECK_EQ(mappings(kvcached_region_base(r), n * page), 1);
  CHECK_EQ(resident(kvcached_region_base(r), n * page), n * page);
  kvcached_shutdown(ctx);
}

/* Uses up all mappings that this process may have but about `left`: every other page of a range gets another
   access. Returns how many there may be at all, 0 when that cannot be reached in a moment. */
static size_t use_up_mappings(size_t left, void **filler, size_t *size) {
  size_t max = 0;
  FILE *f = fopen("/proc/sys/vm/max_map_count", "re");
  CHECK(f != NULL && fscanf(f, "%zu", &max) == 1);
  fclose(f);
  if (max > 4000000) return 0;
  CHECK(max > 2 * left);
  size_t n = max - left;
  *size = n * 4096;
  *filler = mmap(NULL, *size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CHECK(*filler != MAP_FAILED);
  for (size_t i = 1; i < n; i += 2) CHECK(mprotect((char *)*filler + i * 4096, 4096, PROT_READ) == 0);
  return max;
}

/* Where the kernel's limit on mappings is out of reach, no number of holes is refused. */
static void any_number_of_holes(size_t page, size_t n) {
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, n * page);
  for (size_t i = 0; i < n; i += 2) CHECK_OK(kvcached_ensure(r, i * page, page));
  CHECK_EQ(mappings(kvcached_region_base(r), n * page), n);
  check_region(r);
  kvcached_shutdown(ctx);
}

/* The kernel's own limit on mappings, for real. */
TEST_HOST(system, out_of_mappings) {
  void *filler;
  size_t filler_size;
  const size_t page = 4096, n = 12000;
  if (use_up_mappings(6000, &filler, &filler_size) == 0) {
    any_number_of_holes(page, n);
    return;
  }
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, n * page);
  char *base = kvcached_region_base(r);
  size_t i = 0;
  int err = KVCACHED_OK;
  for (; i < n && !err; i += 2) err = kvcached_ensure(r, i * page, page);
  i -= 2;
  CHECK_IS(err, KVCACHED_E_NOMEM);
  CHECK_DETAIL("max_map_count");
  CHECK_EQ(stats_of(ctx).mapped, i / 2 * page);
  CHECK(!accessible(base + i * page));
  CHECK_OK(kvcached_ensure(r, page, page)); /* closes a hole: needs none, and makes room */
  CHECK_OK(kvcached_release(r, 0, 5 * page));
  CHECK_OK(kvcached_trim(ctx, 0, NULL));
  CHECK_EQ(stats_of(ctx).mapped, (i / 2 + 1 - 4) * page);
  CHECK(munmap(filler, filler_size) == 0);
  check_region(r);
  kvcached_shutdown(ctx);
}

/* The system refuses: nothing changes; what is idle goes back to it and may be enough. */
TEST_HOST(system, system_refuses) {
  const size_t page = 4096;
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 64 * page);
  CHECK_OK(kvcached_ensure(r, 0, 8 * page));
  put(r, 0, 'x', 8 * page);
  struct rlimit old, none;
  CHECK(getrlimit(RLIMIT_DATA, &old) == 0);
  none = old;
  none.rlim_cur = 1;
  CHECK(setrlimit(RLIMIT_DATA, &none) == 0);
  int err = kvcached_ensure(r, 4 * page, 20 * page);
  CHECK(setrlimit(RLIMIT_DATA, &old) == 0);
  CHECK_IS(err, KVCACHED_E_NOMEM);
  check_region(r);
  CHECK_EQ(stats_of(ctx).mapped, 8 * page);
  CHECK_EQ(stats_of(ctx).group_charge, 8 * page);
  CHECK_OK(kvcached_ensure(r, 4 * page, 20 * page));
  CHECK(holds(r, 0, 'x', 8 * page));
  CHECK(holds(r, 8 * page, 0, 16 * page));
  check_region(r);
  kvcached_shutdown(ctx);
}

/* A program that locks its memory (llama-server --mlock) must still be able to give pages back. */
TEST_HOST(system, locked_pages) {
  const size_t page = 4096;
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 8 * page);
  CHECK_OK(kvcached_ensure(r, 0, 8 * page));
  if (mlock(kvcached_region_base(r), 8 * page) != 0) {
    kvcached_shutdown(ctx);
    SKIP("memory cannot be locked here");
  }
  CHECK_OK(kvcached_release(r, 2 * page, 4 * page));
  CHECK_OK(kvcached_trim(ctx, 0, NULL));
  check_region(r);
  CHECK_EQ(stats_of(ctx).mapped, 4 * page);
  kvcached_shutdown(ctx);
}

/* The same of what sleeps: it wakes with its content, no longer locked. */
TEST_HOST(system, locked_pages_sleep) {
  const size_t page = 4096;
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_WEIGHTS, 8 * page);
  const size_t size = kvcached_region_size(r);
  CHECK_OK(kvcached_ensure(r, 0, size));
  memset(kvcached_region_base(r), 'x', size);
  if (mlock(kvcached_region_base(r), size) != 0) {
    kvcached_shutdown(ctx);
    SKIP("memory cannot be locked here");
  }
  size_t freed = 0;
  CHECK_OK(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 0, &freed));
  CHECK_EQ(freed, size);
  CHECK_EQ(stats_of(ctx).mapped, 0);
  CHECK_OK(kvcached_wake(ctx, KVCACHED_ALL_KINDS));
  CHECK(holds(r, 0, 'x', size));
  CHECK_EQ(munlock(kvcached_region_base(r), size), 0); /* as who locked it does in the end */
  kvcached_shutdown(ctx);
}

/* Running over the end faults even where another region follows; kernel mappings of two never become one. */
TEST_HOST(system, a_gap_behind_each_region) {
  const size_t page = 4096;
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  for (int i = 0; i < 20; i++) {
    kvcached_region_t r = reserve(ctx, KVCACHED_KV, (size_t)(i % 5 + 1) * page);
    size_t size = kvcached_region_size(r);
    CHECK_OK(kvcached_ensure(r, 0, size));
    CHECK(!accessible((char *)kvcached_region_base(r) + size));
    CHECK_EQ(mappings(kvcached_region_base(r), size), 1); /* ends the test when one crosses the border */
  }
  kvcached_shutdown(ctx);
}

/* 2 MiB pages begin where the kernel's huge pages do, whatever else is reserved. */
TEST_HOST(system, huge_pages_are_aligned) {
  kvcached_ctx_t ctx = open_alone(2 * MIB, UINT64_MAX);
  for (int i = 0; i < 4; i++) {
    kvcached_region_t r = reserve(ctx, KVCACHED_KV, 4 * MIB);
    CHECK_EQ((uintptr_t)kvcached_region_base(r) % (2 * MIB), 0);
    CHECK_OK(kvcached_ensure(r, 0, 1));
    CHECK_EQ(resident(kvcached_region_base(r), 4 * MIB), 2 * MIB);
  }
  kvcached_shutdown(ctx);
}

/* A forked child has neither the pages nor the copies: otherwise it would keep memory that nobody claims. */
TEST_HOST(system, nothing_in_a_forked_child) {
  const size_t page = 4096;
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 4 * page);
  CHECK_OK(kvcached_ensure(r, 0, 4 * page));
  const char *base = kvcached_region_base(r);
  pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) _exit(accessible(base) || accessible(base + 3 * page));
  int status;
  CHECK(waitpid(pid, &status, 0) == pid);
  CHECK_EQ(status, 0);
  kvcached_shutdown(ctx);
}

TEST_HOST(system, memory_of_the_machine) {
  kvcached_ctx_t ctx = open_alone(4096, UINT64_MAX);
  uint64_t free_bytes, total;
  CHECK_OK(kvcached_device_memory(ctx, &free_bytes, &total));
  CHECK_LE(free_bytes, total);
  long pages = sysconf(_SC_PHYS_PAGES);
  CHECK(pages > 0);
  uint64_t physical = (uint64_t)pages * (uint64_t)sysconf(_SC_PAGESIZE);
  CHECK_LE(total, physical + 64 * KIB); /* the same figure, rounded to KiB */
  CHECK_LE(physical, total + 64 * KIB);
  kvcached_shutdown(ctx);
}
