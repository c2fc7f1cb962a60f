/* Memory that the system neither takes nor gives access to again: two refusals
   in a row. Its pages stay counted and claimed, none of them counts as usable,
   and their next use tries again. */
#include "fault.h"
#include "refuse.h"
#include "support.h"

#include "context.h"

#include <sys/mman.h>

static const size_t page_sizes[] = {4096, 2 * MIB};

/* From now on the first run that is to lose its memory cannot be discarded, and
   does not get its access back in `times` tries. */
static void refuse_both(kvcached_region_t r, unsigned times) {
  refuse_calls(REFUSE_DISCARD, kvcached_region_base(r), kvcached_region_size(r), 0, 1);
  refuse_calls(REFUSE_PROTECT, kvcached_region_base(r), kvcached_region_size(r), 1, times);
}
static void were_refused(unsigned times) {
  CHECK_EQ(refuse_end(REFUSE_DISCARD), 1);
  CHECK_EQ(refuse_end(REFUSE_PROTECT), times);
}

static char *page_at(kvcached_region_t r, size_t i) {
  return (char *)kvcached_region_base(r) + i * kvcached_region_page_size(r);
}

/* ---- trim ---- */

static void trim_refused(size_t page) {
  kvcached_ctx_t ctx = open_alone(page, 6 * page);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 8 * page);
  CHECK_OK(kvcached_ensure(r, 0, 6 * page));
  put(r, 0, 'x', 6 * page);
  CHECK_OK(kvcached_release(r, page, 3 * page));
  refuse_both(r, 1);
  size_t freed;
  CHECK_IS(kvcached_trim(ctx, 0, &freed), KVCACHED_E_SYSTEM);
  were_refused(1);
  CHECK_EQ(freed, 0);
  CHECK(!accessible(page_at(r, 1)) && !accessible(page_at(r, 3)));
  CHECK(accessible(page_at(r, 0)) && accessible(page_at(r, 4)));
  CHECK_EQ(stats_of(ctx).mapped, 6 * page);
  CHECK_EQ(stats_of(ctx).idle, 3 * page);
  check_context(ctx);
  /* Their next use is refused too: it fails as a whole. */
  refuse_calls(REFUSE_PROTECT, page_at(r, 0), 8 * page, 0, 1);
  CHECK_IS(kvcached_ensure(r, 0, 4 * page), KVCACHED_E_NOMEM);
  CHECK_EQ(refuse_end(REFUSE_PROTECT), 1);
  CHECK_EQ(stats_of(ctx).idle, 3 * page);
  check_context(ctx);
  /* And the one after it works, at the limit: their claim is there. */
  CHECK_OK(kvcached_ensure(r, page, 2 * page));
  CHECK(holds(r, page, 0, 2 * page));
  CHECK(holds(r, 0, 'x', page) && holds(r, 4 * page, 'x', 2 * page));
  put(r, page, 'y', 2 * page);
  /* What is not used again goes with the next trim. */
  CHECK_OK(kvcached_trim(ctx, 0, &freed));
  CHECK_EQ(freed, page);
  check_context(ctx);
  CHECK_OK(kvcached_ensure(r, 3 * page, page));
  CHECK(holds(r, 3 * page, 0, page));
  kvcached_shutdown(ctx);
}
TEST_HOST(refused, trim) {
  for (int i = 0; i < 2; i++) trim_refused(page_sizes[i]);
}

/* Pages made ready lose that, the zeros in them may be gone. */
static void ready_refused(size_t page) {
  kvcached_options_t o;
  test_options(&o);
  o.page_size = page;
  o.large_page = page;
  o.lookahead = KVCACHED_LOOKAHEAD_INLINE;
  kvcached_ctx_t ctx = open_with(&o);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 8 * page);
  CHECK_OK(kvcached_prepare(r, 0, 2 * page));
  CHECK_EQ(stats_of(ctx).ready, 2 * page);
  refuse_calls(REFUSE_DISCARD, page_at(r, 0), 2 * page, 0, 2); /* idle after the first, and tried as such */
  refuse_calls(REFUSE_PROTECT, page_at(r, 0), 2 * page, 1, 1);
  CHECK_IS(kvcached_trim(ctx, 0, NULL), KVCACHED_E_SYSTEM);
  CHECK_EQ(refuse_end(REFUSE_DISCARD), 2);
  CHECK_EQ(refuse_end(REFUSE_PROTECT), 1);
  CHECK_EQ(stats_of(ctx).ready, 0);
  CHECK_EQ(stats_of(ctx).idle, 2 * page);
  check_context(ctx);
  CHECK_OK(kvcached_ensure(r, 0, 2 * page));
  CHECK(holds(r, 0, 0, 2 * page));
  kvcached_shutdown(ctx);
}
TEST_HOST(refused, trim_of_ready_pages) {
  for (int i = 0; i < 2; i++) ready_refused(page_sizes[i]);
}

/* Access is taken in parts where a run is several mappings, and may be refused
 * half way. */
TEST_HOST(refused, half_of_a_run) {
  const size_t page = 4096;
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 8 * page);
  CHECK_OK(kvcached_ensure(r, 0, 8 * page));
  CHECK_OK(kvcached_release(r, 0, 8 * page));
  CHECK(mprotect(page_at(r, 0), 4 * page, PROT_NONE) == 0); /* what a refusal half way leaves */
  refuse_calls(REFUSE_PROTECT, page_at(r, 0), 8 * page, 0, 2);
  CHECK_IS(kvcached_trim(ctx, 0, NULL), KVCACHED_E_NOMEM);
  CHECK_EQ(refuse_end(REFUSE_PROTECT), 2);
  CHECK_OK(kvcached_ensure(r, 0, 8 * page));
  CHECK(holds(r, 0, 0, 8 * page));
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* ---- sleep ---- */

/* The undo of the sleep finds access refused `times` times in all; from two on
 * it fails, and they sleep. */
static void sleep_refused(size_t page, unsigned times) {
  kvcached_options_t o;
  test_options(&o);
  o.page_size = page;
  o.large_page = page;
  o.limit = 6 * page; /* all of it is in use: nothing can be claimed twice */
  kvcached_ctx_t ctx = open_with(&o);
  kvcached_region_t kv = reserve(ctx, KVCACHED_KV, 8 * page);
  kvcached_region_t weights = reserve(ctx, KVCACHED_WEIGHTS, 2 * page);
  CHECK_OK(kvcached_ensure(kv, 2 * page, 4 * page));
  CHECK_OK(kvcached_ensure(weights, 0, 2 * page));
  put(kv, 2 * page, 'k', 4 * page);
  put(weights, 0, 'w', 2 * page);
  refuse_both(kv, times);
  size_t freed;
  CHECK_IS(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 1000, &freed), KVCACHED_E_SYSTEM);
  were_refused(times);
  /* They have memory, so that they count as mapped, but sleep. */
  CHECK_EQ(kv->pages.count[KVC_ASLEEP], times == 1 ? 0 : 4);
  CHECK_EQ(stats_of(ctx).mapped, 6 * page);
  CHECK_EQ(stats_of(ctx).sleeps, 0);
  check_context(ctx);
  CHECK_OK(kvcached_enter(ctx));
  CHECK_EQ(kv->pages.count[KVC_ASLEEP], 0);
  CHECK(holds(kv, 2 * page, 'k', 4 * page));
  CHECK(holds(weights, 0, 'w', 2 * page));
  CHECK_OK(kvcached_leave(ctx));
  check_context(ctx);
  CHECK_OK(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 1000, &freed));
  CHECK_EQ(freed, 6 * page);
  CHECK_OK(kvcached_wake(ctx, KVCACHED_ALL_KINDS));
  CHECK(holds(kv, 2 * page, 'k', 4 * page));
  check_context(ctx);
  kvcached_shutdown(ctx);
}
TEST_HOST(refused, sleep) {
  for (int i = 0; i < 2; i++)
    for (unsigned times = 1; times < 3; times++) sleep_refused(page_sizes[i], times);
}

/* ---- write, unreserve ---- */

/* The pages of a write that fails are to be unmapped again. */
static void write_refused(size_t page) {
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 8 * page);
  CHECK_OK(kvcached_ensure(r, 0, page)); /* their run is not the first one of the region */
  fault_set(FAULT_WRITE, 1, KVCACHED_E_DEVICE);
  refuse_calls(REFUSE_DISCARD, page_at(r, 2), 2 * page, 0, 1);
  refuse_calls(REFUSE_PROTECT, page_at(r, 2), 2 * page, 2, 1); /* mapped, taken, given back */
  CHECK_IS(kvcached_write(r, 2 * page, "content", 8), KVCACHED_E_DEVICE);
  were_refused(1);
  fault_clear();
  CHECK_EQ(stats_of(ctx).idle, page);
  CHECK(!accessible(page_at(r, 2)));
  check_context(ctx);
  CHECK_OK(kvcached_ensure(r, 2 * page, page));
  CHECK(holds(r, 2 * page, 0, page));
  check_context(ctx);
  kvcached_shutdown(ctx);
}
TEST_HOST(refused, write) {
  for (int i = 0; i < 2; i++) write_refused(page_sizes[i]);
}

/* A region that ends keeps its memory, counted, until a later trim has it. */
static void unreserve_refused(size_t page) {
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 8 * page);
  CHECK_OK(kvcached_ensure(r, 0, 4 * page));
  const void *base = page_at(r, 0);
  refuse_calls(REFUSE_DISCARD, base, 8 * page, 0, 5); /* the run, then each of its pages */
  refuse_calls(REFUSE_PROTECT, base, 8 * page, 1, 1);
  kvcached_unreserve(r);
  CHECK_EQ(refuse_end(REFUSE_DISCARD), 5);
  CHECK_EQ(refuse_end(REFUSE_PROTECT), 1);
  CHECK_EQ(stats_of(ctx).idle, 4 * page);
  check_context(ctx);
  size_t freed;
  CHECK_OK(kvcached_trim(ctx, 0, &freed));
  CHECK_EQ(freed, 4 * page);
  CHECK_EQ(stats_of(ctx).reserved, 0);
  kvcached_shutdown(ctx);
}
TEST_HOST(refused, unreserve) {
  for (int i = 0; i < 2; i++) unreserve_refused(page_sizes[i]);
}

/* ---- any backend: both calls fail, whatever they left ---- */

static int is_stuck(kvcached_region_t r, size_t i, uint8_t state) {
  return r->pages.stuck[i] && r->pages.state[i] == state;
}

TEST(refused, by_any_backend) {
  const size_t page = test_page();
  kvcached_options_t o;
  test_options(&o);
  o.large_page = page;
  o.pool_limit = 0;
  kvcached_ctx_t ctx = open_with(&o);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 8 * page);
  CHECK_OK(kvcached_ensure(r, 0, 4 * page));
  for (size_t i = 0; i < 4; i++) put_ends(r, i, 'a' + (int)i);
  CHECK_OK(kvcached_release(r, 3 * page, page));
  fault_set(FAULT_UNMAP, 1, KVCACHED_E_DEVICE);
  fault_set(FAULT_ACCESS, 1, KVCACHED_E_NOMEM);
  CHECK_IS(kvcached_trim(ctx, 0, NULL), KVCACHED_E_DEVICE);
  CHECK_DETAIL("injected failure of unmap");
  CHECK(is_stuck(r, 3, KVC_IDLE));
  fault_set(FAULT_UNMAP, 1, KVCACHED_E_DEVICE);
  fault_every(FAULT_ACCESS, 1, KVCACHED_E_NOMEM);
  CHECK_IS(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 1000, NULL), KVCACHED_E_DEVICE);
  CHECK_DETAIL("injected failure of unmap");
  for (size_t i = 0; i < 3; i++) CHECK(is_stuck(r, i, KVC_ASLEEP));
  CHECK(is_stuck(r, 3, KVC_IDLE));
  check_context(ctx);
  CHECK_IS(kvcached_enter(ctx), KVCACHED_E_NOMEM);
  check_context(ctx);
  fault_clear();
  CHECK_OK(kvcached_enter(ctx));
  for (size_t i = 0; i < 3; i++) CHECK(holds_ends(r, i, 'a' + (int)i));
  CHECK_OK(kvcached_ensure(r, 0, 4 * page));
  CHECK(holds_ends(r, 3, 0));
  CHECK_EQ(r->pages.n_stuck, 0);
  CHECK_OK(kvcached_leave(ctx));
  check_context(ctx);
  kvcached_shutdown(ctx);
}
