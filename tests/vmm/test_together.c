/* Several ranges made usable as one call: kvcached_ensure_ranges. */
#include "fault.h"
#include "support.h"

#include "context.h"

#include <sys/resource.h>

enum { TENSORS = 64, STRIDE = 4 }; /* pages from one tensor to the next */

static kvcached_ctx_t open_together(int lookahead, uint64_t limit) {
  kvcached_options_t o;
  test_options(&o);
  o.lookahead = lookahead;
  o.limit = limit;
  return open_with(&o);
}

/* A page of each tensor, the last tensor first. */
static void pages_of(kvcached_range_t ranges[TENSORS], size_t at) {
  const size_t page = test_page();
  for (size_t i = 0; i < TENSORS; i++)
    ranges[i] = (kvcached_range_t){((TENSORS - 1 - i) * STRIDE + at) * page, page};
}

static char state_of(kvcached_region_t r, size_t i) {
  static const char letters[] = ".ireabw"; /* in the order of the states */
  pthread_mutex_lock(&r->ctx->mutex);
  uint8_t state = r->pages.state[i];
  pthread_mutex_unlock(&r->ctx->mutex);
  return letters[state];
}

/* The states of the first pages, as letters. */
static void check_states(kvcached_region_t r, const char *expected) {
  char got[64] = "";
  size_t n = strlen(expected);
  CHECK(n < sizeof(got));
  for (size_t i = 0; i < n; i++) got[i] = state_of(r, i);
  CHECK_TEXT(got, expected);
}

/* What it is for: as many calls as pages for memory, and one wait for all. */
TEST(together, one_wait_for_all) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_together(KVCACHED_LOOKAHEAD_OFF, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, TENSORS * STRIDE * page);
  kvcached_range_t ranges[TENSORS];
  unsigned waits = fault_calls(FAULT_FINISH), zeros = fault_calls(FAULT_ZERO),
           made = fault_calls(FAULT_CREATE), opened = fault_calls(FAULT_ACCESS),
           rests = fault_calls(FAULT_QUIESCE);
  pages_of(ranges, 1);
  CHECK_OK(kvcached_ensure_ranges(r, ranges, TENSORS));
  CHECK_EQ(fault_calls(FAULT_CREATE) - made, TENSORS);
  CHECK_EQ(fault_calls(FAULT_ACCESS) - opened, TENSORS);
  CHECK_EQ(fault_calls(FAULT_ZERO) - zeros, on_host() ? 0 : TENSORS);
  CHECK_EQ(fault_calls(FAULT_FINISH) - waits, on_host() ? 0 : 1);
  CHECK_LE(fault_calls(FAULT_QUIESCE) - rests, 1);
  CHECK_EQ(stats_of(ctx).ensures, 1);
  CHECK_EQ(stats_of(ctx).mapped, TENSORS * page);
  for (size_t i = 0; i < TENSORS * STRIDE; i++) CHECK_EQ(state_of(r, i), i % STRIDE == 1 ? 'e' : '.');
  for (size_t i = 0; i < TENSORS; i++) CHECK(holds_ends(r, i * STRIDE + 1, 0));
  check_context(ctx);
  /* All of them are mapped before the device is given work. */
  kvcached_region_t q = reserve(ctx, KVCACHED_KV, TENSORS * STRIDE * page);
  zeros = fault_calls(FAULT_ZERO);
  fault_set(FAULT_ACCESS, TENSORS, KVCACHED_E_DEVICE);
  CHECK_IS(kvcached_ensure_ranges(q, ranges, TENSORS), KVCACHED_E_DEVICE);
  CHECK_EQ(fault_calls(FAULT_ZERO), zeros);
  CHECK_EQ(stats_of(ctx).mapped + stats_of(ctx).pooled, TENSORS * page);
  kvcached_unreserve(q);
  /* Idle pages: no memory is made, and one wait again. */
  for (size_t i = 0; i < TENSORS; i++) put_ends(r, i * STRIDE + 1, 'x');
  for (size_t i = 0; i < TENSORS; i++) CHECK_OK(kvcached_release(r, ranges[i].off, page));
  waits = fault_calls(FAULT_FINISH), made = fault_calls(FAULT_CREATE);
  CHECK_OK(kvcached_ensure_ranges(r, ranges, TENSORS));
  CHECK_EQ(fault_calls(FAULT_CREATE), made);
  CHECK_EQ(fault_calls(FAULT_FINISH) - waits, 1);
  for (size_t i = 0; i < TENSORS; i++) CHECK(holds_ends(r, i * STRIDE + 1, 0));
  /* Nothing is missing: no call at all, and none is counted. */
  uint64_t calls = stats_of(ctx).device_calls;
  CHECK_OK(kvcached_ensure_ranges(r, ranges, TENSORS));
  CHECK_EQ(stats_of(ctx).device_calls, calls);
  CHECK_EQ(stats_of(ctx).ensures, 2);
  kvcached_shutdown(ctx);
}

/* In any order, overlapping, empty; ranges that meet are one run. */
TEST(together, any_ranges) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_together(KVCACHED_LOOKAHEAD_OFF, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 16 * page);
  const kvcached_range_t ranges[] = {{9 * page, 2 * page}, {16 * page, 0},    {0, 0},
                                     {3 * page - 1, 2},    {10 * page, page}, {8 * page, page},
                                     {13 * page, 1},       {2 * page, page}};
  unsigned opened = fault_calls(FAULT_ACCESS);
  CHECK_OK(kvcached_ensure(r, 13 * page, page));
  put(r, 13 * page, 'k', page);
  CHECK_OK(kvcached_ensure_ranges(r, ranges, sizeof(ranges) / sizeof(*ranges)));
  check_states(r, "..ee....eee..e..");
  CHECK_EQ(fault_calls(FAULT_ACCESS) - opened, 3);
  CHECK(holds(r, 13 * page, 'k', page)); /* what was in use keeps its content */
  CHECK(holds(r, 8 * page, 0, 3 * page));
  CHECK_EQ(stats_of(ctx).ensures, 2);
  check_context(ctx);
  /* Nothing asked for does nothing, and wakes nothing. */
  CHECK_OK(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 1000, NULL));
  CHECK_OK(kvcached_ensure_ranges(r, NULL, 0));
  CHECK_OK(kvcached_ensure_ranges(r, ranges + 1, 2));
  CHECK_EQ(stats_of(ctx).asleep, 6 * page);
  const kvcached_range_t two[] = {{15 * page, page}, {2 * page, page}};
  CHECK_OK(kvcached_ensure_ranges(r, two, 2)); /* and this wakes all of the region */
  CHECK_EQ(stats_of(ctx).asleep, 0);
  CHECK(holds(r, 13 * page, 'k', page) && holds(r, 15 * page, 0, page));
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* One page too many: none of them. */
TEST(together, all_or_none) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_together(KVCACHED_LOOKAHEAD_OFF, (TENSORS - 1) * page);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, TENSORS * STRIDE * page);
  kvcached_range_t ranges[TENSORS];
  pages_of(ranges, 0);
  uint64_t calls = stats_of(ctx).device_calls;
  CHECK_IS(kvcached_ensure_ranges(r, ranges, TENSORS), KVCACHED_E_LIMIT);
  CHECK_EQ(stats_of(ctx).mapped + stats_of(ctx).pooled, 0);
  CHECK_EQ(stats_of(ctx).limit_failures, 1);
  CHECK_EQ(stats_of(ctx).ensures, 0);
  CHECK_LE(stats_of(ctx).device_calls - calls, 1);
  check_context(ctx);
  CHECK_OK(kvcached_ensure_ranges(r, ranges, TENSORS - 1));
  check_context(ctx);
  CHECK_IS(kvcached_ensure_ranges(r, ranges, TENSORS), KVCACHED_E_LIMIT);
  CHECK_EQ(stats_of(ctx).mapped, (TENSORS - 1) * page);
  kvcached_set_limit(ctx, TENSORS * page);
  CHECK_OK(kvcached_ensure_ranges(r, ranges, TENSORS));
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* At the limit idle pages between the ranges give way, those inside are used
 * where they are. */
TEST(together, idle_pages_between) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_together(KVCACHED_LOOKAHEAD_OFF, 8 * page);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 16 * page);
  CHECK_OK(kvcached_ensure(r, 2 * page, 8 * page));
  put(r, 2 * page, 'k', 8 * page);
  CHECK_OK(kvcached_release(r, 3 * page, 6 * page));
  check_states(r, "..eiiiiiie......");
  /* Pages 3, 5 and 8 are idle and asked for; 4, 6 and 7 are what the four new
   * ones need, and one lacks. */
  const kvcached_range_t ranges[] = {{15 * page, page},     {3 * page, page}, {8 * page, page},
                                     {12 * page, 2 * page}, {5 * page, page}, {0, page}};
  CHECK_IS(kvcached_ensure_ranges(r, ranges, 6), KVCACHED_E_LIMIT);
  check_states(r, "..eiiiiiie......");
  CHECK_OK(kvcached_ensure_ranges(r, ranges, 5));
  check_states(r, "..ee.e..ee..ee.e");
  CHECK_EQ(stats_of(ctx).mapped + stats_of(ctx).pooled, 8 * page);
  CHECK(holds(r, 2 * page, 'k', page) && holds(r, 9 * page, 'k', page));
  CHECK(holds(r, 3 * page, 0, page) && holds(r, 5 * page, 0, page) && holds(r, 12 * page, 0, 2 * page));
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* The helper is at some of them. */
TEST(together, while_the_helper_works) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_together(KVCACHED_LOOKAHEAD_THREAD, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, TENSORS * STRIDE * page);
  kvcached_range_t ranges[TENSORS];
  fault_delay(FAULT_MAP, 2);
  for (size_t at = 0; at < STRIDE; at++) {
    pages_of(ranges, at);
    CHECK_OK(kvcached_prepare_ranges(r, ranges, TENSORS));
    if (at % 2) sleep_ms(5);
    CHECK_OK(kvcached_ensure_ranges(r, ranges, TENSORS));
    CHECK_EQ(stats_of(ctx).mapped, (at + 1) * TENSORS * page);
    CHECK_EQ(stats_of(ctx).idle, 0);
    for (size_t i = 0; i < TENSORS; i++) put_ends(r, i * STRIDE + at, 'a' + (int)at);
  }
  fault_clear();
  for (size_t i = 0; i < TENSORS * STRIDE; i++) CHECK(holds_ends(r, i, 'a' + (int)(i % STRIDE)));
  check_context(ctx);
  kvcached_shutdown(ctx);
}

TEST(together, arguments) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_together(KVCACHED_LOOKAHEAD_OFF, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 16 * page);
  kvcached_range_t ranges[3] = {{0, page}, {15 * page, page + 1}, {4 * page, page}};
  CHECK_IS(kvcached_ensure_ranges(NULL, ranges, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ensure_ranges(NULL, NULL, 0), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ensure_ranges(r, NULL, 1), KVCACHED_E_INVAL);
  CHECK_DETAIL("ranges");
  CHECK_IS(kvcached_ensure_ranges(r, ranges, 3), KVCACHED_E_INVAL);
  ranges[1] = (kvcached_range_t){SIZE_MAX, 2};
  CHECK_IS(kvcached_ensure_ranges(r, ranges, 3), KVCACHED_E_INVAL);
  CHECK_EQ(stats_of(ctx).mapped, 0);
  kvcached_shutdown(ctx);
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) /* their malloc does not fail */
TEST_HOST(together, no_memory_for_the_list) {
  enum { MANY = 4 << 20 };
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_together(KVCACHED_LOOKAHEAD_OFF, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 16 * page);
  kvcached_range_t *many = calloc(MANY, sizeof(*many));
  CHECK(many != NULL);
  for (size_t i = 0; i < MANY; i++) many[i] = (kvcached_range_t){i % 2 * 8 * page, page};
  struct rlimit old, none;
  CHECK(getrlimit(RLIMIT_DATA, &old) == 0);
  none = old;
  none.rlim_cur = 1;
  CHECK(setrlimit(RLIMIT_DATA, &none) == 0);
  int err = kvcached_ensure_ranges(r, many, MANY);
  CHECK(setrlimit(RLIMIT_DATA, &old) == 0);
  CHECK_IS(err, KVCACHED_E_NOMEM);
  CHECK_DETAIL("4194304 ranges");
  CHECK_EQ(stats_of(ctx).mapped, 0);
  CHECK_OK(kvcached_ensure_ranges(r, many, MANY));
  CHECK_EQ(stats_of(ctx).mapped, 2 * page);
  check_context(ctx);
  free(many);
  kvcached_shutdown(ctx);
}
#endif
