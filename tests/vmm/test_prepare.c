/* Look-ahead: pages made ready before they are asked for, in the background or a few a call. */
#include "fault.h"
#include "support.h"

#include <stdatomic.h>

static kvcached_ctx_t open_ahead(int lookahead, uint64_t limit, const char *ledger) {
  kvcached_options_t o;
  test_options(&o);
  o.lookahead = lookahead;
  o.limit = limit;
  if (ledger) o.ledger_path = ledger;
  return open_with(&o);
}

static uint64_t ready(kvcached_ctx_t ctx) { return stats_of(ctx).ready; }

TEST(prepare, in_the_background) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_ahead(KVCACHED_LOOKAHEAD_THREAD, UINT64_MAX, scratch("thread"));
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 64 * page);
  CHECK_OK(kvcached_prepare(r, 3 * page + 1, 19 * page)); /* pages 3 to 22 */
  WAIT_FOR(ready(ctx) == 20 * page);
  kvcached_stats_t s = stats_of(ctx);
  CHECK_EQ(s.mapped, 20 * page);
  CHECK_EQ(s.idle, 20 * page);
  CHECK_EQ(s.group_charge, 20 * page);
  CHECK_EQ(s.ensures, 0);
  check_context(ctx);
  size_t run;
  int ensured;
  CHECK_OK(kvcached_mapped_run(r, 0, 64 * page, &run, &ensured));
  CHECK(!ensured && run == 64 * page);

  uint64_t calls = s.device_calls;
  CHECK_OK(kvcached_ensure(r, 3 * page, 12 * page)); /* no driver call at all */
  s = stats_of(ctx);
  CHECK_EQ(s.device_calls, calls);
  CHECK_EQ(s.ready, 8 * page);
  CHECK_EQ(s.idle, 8 * page);
  CHECK_EQ(s.ensures, 1);
  CHECK(holds(r, 3 * page, 0, 12 * page));
  put(r, 3 * page, 'p', 12 * page);
  CHECK_OK(kvcached_ensure(r, 0, 30 * page)); /* ready, ensured and absent ones together */
  CHECK(holds(r, 0, 0, 3 * page) && holds(r, 3 * page, 'p', 12 * page) && holds(r, 15 * page, 0, 15 * page));
  CHECK_EQ(ready(ctx), 0);
  check_context(ctx);
  kvcached_shutdown(ctx);
}

TEST(prepare, a_few_pages_a_call) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_ahead(KVCACHED_LOOKAHEAD_INLINE, UINT64_MAX, NULL);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 64 * page);
  uint64_t last = 0;
  for (int call = 0; call < 3; call++) {
    CHECK_OK(kvcached_prepare(r, 0, 20 * page));
    uint64_t now = ready(ctx);
    CHECK_LE(now, last + 8 * page);
    CHECK_LE(last + 1, now); /* each call gets on */
    last = now;
  }
  CHECK_EQ(last, 20 * page);
  CHECK_OK(kvcached_prepare(r, 0, 20 * page)); /* nothing left to do */
  uint64_t calls = stats_of(ctx).device_calls;
  CHECK_OK(kvcached_prepare(r, 0, 20 * page));
  CHECK_OK(kvcached_ensure(r, 0, 20 * page));
  CHECK_EQ(stats_of(ctx).device_calls, calls);
  CHECK(holds(r, 0, 0, 20 * page));
  check_context(ctx);
  kvcached_shutdown(ctx);
}

TEST(prepare, off) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_ahead(KVCACHED_LOOKAHEAD_OFF, UINT64_MAX, NULL);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 64 * page);
  CHECK_OK(kvcached_prepare(r, 0, 20 * page));
  sleep_ms(30);
  CHECK_EQ(stats_of(ctx).mapped, 0);
  CHECK_IS(kvcached_prepare(r, 0, 65 * page), KVCACHED_E_INVAL);
  kvcached_shutdown(ctx);
}

/* Only what is free is taken: nothing gives way for it, and it is no error. */
static void only_free_room(int lookahead, const char *ledger) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_ahead(lookahead, 10 * page, ledger);
  kvcached_region_t a = reserve(ctx, KVCACHED_KV, 16 * page), b = reserve(ctx, KVCACHED_KV, 16 * page);
  CHECK_OK(kvcached_ensure(a, 0, 8 * page));
  put(a, 0, 'a', 8 * page);
  CHECK_OK(kvcached_release(a, 4 * page, 4 * page)); /* idle: not to be taken */
  CHECK_OK(kvcached_prepare(b, 0, 8 * page));
  sleep_ms(60);
  CHECK_LE(stats_of(ctx).mapped, 10 * page);
  CHECK_EQ(region_stats_of(a).idle, 4 * page);
  CHECK_EQ(stats_of(ctx).limit_failures, 0);
  check_context(ctx);
  CHECK_OK(kvcached_ensure(b, 0, 6 * page)); /* an ensure may take them, the ready ones too */
  CHECK(holds(a, 0, 'a', 4 * page) && holds(b, 0, 0, 6 * page));
  check_context(ctx);
  kvcached_shutdown(ctx);
}

TEST(prepare, only_free_room) {
  only_free_room(KVCACHED_LOOKAHEAD_THREAD, NULL);
  only_free_room(KVCACHED_LOOKAHEAD_INLINE, NULL);
  only_free_room(KVCACHED_LOOKAHEAD_THREAD, scratch("room"));
}

/* Ready pages give way like idle ones: to an ensure elsewhere, to a trim, to a lowered limit. */
TEST(prepare, ready_gives_way) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_ahead(KVCACHED_LOOKAHEAD_THREAD, 12 * page, NULL);
  kvcached_region_t a = reserve(ctx, KVCACHED_KV, 16 * page), b = reserve(ctx, KVCACHED_KV, 16 * page);
  CHECK_OK(kvcached_prepare(a, 0, 8 * page));
  WAIT_FOR(ready(ctx) == 8 * page);
  CHECK_OK(kvcached_ensure(b, 0, 10 * page));
  kvcached_stats_t s = stats_of(ctx);
  CHECK_LE(s.mapped, 12 * page);
  CHECK_LE(s.ready, 2 * page);
  check_context(ctx);
  size_t freed;
  CHECK_OK(kvcached_trim(ctx, 0, &freed));
  CHECK_EQ(freed, s.ready);
  CHECK_EQ(stats_of(ctx).mapped, 10 * page);
  CHECK_OK(kvcached_prepare(a, 4 * page, 2 * page));
  WAIT_FOR(ready(ctx) == 2 * page);
  kvcached_set_limit(ctx, 10 * page);
  CHECK_EQ(ready(ctx), 0);
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* A new request replaces the one before; one of pages that are there does nothing. */
TEST(prepare, replaces) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_ahead(KVCACHED_LOOKAHEAD_INLINE, UINT64_MAX, NULL);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 64 * page);
  CHECK_OK(kvcached_ensure(r, 0, 8 * page));
  put(r, 0, 'x', 8 * page);
  CHECK_OK(kvcached_release(r, 6 * page, 2 * page));
  CHECK_OK(kvcached_prepare(r, 0, 40 * page));
  CHECK_OK(kvcached_prepare(r, 50 * page, 2 * page));
  CHECK_OK(kvcached_prepare(r, 0, 8 * page)); /* nothing is missing there */
  CHECK_EQ(ready(ctx), 10 * page);
  CHECK_EQ(stats_of(ctx).idle, 12 * page);
  CHECK(holds(r, 0, 'x', 6 * page));
  check_context(ctx);
  kvcached_unreserve(r);

  r = reserve(ctx, KVCACHED_WEIGHTS, 2 * test_large_page() + page); /* large pages: one a call */
  CHECK_OK(kvcached_prepare(r, 0, kvcached_region_size(r)));
  CHECK_EQ(ready(ctx), test_large_page());
  CHECK_OK(kvcached_prepare(r, 2 * test_large_page(), page));
  CHECK_EQ(ready(ctx), test_large_page() + page);
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* Every call that meets the helper at work on the same pages. */
TEST(prepare, meets_the_other_calls) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_ahead(KVCACHED_LOOKAHEAD_THREAD, 64 * page, scratch("meets"));
  uint32_t seed = first_seed(11);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 40 * page);
  for (unsigned i = 0; i < rounds(on_host() ? 150 : 40); i++) {
    size_t first = next_random(&seed) % 32, n = 1 + next_random(&seed) % 8;
    CHECK_OK(kvcached_prepare(r, first * page, n * page));
    for (unsigned spin = next_random(&seed) % 2000; spin > 0; spin--)
      atomic_signal_fence(memory_order_seq_cst);
    switch (next_random(&seed) % 6) {
      case 0:
      case 1:
        CHECK_OK(kvcached_ensure(r, first * page, n * page));
        CHECK(holds_ends(r, first, 0) && holds_ends(r, first + n - 1, 0));
        put_ends(r, first, 'm');
        CHECK_OK(kvcached_release(r, first * page, n * page));
        break;
      case 2: CHECK_OK(kvcached_release(r, first * page, n * page)); break;
      case 3: CHECK_OK(kvcached_trim(ctx, 0, NULL)); break;
      case 4: CHECK_OK(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 1000, NULL)); break;
      default: kvcached_unreserve(r); r = reserve(ctx, KVCACHED_KV, 40 * page);
    }
    kvcached_stats_t s = stats_of(ctx);
    CHECK_LE(s.ready, s.idle);
    CHECK_LE(s.idle, s.mapped);
  }
  CHECK_OK(kvcached_ensure(r, 0, 40 * page)); /* waits for it */
  CHECK_EQ(stats_of(ctx).idle, 0);
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* What the helper is in the middle of is room as well: for an ensure, and when the limit is lowered. */
TEST(prepare, what_is_being_made_gives_way) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_ahead(KVCACHED_LOOKAHEAD_THREAD, 10 * page, NULL);
  kvcached_region_t a = reserve(ctx, KVCACHED_KV, 16 * page), b = reserve(ctx, KVCACHED_KV, 16 * page);
  fault_delay(FAULT_MAP, 10);
  CHECK_OK(kvcached_prepare(a, 0, 8 * page));
  WAIT_FOR(stats_of(ctx).mapped > 0);
  CHECK_OK(kvcached_ensure(b, 0, 9 * page));
  CHECK_LE(stats_of(ctx).mapped, 10 * page);
  CHECK_OK(kvcached_release(b, 0, 16 * page));
  CHECK_OK(kvcached_trim(ctx, 0, NULL));
  CHECK_OK(kvcached_prepare(a, 0, 8 * page));
  WAIT_FOR(stats_of(ctx).mapped > 0);
  kvcached_set_limit(ctx, 0);
  CHECK_EQ(stats_of(ctx).mapped, 0);
  fault_clear();
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* A helper that waits, or has much to do, never delays the end. */
TEST(prepare, shutdown_does_not_wait) {
  const size_t page = test_page();
  int64_t start = now_ms();
  for (int i = 0; i < 10; i++) {
    kvcached_ctx_t ctx = open_ahead(KVCACHED_LOOKAHEAD_THREAD, UINT64_MAX, NULL);
    kvcached_region_t r = reserve(ctx, KVCACHED_KV, 128 * page);
    CHECK_OK(kvcached_prepare(r, 0, 128 * page));
    if (i % 2) sleep_ms(2);
    kvcached_shutdown(ctx);
  }
  CHECK_LE(now_ms() - start, 5000);
}
