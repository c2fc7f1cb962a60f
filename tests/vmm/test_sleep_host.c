/* The host memory behind sleep: when it is had, what it holds, its budget, and what is done without it. */
#include "context.h"
#include "fault.h"
#include "sleep_kit.h"

#include <stdatomic.h>

/* ---- host memory ---- */

TEST(sleep, prepared_ahead) {
  scene s = set_up_in("ahead");
  CHECK_OK(kvcached_prepare_sleep(s.ctx, KVCACHED_ALL_KINDS));
  const size_t weights = 2 * s.large + s.page;
  WAIT_FOR(stats_of(s.ctx).host_bytes == 10 * s.page + weights && has_copy(s.weights));
  CHECK_EQ(asleep(s.ctx), 0);
  CHECK(kv_is_there(&s) && weights_are_there(&s));
  check_context(s.ctx);
  unsigned reads = fault_calls(FAULT_READ), allocs = fault_calls(FAULT_HOST_ALLOC);
  go_to_sleep(s.ctx, WEIGHTS | SCRATCH);
  CHECK_EQ(fault_calls(FAULT_READ), reads); /* the copy of the weights is there */
  go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
  CHECK_EQ(fault_calls(FAULT_HOST_ALLOC), allocs); /* and the memory for the rest */
  enter_and_leave(s.ctx);
  CHECK(kv_is_there(&s) && weights_are_there(&s));
  check_context(s.ctx);
  kvcached_shutdown(s.ctx);
}

/* Pinning memory holds the driver: nothing of it is done while somebody is inside. */
TEST(sleep, prepared_while_nobody_works) {
  scene s = set_up_in("quiet");
  const unsigned allocs = fault_calls(FAULT_HOST_ALLOC);
  CHECK_OK(kvcached_enter(s.ctx));
  CHECK_OK(kvcached_prepare_sleep(s.ctx, KVCACHED_ALL_KINDS));
  sleep_ms(350);
  CHECK_EQ(fault_calls(FAULT_HOST_ALLOC), allocs);
  CHECK_EQ(stats_of(s.ctx).host_bytes, 0);
  CHECK_OK(kvcached_leave(s.ctx));
  WAIT_FOR(has_copy(s.weights));
  CHECK(fault_calls(FAULT_HOST_ALLOC) > allocs);
  check_context(s.ctx);
  kvcached_shutdown(s.ctx);
}

/* Copies are made ahead only of content that was complete when that was asked for. */
TEST(sleep, prepared_before_and_made_after) {
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  const size_t large = test_large_page();
  kvcached_region_t a = reserve(ctx, KVCACHED_WEIGHTS, 3 * large);
  fill(a, 2, 1);
  fault_delay(FAULT_READ, 30); /* the helper takes its time */
  CHECK_OK(kvcached_prepare_sleep(ctx, WEIGHTS));
  kvcached_region_t b = reserve(ctx, KVCACHED_WEIGHTS, 2 * large); /* a second model is being loaded */
  CHECK_OK(kvcached_ensure(b, 0, 2 * large));
  CHECK_OK(kvcached_ensure(a, 2 * large, large)); /* and the first one grows */
  sleep_ms(150);
  fault_clear();
  CHECK(!has_copy(a) && !has_copy(b));
  put_ends(b, 0, 70); /* by its own means: a kernel, a copy of another library */
  put_ends(b, 1, 71);
  put_ends(a, 2, 3);
  CHECK_OK(kvcached_prepare_sleep(ctx, WEIGHTS));
  WAIT_FOR(has_copy(a) && has_copy(b));
  go_to_sleep(ctx, WEIGHTS);
  enter_and_leave(ctx);
  CHECK(filled(a, 3, 1) && filled(b, 2, 70));
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* By the library's own means, which drop the copy of WEIGHTS. */
static void write_again(kvcached_region_t r, size_t n, int tag) {
  unsigned char ends[64];
  const size_t unit = kvcached_region_page_size(r), size = kvcached_region_size(r);
  for (size_t i = 0; i < n; i++) {
    memset(ends, tag + (int)i, sizeof(ends));
    CHECK_OK(kvcached_write(r, i * unit, ends, sizeof(ends)));
    CHECK_OK(kvcached_write(r, (i + 1) * unit < size ? (i + 1) * unit - 64 : size - 64, ends, sizeof(ends)));
  }
}

/* What is prepared and what happens meanwhile. */
TEST(sleep, preparing_meets_the_other_calls) {
  kvcached_ctx_t ctx = open_in(scratch("meets"), "g", UINT64_MAX);
  const size_t large = test_large_page(), page = test_page();
  uint32_t seed = first_seed(3);
  for (unsigned i = 0; i < rounds(on_host() ? 40 : 12); i++) {
    kvcached_region_t w = reserve(ctx, KVCACHED_WEIGHTS, 4 * large + page);
    int tag = 1 + (int)(i % 200);
    fill(w, 5, tag);
    CHECK_OK(kvcached_prepare_sleep(ctx, WEIGHTS));
    for (unsigned spin = next_random(&seed) % 20000; spin > 0; spin--)
      atomic_signal_fence(memory_order_seq_cst);
    switch (next_random(&seed) % 5) {
      case 0: go_to_sleep(ctx, KVCACHED_ALL_KINDS); break;
      case 1: write_again(w, 5, ++tag); break;
      case 2: CHECK_OK(kvcached_trim_host(ctx, 1, NULL)); break;
      case 3: CHECK_OK(kvcached_trim(ctx, 0, NULL)); break;
      default: break;
    }
    if (next_random(&seed) % 2) go_to_sleep(ctx, WEIGHTS);
    enter_and_leave(ctx);
    CHECK(filled(w, 5, tag));
    kvcached_unreserve(w);
  }
  check_context(ctx);
  CHECK_EQ(stats_of(ctx).host_bytes, 0);
  kvcached_shutdown(ctx);
}

TEST(sleep, host_memory_goes_back) {
  scene s = set_up_in("host");
  const size_t weights = 2 * s.large + s.page;
  size_t freed;
  go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
  CHECK_OK(kvcached_trim_host(s.ctx, 1, &freed)); /* all of it is needed */
  CHECK_EQ(freed, 0);
  enter_and_leave(s.ctx);
  CHECK_EQ(stats_of(s.ctx).host_bytes, 10 * s.page + weights); /* kept for the next time */
  CHECK_OK(kvcached_trim_host(s.ctx, 0, &freed));
  CHECK_EQ(freed, 10 * s.page);
  CHECK_EQ(stats_of(s.ctx).host_bytes, weights);
  check_context(s.ctx);
  CHECK_OK(kvcached_trim_host(s.ctx, 1, &freed));
  CHECK_EQ(freed, weights);
  CHECK_EQ(stats_of(s.ctx).host_bytes, 0);
  CHECK_OK(kvcached_trim_host(s.ctx, 1, NULL));
  go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
  CHECK_EQ(stats_of(s.ctx).host_bytes, 10 * s.page + weights);
  enter_and_leave(s.ctx);
  CHECK(kv_is_there(&s) && weights_are_there(&s));
  kvcached_unreserve(s.weights);
  CHECK_EQ(stats_of(s.ctx).host_bytes, 10 * s.page);
  check_context(s.ctx);
  kvcached_shutdown(s.ctx);
}

TEST(sleep, beyond_the_host_budget) {
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = scratch("budget");
  o.group = "g";
  o.host_limit = 6 * test_page();
  kvcached_ctx_t ctx = open_with(&o);
  const size_t page = test_page();
  kvcached_region_t a = reserve(ctx, KVCACHED_KV, 8 * page), b = reserve(ctx, KVCACHED_KV, 8 * page);
  fill(a, 4, 1);
  fill(b, 3, 50);
  size_t freed = 1;
  CHECK_IS(kvcached_sleep(ctx, KV, 1000, &freed), KVCACHED_E_HOST_LIMIT); /* all or none */
  CHECK_EQ(freed, 0);
  CHECK_EQ(asleep(ctx), 0);
  CHECK_EQ(stats_of(ctx).mapped, 7 * page);
  CHECK_EQ(stats_of(ctx).host_limit, 6 * page);
  CHECK(filled(a, 4, 1) && filled(b, 3, 50));
  check_context(ctx);
  CHECK_OK(kvcached_release(b, 2 * page, page));
  go_to_sleep(ctx, KV); /* now it fits, to the byte */
  CHECK_EQ(stats_of(ctx).host_bytes, 6 * page);

  kvcached_ctx_t other = open_with(&o); /* the group has one budget */
  kvcached_region_t c = reserve(other, KVCACHED_KV, 8 * page);
  fill(c, 1, 7);
  CHECK_IS(kvcached_sleep(other, KV, 1000, NULL), KVCACHED_E_HOST_LIMIT);
  CHECK(filled(c, 1, 7));
  check_context(other);
  enter_and_leave(ctx);
  CHECK(filled(a, 4, 1) && filled(b, 2, 50));
  CHECK_OK(kvcached_trim_host(ctx, 0, NULL));
  go_to_sleep(other, KV);
  CHECK_IS(kvcached_sleep(ctx, KV, 1000, NULL), KVCACHED_E_HOST_LIMIT);
  kvcached_shutdown(other);
  go_to_sleep(ctx, KV);
  enter_and_leave(ctx);
  CHECK(filled(a, 4, 1) && filled(b, 2, 50));
  kvcached_shutdown(ctx);
}

/* ---- reload functions ---- */

typedef struct source {
  kvcached_region_t region;
  size_t pages;
  int tag, calls, result;
} source;

static int restore(kvcached_region_t region, void *user) {
  source *s = user;
  s->calls++;
  CHECK(region == s->region);
  if (s->result) return s->result;
  const size_t unit = kvcached_region_page_size(region), size = kvcached_region_size(region);
  unsigned char *buf = malloc(unit);
  CHECK(buf != NULL);
  for (size_t i = 0; i < s->pages; i++) {
    size_t n = size - i * unit < unit ? size - i * unit : unit;
    memset(buf, s->tag + (int)i, n);
    CHECK_OK(kvcached_write(region, i * unit, buf, n));
  }
  free(buf);
  return 0;
}

TEST(sleep, reload_beyond_the_host_budget) {
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = scratch("reload");
  o.group = "g";
  o.host_limit = 11 * test_page(); /* for KV, not for the weights */
  scene s = set_up(&o);
  CHECK_IS(kvcached_sleep(s.ctx, KVCACHED_ALL_KINDS, 0, NULL), KVCACHED_E_HOST_LIMIT);
  source from = {s.weights, 3, 60, 0, 0};
  CHECK_IS(kvcached_set_reload(s.kv, restore, &from), KVCACHED_E_INVAL); /* for WEIGHTS alone */
  CHECK_OK(kvcached_set_reload(s.weights, restore, &from));
  go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
  CHECK_EQ(stats_of(s.ctx).host_bytes, 10 * s.page);
  CHECK_EQ(stats_of(s.ctx).mapped, 0);
  enter_and_leave(s.ctx);
  CHECK_EQ(from.calls, 1);
  CHECK(kv_is_there(&s) && weights_are_there(&s));
  check_context(s.ctx);

  go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
  from.result = 5; /* it fails: what it is for sleeps on, and may be tried again */
  CHECK_IS(kvcached_enter(s.ctx), KVCACHED_E_RELOAD);
  CHECK_IS(kvcached_leave(s.ctx), KVCACHED_E_INVAL); /* not inside */
  CHECK_EQ(region_stats_of(s.weights).asleep, 2 * s.large + s.page);
  CHECK_EQ(region_stats_of(s.weights).mapped, 0);
  check_context(s.ctx);
  unsigned char byte;
  CHECK_IS(kvcached_read(s.weights, 0, &byte, 1), KVCACHED_E_RELOAD);
  CHECK_IS(kvcached_wake(s.ctx, WEIGHTS), KVCACHED_E_RELOAD);
  CHECK_EQ(from.calls, 4);
  CHECK_OK(kvcached_read(s.kv, 0, &byte, 1)); /* others are not kept from waking */
  from.result = 0;
  from.tag = 33;
  CHECK_OK(kvcached_wake(s.ctx, KVCACHED_ALL_KINDS));
  CHECK(kv_is_there(&s) && filled(s.weights, 3, 33));
  check_context(s.ctx);
  CHECK_OK(kvcached_set_reload(s.weights, NULL, NULL));
  CHECK_IS(kvcached_sleep(s.ctx, KVCACHED_ALL_KINDS, 0, NULL), KVCACHED_E_HOST_LIMIT);
  kvcached_shutdown(s.ctx);
}

/* Where a copy fits it is used, reload function or not. */
TEST(sleep, a_copy_is_better_than_reload) {
  scene s = set_up_in("copy");
  source from = {s.weights, 3, 1, 0, 0};
  CHECK_OK(kvcached_set_reload(s.weights, restore, &from));
  go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
  enter_and_leave(s.ctx);
  CHECK_EQ(from.calls, 0);
  CHECK(weights_are_there(&s));
  kvcached_shutdown(s.ctx);
}
