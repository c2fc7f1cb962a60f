/* Regions and the kernel: its mappings, its refusals, locked and huge pages. */
#include "support.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

/* In a huge page the kernel cannot give a small one back, though Rss would say so. */
static void test_small_pages_stay_small(void) {
  kvcached_ctx_t ctx = open_alone(4096, UINT64_MAX);
  kvcached_region_t r;
  CHECK_OK(kvcached_reserve(ctx, 8 * MIB, &r));
  CHECK_OK(kvcached_ensure(r, 0, 8 * MIB));
  CHECK_EQ(resident(kvcached_region_base(r), 8 * MIB), 8 * MIB);
  CHECK_EQ(huge_pages(kvcached_region_base(r), 8 * MIB), 0);
  kvcached_shutdown(ctx);
}

/* Every other page, then the holes: the kernel must end with one mapping, not with one a page. */
static void test_mappings_merge(void) {
  const size_t page = 4096, n = 400;
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  kvcached_region_t r;
  CHECK_OK(kvcached_reserve(ctx, n * page, &r));
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

/* The kernel's own limit on mappings, for real. */
static void test_out_of_mappings(void) {
  long max = 0;
  FILE *f = fopen("/proc/sys/vm/max_map_count", "re");
  if (f) {
    if (fscanf(f, "%ld", &max) != 1) max = 0;
    fclose(f);
  }
  if (max <= 0 || max > 70000) {
    SKIP("test_out_of_mappings", "vm.max_map_count is too large to be reached in a moment");
    return;
  }
  const size_t page = 4096, n = (size_t)max + 1000;
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  kvcached_region_t r;
  CHECK_OK(kvcached_reserve(ctx, n * page, &r));
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
  check_region(r);
  kvcached_shutdown(ctx);
}

/* The system refuses: nothing changes; what is idle goes back to it and may be enough. */
static void test_system_refuses(void) {
  const size_t page = 4096;
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  kvcached_region_t r;
  CHECK_OK(kvcached_reserve(ctx, 64 * page, &r));
  CHECK_OK(kvcached_ensure(r, 0, 8 * page));
  memset(kvcached_region_base(r), 'x', 8 * page);
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
  CHECK(all_bytes(kvcached_region_base(r), 8 * page, 'x'));
  CHECK(all_bytes((char *)kvcached_region_base(r) + 8 * page, 16 * page, 0));
  check_region(r);
  kvcached_shutdown(ctx);
}

/* A program that locks its memory (llama-server --mlock) must still be able to give pages back. */
static void test_locked_pages(void) {
  const size_t page = 4096;
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  kvcached_region_t r;
  CHECK_OK(kvcached_reserve(ctx, 8 * page, &r));
  CHECK_OK(kvcached_ensure(r, 0, 8 * page));
  if (mlock(kvcached_region_base(r), 8 * page) != 0) {
    SKIP("test_locked_pages", "memory cannot be locked here");
  } else {
    CHECK_OK(kvcached_release(r, 2 * page, 4 * page));
    CHECK_OK(kvcached_trim(ctx, 0, NULL));
    check_region(r);
    CHECK_EQ(stats_of(ctx).mapped, 4 * page);
  }
  kvcached_shutdown(ctx);
}

int main(void) {
  RUN(test_small_pages_stay_small);
  RUN(test_mappings_merge);
  RUN(test_out_of_mappings);
  RUN(test_system_refuses);
  RUN(test_locked_pages);
  return 0;
}
