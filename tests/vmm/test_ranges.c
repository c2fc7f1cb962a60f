/* Look-ahead over several ranges at once: kvcached_prepare_ranges. */
#include "fault.h"
#include "support.h"

#include "context.h"

#include <sys/resource.h>

enum { TENSORS = 64, STRIDE = 4 }; /* pages from one tensor to the next */

static kvcached_ctx_t open_ahead(int lookahead, uint64_t limit) {
  kvcached_options_t o;
  test_options(&o);
  o.lookahead = lookahead;
  o.limit = limit;
  return open_with(&o);
}

static uint64_t ready(kvcached_ctx_t ctx) { return stats_of(ctx).ready; }

/* The second page of each tensor. */
static void next_pages(kvcached_range_t ranges[TENSORS]) {
  const size_t page = test_page();
  for (size_t i = 0; i < TENSORS; i++) ranges[i] = (kvcached_range_t){(i * STRIDE + 1) * page, page};
}

static char state_of(kvcached_region_t r, size_t i) {
  pthread_mutex_lock(&r->ctx->mutex);
  uint8_t state = r->pages.state[i];
  pthread_mutex_unlock(&r->ctx->mutex);
  return state == KVC_READY ? 'r' : state == KVC_ENSURED ? 'e' : state == KVC_UNMAPPED ? '.' : '?';
}

TEST(ranges, in_the_background) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_ahead(KVCACHED_LOOKAHEAD_THREAD, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, TENSORS * STRIDE * page);
  kvcached_range_t ranges[TENSORS];
  next_pages(ranges);
  CHECK_OK(kvcached_prepare_ranges(r, ranges, TENSORS));
  memset(ranges, 0xee, sizeof(ranges)); /* they were copied */
  WAIT_FOR(ready(ctx) == TENSORS * page);
  for (size_t i = 0; i < TENSORS * STRIDE; i++) CHECK_EQ(state_of(r, i), i % STRIDE == 1 ? 'r' : '.');
  check_context(ctx);
  uint64_t calls = stats_of(ctx).device_calls;
  next_pages(ranges);
  CHECK_OK(kvcached_prepare_ranges(r, ranges, TENSORS)); /* all are there: nothing is asked for */
  for (size_t i = 0; i < TENSORS; i++) CHECK_OK(kvcached_ensure(r, ranges[i].off, page));
  CHECK_EQ(stats_of(ctx).device_calls, calls);
  CHECK_EQ(stats_of(ctx).ensures, TENSORS);
  CHECK(holds(r, page, 0, page) && holds(r, ((TENSORS - 1) * STRIDE + 1) * page, 0, page));
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* The first ones first: as far as the room goes. Ranges may overlap, be empty, and go backwards. */
static void in_their_order(int lookahead) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_ahead(lookahead, 6 * page);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 64 * page);
  const kvcached_range_t ranges[] = {{40 * page, 2 * page}, {41 * page, page},    {0, 0},
                                     {64 * page, 0},        {3 * page, 1},        {10 * page - 1, 2},
                                     {20 * page, page},     {50 * page, 2 * page}};
  CHECK_OK(kvcached_prepare_ranges(r, ranges, sizeof(ranges) / sizeof(*ranges)));
  WAIT_FOR(ready(ctx) == 6 * page);
  check_context(ctx); /* waits until it is done */
  for (size_t i = 0; i < 64; i++)
    CHECK_EQ(state_of(r, i), i == 40 || i == 41 || i == 3 || i == 9 || i == 10 || i == 20 ? 'r' : '.');
  CHECK_EQ(stats_of(ctx).limit_failures, 0);
  kvcached_shutdown(ctx);
}
TEST(ranges, in_their_order) {
  in_their_order(KVCACHED_LOOKAHEAD_THREAD);
  in_their_order(KVCACHED_LOOKAHEAD_INLINE);
}

TEST(ranges, eight_pages_a_call_in_all) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_ahead(KVCACHED_LOOKAHEAD_INLINE, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, TENSORS * STRIDE * page);
  kvcached_range_t ranges[TENSORS];
  next_pages(ranges);
  for (size_t call = 1; call <= TENSORS / 8; call++) {
    CHECK_OK(kvcached_prepare_ranges(r, ranges, TENSORS));
    CHECK_EQ(ready(ctx), 8 * call * page);
    CHECK_EQ(state_of(r, (8 * call - 1) * STRIDE + 1), 'r');
  }
  uint64_t calls = stats_of(ctx).device_calls;
  CHECK_OK(kvcached_prepare_ranges(r, ranges, TENSORS));
  CHECK_EQ(stats_of(ctx).device_calls, calls);
  check_context(ctx);
  kvcached_unreserve(r);
  r = reserve(ctx, KVCACHED_SCRATCH, 3 * test_large_page()); /* large pages: one a call */
  const kvcached_range_t large[] = {{0, 1}, {2 * test_large_page(), 1}};
  CHECK_OK(kvcached_prepare_ranges(r, large, 2));
  CHECK_EQ(ready(ctx), test_large_page());
  CHECK_OK(kvcached_prepare_ranges(r, large, 2));
  CHECK_EQ(ready(ctx), 2 * test_large_page());
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* A request replaces the one before, whichever function made it; none forgets it. */
TEST(ranges, replace) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_ahead(KVCACHED_LOOKAHEAD_THREAD, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, TENSORS * STRIDE * page);
  kvcached_range_t ranges[TENSORS];
  next_pages(ranges);
  fault_delay(FAULT_MAP, 20);
  CHECK_OK(kvcached_prepare_ranges(r, ranges, TENSORS));
  WAIT_FOR(stats_of(ctx).mapped > 0);
  CHECK_OK(kvcached_prepare_ranges(r, NULL, 0));
  fault_clear();
  check_context(ctx);
  CHECK_LE(ready(ctx), 16 * page); /* what had been begun */
  CHECK_OK(kvcached_trim(ctx, 0, NULL));

  fault_delay(FAULT_MAP, 20);
  CHECK_OK(kvcached_prepare_ranges(r, ranges, TENSORS));
  CHECK_OK(kvcached_prepare(r, 100 * page, page));
  CHECK_OK(kvcached_prepare_ranges(r, &ranges[50], 2));
  fault_clear();
  check_context(ctx);
  CHECK_EQ(state_of(r, 50 * STRIDE + 1), 'r');
  CHECK_EQ(state_of(r, 51 * STRIDE + 1), 'r');
  CHECK_LE(ready(ctx), 19 * page);

  CHECK_OK(kvcached_ensure(r, 0, page));
  CHECK_OK(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 1000, NULL));
  CHECK_OK(kvcached_prepare_ranges(r, ranges, TENSORS)); /* nothing is mapped ahead for a sleeper */
  sleep_ms(30);
  CHECK_EQ(stats_of(ctx).mapped, 0);
  CHECK_OK(kvcached_wake(ctx, KVCACHED_ALL_KINDS));
  CHECK_OK(kvcached_prepare_ranges(r, ranges, TENSORS));
  kvcached_unreserve(r); /* with much to do */
  check_context(ctx);
  kvcached_shutdown(ctx);
}

TEST(ranges, arguments) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_ahead(KVCACHED_LOOKAHEAD_INLINE, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 16 * page);
  kvcached_range_t ranges[3] = {{0, page}, {15 * page, page + 1}, {4 * page, page}};
  CHECK_IS(kvcached_prepare_ranges(NULL, ranges, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_prepare_ranges(NULL, NULL, 0), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_prepare_ranges(r, NULL, 1), KVCACHED_E_INVAL);
  CHECK_DETAIL("ranges");
  CHECK_IS(kvcached_prepare_ranges(r, ranges, 3), KVCACHED_E_INVAL); /* the second: none is worked off */
  ranges[1] = (kvcached_range_t){SIZE_MAX, 2};
  CHECK_IS(kvcached_prepare_ranges(r, ranges, 3), KVCACHED_E_INVAL);
  CHECK_EQ(stats_of(ctx).mapped, 0);
  CHECK_OK(kvcached_prepare_ranges(r, NULL, 0));
  kvcached_shutdown(ctx);
  ctx = open_ahead(KVCACHED_LOOKAHEAD_OFF, UINT64_MAX);
  r = reserve(ctx, KVCACHED_KV, 16 * page);
  CHECK_IS(kvcached_prepare_ranges(r, ranges, 3), KVCACHED_E_INVAL);
  CHECK_OK(kvcached_prepare_ranges(r, ranges, 1));
  CHECK_EQ(stats_of(ctx).mapped, 0);
  kvcached_shutdown(ctx);
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) /* their malloc does not fail */
/* No memory for the copy: the request before holds. */
TEST_HOST(ranges, no_memory_for_the_copy) {
  enum { MANY = 4 << 20 };
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_ahead(KVCACHED_LOOKAHEAD_THREAD, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 64 * page);
  kvcached_range_t *many = calloc(MANY, sizeof(*many));
  CHECK(many != NULL);
  for (size_t i = 0; i < MANY; i++) many[i].len = page;
  CHECK_OK(kvcached_prepare(r, 60 * page, page)); /* the helper runs */
  WAIT_FOR(ready(ctx) == page);
  pthread_mutex_lock(&ctx->mutex); /* a request that is not worked off yet */
  r->ahead = (kvc_ahead){.first = 8, .end = 12};
  pthread_mutex_unlock(&ctx->mutex);
  struct rlimit old, none;
  CHECK(getrlimit(RLIMIT_DATA, &old) == 0);
  none = old;
  none.rlim_cur = 1;
  CHECK(setrlimit(RLIMIT_DATA, &none) == 0);
  int err = kvcached_prepare_ranges(r, many, MANY);
  CHECK(setrlimit(RLIMIT_DATA, &old) == 0);
  CHECK_IS(err, KVCACHED_E_NOMEM);
  CHECK_DETAIL("4194304 ranges");
  CHECK(r->ahead.first == 8 && r->ahead.end == 12);
  CHECK_OK(kvcached_prepare_ranges(r, many, MANY));
  WAIT_FOR(ready(ctx) == 2 * page);
  check_context(ctx);
  free(many);
  kvcached_shutdown(ctx);
}
#endif
