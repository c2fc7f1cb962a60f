/* Regions: states, content and limits, and that the system's own figures agree. */
#include "context.h"
#include "support.h"

static void expect_run(kvcached_region_t r, size_t off, size_t len, size_t run, int ensured) {
  size_t got_run;
  int got;
  CHECK_OK(kvcached_mapped_run(r, off, len, &got_run, &got));
  CHECK_EQ(got, ensured);
  CHECK_EQ(got_run, run);
}

static void states_of(size_t page) {
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  CHECK_EQ(kvcached_page_size(ctx), page);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 16 * page - 5); /* rounded up */
  char *base = kvcached_region_base(r);
  CHECK_EQ(kvcached_region_size(r), 16 * page);
  CHECK_EQ(kvcached_region_page_size(r), page);
  CHECK_EQ((uintptr_t)base % page, 0);
  check_context(ctx);
  if (on_host())
    CHECK(!accessible(base) && !accessible(base + 16 * page - 1) && !accessible(base + 16 * page));

  CHECK_OK(kvcached_ensure(r, 2 * page + 5, page)); /* touches pages 2 and 3 */
  check_context(ctx);
  CHECK_EQ(stats_of(ctx).mapped, 2 * page);
  CHECK(holds(r, 2 * page, 0, 2 * page));
  if (on_host()) CHECK(!accessible(base + 2 * page - 1) && !accessible(base + 4 * page));
  put(r, 2 * page, 'a', 2 * page);

  CHECK_OK(kvcached_ensure(r, 0, 6 * page)); /* ensured ones keep their content */
  CHECK(holds(r, 2 * page, 'a', 2 * page) && holds(r, 0, 0, 2 * page) && holds(r, 4 * page, 0, 2 * page));
  put(r, 0, 'b', 6 * page);
  check_context(ctx);

  CHECK_OK(kvcached_release(r, 1, 3 * page - 1)); /* whole pages inside: 1 and 2 */
  kvcached_stats_t s = stats_of(ctx);
  CHECK_EQ(s.mapped, 6 * page);
  CHECK_EQ(s.idle, 2 * page);
  check_context(ctx);
  expect_run(r, 7, 16 * page - 7, page - 7, 1);
  expect_run(r, page, 2 * page - 9, 2 * page - 9, 0);
  expect_run(r, 3 * page, 13 * page, 3 * page, 1);
  expect_run(r, 6 * page, 10 * page, 10 * page, 0);

  CHECK_OK(kvcached_ensure(r, page, page)); /* recycled: zero, the others untouched */
  CHECK(holds(r, 0, 'b', page) && holds(r, page, 0, page) && holds(r, 3 * page, 'b', 3 * page));
  CHECK_EQ(stats_of(ctx).idle, page);
  put(r, page, 'c', page);

  CHECK_OK(kvcached_release(r, 0, 16 * page));
  CHECK_OK(kvcached_release(r, 0, 16 * page)); /* again: nothing to do */
  CHECK_EQ(stats_of(ctx).idle, 6 * page);
  size_t freed = 77;
  CHECK_OK(kvcached_trim(ctx, 4 * page + 1, &freed));
  CHECK_EQ(freed, 2 * page);
  check_context(ctx);
  if (on_host()) CHECK(accessible(base + 3 * page) && !accessible(base + 4 * page)); /* highest first */
  CHECK_OK(kvcached_trim(ctx, 4 * page, &freed));
  CHECK_EQ(freed, 0);
  CHECK_OK(kvcached_trim(ctx, 0, NULL));
  CHECK_EQ(stats_of(ctx).mapped, 0);
  check_context(ctx);
  if (on_host()) CHECK(!accessible(base));

  CHECK_OK(kvcached_ensure(r, 0, 16 * page)); /* trimmed pages come back as zero */
  CHECK(holds(r, 0, 0, 16 * page));
  if (on_host()) CHECK_EQ(mappings(base, 16 * page), 1);
  check_context(ctx);
  s = stats_of(ctx);
  CHECK_EQ(s.reserved, 16 * page);
  CHECK_EQ(s.ensures, 4);
  CHECK_EQ(s.releases, 2);
  CHECK_EQ(s.trims, 2);
  CHECK_EQ(s.group_charge, s.mapped);
  kvcached_unreserve(r);
  s = stats_of(ctx);
  CHECK_EQ(s.reserved, 0);
  CHECK_EQ(s.mapped, 0);
  CHECK_EQ(s.group_charge, s.pooled);
  CHECK_EQ(s.ensures, 4);
  CHECK_OK(kvcached_trim(ctx, 0, NULL));
  CHECK_EQ(stats_of(ctx).group_charge, 0);
  check_context(ctx);
  if (on_host()) CHECK(!accessible(base));
  kvcached_shutdown(ctx);
}

TEST(region, states) { states_of(test_page()); }

TEST(region, trim_takes_the_newest_region_first) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  kvcached_region_t old = reserve(ctx, KVCACHED_KV, 4 * page), young = reserve(ctx, KVCACHED_KV, 4 * page);
  CHECK_OK(kvcached_ensure(old, 0, 4 * page));
  CHECK_OK(kvcached_ensure(young, 0, 4 * page));
  CHECK_OK(kvcached_release(old, 0, 4 * page));
  CHECK_OK(kvcached_release(young, page, 3 * page));
  CHECK_OK(kvcached_trim(ctx, 5 * page, NULL));
  CHECK_EQ(region_stats_of(young).idle, page);
  CHECK_EQ(region_stats_of(old).idle, 4 * page);
  CHECK_OK(kvcached_trim(ctx, 3 * page, NULL));
  CHECK_EQ(region_stats_of(young).mapped, page);
  CHECK_EQ(region_stats_of(old).idle, 3 * page);
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* WEIGHTS and SCRATCH: pages many times as large, the last one shorter; all of its rules are the same. */
static void large_pages_of(int kind) {
  const size_t page = test_page(), large = test_large_page();
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  kvcached_region_t small = reserve(ctx, kind, 3 * page);
  CHECK_EQ(kvcached_region_page_size(small), 3 * page); /* never larger than the region */
  kvcached_region_t r = reserve(ctx, kind, 2 * large + page);
  CHECK_EQ(kvcached_region_page_size(r), large);
  CHECK_EQ(kvcached_region_size(r), 2 * large + page);
  CHECK_EQ((uintptr_t)kvcached_region_base(r) % page, 0);
  CHECK_OK(kvcached_ensure(r, large - 1, 2));
  CHECK_EQ(region_stats_of(r).mapped, 2 * large);
  CHECK_EQ(region_stats_of(r).kind_mapped[kind], 2 * large);
  CHECK_EQ(region_stats_of(r).page_size, large);
  CHECK(holds(r, 0, 0, 2 * large));
  put(r, large, 'w', page);
  CHECK_OK(kvcached_ensure(r, 2 * large, 1)); /* the short tail */
  CHECK_EQ(region_stats_of(r).mapped, 2 * large + page);
  put(r, 2 * large, 't', page);
  CHECK(holds(r, large, 'w', page));
  check_context(ctx);
  CHECK_OK(kvcached_release(r, 0, large + page)); /* one whole page */
  CHECK_EQ(region_stats_of(r).idle, large);
  CHECK(holds(r, large, 'w', page) && holds(r, 2 * large, 't', page));
  CHECK_OK(kvcached_release(r, large + 1, large + page - 1)); /* the tail alone is whole in this */
  CHECK_EQ(region_stats_of(r).idle, large + page);
  CHECK_OK(kvcached_ensure(r, 0, 2 * large + page));
  CHECK(holds(r, large, 'w', page) && holds(r, 0, 0, large) && holds(r, 2 * large, 0, page));
  check_context(ctx);
  CHECK_OK(kvcached_release(r, 0, 2 * large + page));
  CHECK_OK(kvcached_trim(ctx, 0, NULL));
  CHECK_EQ(stats_of(ctx).mapped + stats_of(ctx).pooled, 0);
  check_context(ctx);
  kvcached_shutdown(ctx);
}

TEST(region, weights_pages) { large_pages_of(KVCACHED_WEIGHTS); }
TEST(region, scratch_pages) { large_pages_of(KVCACHED_SCRATCH); }

/* Regions side by side must stay apart in smaps, and end with the context. */
TEST(region, neighbours) {
  enum { N = 12 };
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  kvcached_region_t r[N];
  size_t left = 0;
  for (size_t i = 0; i < N; i++) {
    r[i] = reserve(ctx, KVCACHED_KV, (i + 1) * page);
    CHECK_OK(kvcached_ensure(r[i], 0, kvcached_region_size(r[i])));
    put_ends(r[i], i, (int)i);
    if (i % 2) left += (i + 1) * page;
  }
  check_context(ctx);
  for (int i = 0; i < N && on_host(); i++) /* the next one does not begin here */
    CHECK(!accessible((char *)kvcached_region_base(r[i]) + kvcached_region_size(r[i])));
  for (int i = 0; i < N; i += 2) kvcached_unreserve(r[i]);
  check_context(ctx);
  for (size_t i = 1; i < N; i += 2) CHECK(holds_ends(r[i], i, (int)i));
  CHECK_EQ(stats_of(ctx).mapped, left);
  void *last = kvcached_region_base(r[N - 1]);
  kvcached_shutdown(ctx);
  if (on_host()) CHECK(!accessible(last));
}

TEST(region, limit) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_alone(0, 10 * page + 100);
  kvcached_region_t a = reserve(ctx, KVCACHED_KV, 100 * page); /* addresses are free */
  kvcached_region_t b = reserve(ctx, KVCACHED_KV, 100 * page);
  CHECK_OK(kvcached_ensure(a, 0, 10 * page));
  CHECK_IS(kvcached_ensure(b, 0, 1), KVCACHED_E_LIMIT);
  char number[40];
  snprintf(number, sizeof(number), "%zu", 10 * page + 100);
  CHECK_DETAIL(number);
  CHECK_EQ(stats_of(ctx).limit_failures, 1);
  check_context(ctx);

  CHECK_OK(kvcached_release(a, 0, 4 * page));
  /* four idle ones do not suffice */
  CHECK_IS(kvcached_ensure(b, 0, 5 * page), KVCACHED_E_LIMIT);
  CHECK_EQ(stats_of(ctx).mapped - stats_of(ctx).idle, 6 * page);
  check_context(ctx);
  CHECK_OK(kvcached_ensure(a, 0, 4 * page));
  CHECK_OK(kvcached_release(a, 0, 4 * page));
  CHECK_OK(kvcached_ensure(b, 0, 3 * page)); /* three of them are used */
  kvcached_stats_t s = stats_of(ctx);
  CHECK_EQ(s.mapped, 10 * page);
  CHECK_EQ(s.idle, page);
  CHECK_EQ(s.group_charge, 10 * page);
  check_context(ctx);
  CHECK_OK(kvcached_ensure(a, 0, page)); /* the last idle page is this very one */
  CHECK_EQ(stats_of(ctx).idle, 0);
  CHECK_IS(kvcached_ensure(a, 0, 2 * page), KVCACHED_E_LIMIT);
  kvcached_unreserve(b); /* to the pool where there is one, and out of it again */
  CHECK_OK(kvcached_ensure(a, 0, 4 * page));
  CHECK_IS(kvcached_ensure(a, 0, 100 * page), KVCACHED_E_LIMIT);
  check_context(ctx);
  kvcached_shutdown(ctx);

  kvcached_options_t o; /* what is held elsewhere counts */
  test_options(&o);
  o.limit = 10 * page;
  o.fixed = 8 * page;
  ctx = open_with(&o);
  a = reserve(ctx, KVCACHED_KV, 100 * page);
  CHECK_IS(kvcached_ensure(a, 0, 3 * page), KVCACHED_E_LIMIT);
  CHECK_OK(kvcached_ensure(a, 0, 2 * page));
  CHECK_EQ(stats_of(ctx).group_charge, 10 * page);
  kvcached_shutdown(ctx);
}

/* When nothing is missing the device is not bothered. */
TEST(region, ensured_costs_no_device_call) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_in(scratch("calls"), "g", UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 64 * page);
  CHECK_OK(kvcached_ensure(r, 0, 16 * page));
  uint64_t calls = stats_of(ctx).device_calls;
  CHECK(calls > 0);
  for (size_t i = 0; i < 1000; i++) CHECK_OK(kvcached_ensure(r, i % 15 * page, page + 1));
  CHECK_EQ(stats_of(ctx).device_calls, calls);
  CHECK_OK(kvcached_release(r, 0, 16 * page)); /* nor when content is dropped */
  CHECK_EQ(stats_of(ctx).device_calls, calls);
  CHECK_EQ(stats_of(ctx).ensures, 1);
  kvcached_shutdown(ctx);
}

/* Memory that lay in a row does so again. */
TEST_CUDA(region, pool_keeps_order) {
  const size_t page = test_page();
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = "";
  o.pool_limit = 8 * page;
  kvcached_ctx_t ctx = open_with(&o);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 8 * page);
  uint64_t before[8];
  CHECK_OK(kvcached_ensure(r, 0, 8 * page));
  memcpy(before, r->pages.handle, sizeof(before));
  kvcached_unreserve(r);
  CHECK_EQ(stats_of(ctx).pooled, 8 * page);
  r = reserve(ctx, KVCACHED_KV, 12 * page);
  CHECK_OK(kvcached_ensure(r, 2 * page, 8 * page));
  CHECK_EQ(stats_of(ctx).pooled, 0);
  CHECK(memcmp(before, r->pages.handle + 2, sizeof(before)) == 0);
  kvcached_shutdown(ctx);
}

/* Pages taken off their addresses are kept for reuse, within a bound, where memory can move (CUDA). */
TEST_CUDA(region, pool) {
  const size_t page = test_page();
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = scratch("pool");
  o.group = "g";
  o.limit = 12 * page;
  o.pool_limit = 4 * page + 1;
  kvcached_ctx_t ctx = open_with(&o);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 10 * page);
  CHECK_OK(kvcached_ensure(r, 0, 10 * page));
  put(r, 0, 'p', 10 * page);
  kvcached_unreserve(r);
  CHECK_EQ(stats_of(ctx).pooled, 4 * page);
  CHECK_EQ(stats_of(ctx).group_charge, 4 * page);
  check_context(ctx);

  r = reserve(ctx, KVCACHED_KV, 10 * page);
  CHECK_OK(kvcached_ensure(r, 0, 3 * page)); /* from the pool: still zero */
  CHECK_EQ(stats_of(ctx).pooled, page);
  CHECK_EQ(stats_of(ctx).group_charge, 4 * page);
  CHECK(holds(r, 0, 0, 3 * page));
  kvcached_region_t w = reserve(ctx, KVCACHED_WEIGHTS, 9 * page); /* needs the pool's room */
  CHECK_OK(kvcached_ensure(w, 0, 9 * page));
  CHECK_EQ(stats_of(ctx).pooled, 0);
  CHECK_IS(kvcached_ensure(r, 0, 4 * page), KVCACHED_E_LIMIT);
  check_context(ctx);
  kvcached_unreserve(w); /* large pages do not go there */
  CHECK_EQ(stats_of(ctx).pooled, 0);
  kvcached_unreserve(r);
  CHECK_EQ(stats_of(ctx).pooled, 3 * page);
  size_t freed;
  CHECK_OK(kvcached_trim(ctx, page, &freed));
  CHECK_EQ(freed, 2 * page);
  CHECK_EQ(stats_of(ctx).pooled, page);
  check_context(ctx);
  CHECK_OK(kvcached_trim(ctx, 0, &freed));
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* ---- read, write, clear ---- */

TEST(region, read_and_write) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_alone(0, 20 * page);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 32 * page);
  unsigned char *buf = malloc(6 * page);
  CHECK(buf != NULL);
  memset(buf, 'r', 6 * page);
  CHECK_OK(kvcached_read(r, page, buf, 6 * page)); /* nothing there: zero, and nothing is made */
  CHECK(all_bytes(buf, 6 * page, 0));
  CHECK_EQ(stats_of(ctx).mapped, 0);

  memset(buf, 'w', 6 * page);
  CHECK_OK(kvcached_write(r, 2 * page - 3, buf, 2 * page)); /* pages 1, 2 and 3 */
  CHECK_EQ(stats_of(ctx).mapped, 3 * page);
  CHECK(holds(r, page, 0, page - 3) && holds(r, 2 * page - 3, 'w', 2 * page) && holds(r, 4 * page - 3, 0, 3));
  CHECK_OK(kvcached_read(r, page - 10, buf, 4 * page)); /* over the border of what is there */
  CHECK(all_bytes(buf, 10 + page - 3, 0) && all_bytes(buf + 10 + page - 3, 2 * page, 'w') &&
        all_bytes(buf + 10 + page - 3 + 2 * page, page - 7, 0));
  CHECK_EQ(stats_of(ctx).mapped, 3 * page);

  CHECK_OK(kvcached_release(r, 2 * page, page)); /* idle: reads as zero too */
  CHECK_OK(kvcached_read(r, 2 * page, buf, page));
  CHECK(all_bytes(buf, page, 0));
  CHECK_OK(kvcached_ensure(r, 2 * page, page));
  CHECK(holds(r, 2 * page, 0, page));

  put(r, page, 'x', 3 * page);
  CHECK_OK(kvcached_clear(r, 2 * page - 4, page)); /* the bytes of the range, not the pages */
  CHECK(holds(r, page, 'x', page - 4) && holds(r, 2 * page - 4, 0, page) &&
        holds(r, 3 * page - 4, 'x', page + 4));
  CHECK_OK(kvcached_clear(r, 0, 32 * page)); /* maps nothing */
  CHECK_EQ(stats_of(ctx).mapped, 3 * page);
  CHECK(holds(r, page, 0, 3 * page));

  CHECK_IS(kvcached_read(r, 0, NULL, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_write(r, 0, NULL, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_read(r, 32 * page, buf, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_write(r, 31 * page, buf, page + 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_clear(r, 1, SIZE_MAX), KVCACHED_E_INVAL);
  CHECK_OK(kvcached_read(r, 32 * page, buf, 0));
  CHECK_OK(kvcached_write(r, 5, buf, 0));
  CHECK_OK(kvcached_clear(r, 5, 0));
  check_context(ctx);
  kvcached_unreserve(r);

  r = reserve(ctx, KVCACHED_KV, 32 * page); /* a write beyond the limit: nothing of it happens */
  CHECK_OK(kvcached_ensure(r, 0, 18 * page));
  put(r, 17 * page, 'k', page);
  CHECK_IS(kvcached_write(r, 17 * page, buf, 4 * page), KVCACHED_E_LIMIT);
  CHECK(holds(r, 17 * page, 'k', page));
  CHECK_EQ(stats_of(ctx).mapped - stats_of(ctx).idle, 18 * page);
  check_context(ctx);
  free(buf);
  kvcached_shutdown(ctx);
}

TEST(region, alloc_and_free) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_alone(0, 40 * page);
  CHECK(kvcached_alloc(ctx, 0) == NULL);
  CHECK(*kvcached_last_error());
  CHECK(kvcached_alloc(NULL, 1) == NULL);
  char *a = kvcached_alloc(ctx, 1), *b = kvcached_alloc(ctx, 20 * page + 1);
  CHECK(a && b);
  CHECK_EQ(stats_of(ctx).mapped, 22 * page);
  CHECK_EQ((uintptr_t)a % page + (uintptr_t)b % page, 0);
  if (on_host()) {
    CHECK(all_bytes(a, page, 0) && all_bytes(b, 21 * page, 0));
    memset(b, 'b', 21 * page);
  }
  check_context(ctx);
  CHECK(kvcached_alloc(ctx, 19 * page) == NULL);
  CHECK_EQ(stats_of(ctx).limit_failures, 1);
  CHECK_EQ(stats_of(ctx).mapped, 22 * page);
  CHECK_EQ(stats_of(ctx).reserved, 22 * page); /* its addresses are gone again */
  kvcached_free(ctx, NULL);
  kvcached_free(ctx, a + 1); /* refused */
  kvcached_free(ctx, b + page);
  CHECK_EQ(stats_of(ctx).mapped, 22 * page);
  if (on_host()) CHECK(all_bytes(b, 21 * page, 'b'));
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, page);
  kvcached_free(ctx, kvcached_region_base(r)); /* no allocation: refused */
  CHECK_EQ(stats_of(ctx).reserved, 23 * page);
  kvcached_free(ctx, b);
  CHECK_EQ(stats_of(ctx).reserved, 2 * page);
  char *c = kvcached_alloc(ctx, 30 * page);
  CHECK(c != NULL);
  if (on_host()) CHECK(all_bytes(c, 30 * page, 0));
  check_context(ctx);
  kvcached_free(ctx, a);
  kvcached_free(ctx, c);
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* ---- host facts ---- */

TEST_HOST(region, two_mib_pages) { states_of(2 * MIB); }
