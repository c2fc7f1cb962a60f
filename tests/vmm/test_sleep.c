/* Sleep and wake: what keeps its content and how, what memory goes where, and what may fail. */
#include "context.h"
#include "fault.h"
#include "support.h"

#include <pthread.h>
#include <stdatomic.h>

static size_t asleep(kvcached_ctx_t ctx) { return stats_of(ctx).asleep; }

/* Ensures the first n pages of a region, with a tag of its own in each. */
static void fill(kvcached_region_t r, size_t n, int tag) {
  size_t bytes = n * kvcached_region_page_size(r), size = kvcached_region_size(r);
  CHECK_OK(kvcached_ensure(r, 0, bytes < size ? bytes : size));
  for (size_t i = 0; i < n; i++) put_ends(r, i, tag + (int)i);
}

static int filled(kvcached_region_t r, size_t n, int tag) {
  for (size_t i = 0; i < n; i++)
    if (!holds_ends(r, i, tag + (int)i)) return 0;
  return 1;
}

/* Whether a copy of all it holds is there; the helper may be making one. */
static int has_copy(kvcached_region_t r) {
  pthread_mutex_lock(&r->ctx->mutex);
  int valid = r->copy.valid;
  pthread_mutex_unlock(&r->ctx->mutex);
  return valid;
}

static void enter_and_leave(kvcached_ctx_t ctx) {
  CHECK_OK(kvcached_enter(ctx));
  CHECK_OK(kvcached_leave(ctx));
}

static size_t go_to_sleep(kvcached_ctx_t ctx, unsigned kinds) {
  size_t freed;
  CHECK_OK(kvcached_sleep(ctx, kinds, 1000, &freed));
  return freed;
}

typedef struct scene {
  kvcached_ctx_t ctx;
  kvcached_region_t kv, weights, scratch;
  const char *ledger;
  size_t page, large, in_use; /* bytes of a KV page and of a large one, and of what is in use */
} scene;

enum { KV = KVCACHED_KIND_BIT(KVCACHED_KV), WEIGHTS = KVCACHED_KIND_BIT(KVCACHED_WEIGHTS) };
enum { SCRATCH = KVCACHED_KIND_BIT(KVCACHED_SCRATCH) };

static scene set_up(const kvcached_options_t *o) {
  scene s = {.ctx = open_with(o), .ledger = o->ledger_path, .page = test_page(), .large = test_large_page()};
  s.kv = reserve(s.ctx, KVCACHED_KV, 32 * s.page);
  s.weights = reserve(s.ctx, KVCACHED_WEIGHTS, 2 * s.large + s.page);
  s.scratch = reserve(s.ctx, KVCACHED_SCRATCH, s.large);
  fill(s.kv, 12, 10);
  CHECK_OK(kvcached_release(s.kv, 8 * s.page, 2 * s.page)); /* a hole of idle pages */
  fill(s.weights, 3, 60);
  fill(s.scratch, 1, 90);
  s.in_use = 10 * s.page + 3 * s.large + s.page;
  return s;
}

static scene set_up_in(const char *name) {
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = scratch(name);
  o.group = "g";
  return set_up(&o);
}

static int kv_is_there(const scene *s) {
  return filled(s->kv, 8, 10) && holds_ends(s->kv, 10, 20) && holds_ends(s->kv, 11, 21);
}

TEST(sleep, by_kind) {
  scene s = set_up_in("kind");
  void *kv = kvcached_region_base(s.kv), *weights = kvcached_region_base(s.weights);
  kvcached_stats_t before = stats_of(s.ctx);
  CHECK_EQ(go_to_sleep(s.ctx, KVCACHED_ALL_KINDS), s.in_use + 2 * s.page);
  kvcached_stats_t t = stats_of(s.ctx);
  CHECK_EQ(t.mapped + t.pooled, 0);
  CHECK_EQ(t.asleep, s.in_use); /* the idle ones have just gone */
  CHECK_EQ(t.reserved, before.reserved);
  CHECK_EQ(t.group_charge, 0);
  CHECK_EQ(t.host_bytes, 10 * s.page + 2 * s.large + s.page); /* nothing for SCRATCH */
  CHECK_LE(t.host_pinned, t.host_bytes);
  CHECK_EQ(t.sleeps, 1);
  CHECK(t.last_sleep_ns > 0);
  CHECK_EQ(t.wakes, 0);
  check_context(s.ctx);
  if (on_host()) CHECK(!accessible(kv) && !accessible(weights));
  size_t run;
  int ensured;
  CHECK_OK(kvcached_mapped_run(s.kv, 0, 32 * s.page, &run, &ensured)); /* looking does not wake */
  CHECK(ensured && run == 8 * s.page);
  CHECK_EQ(asleep(s.ctx), s.in_use);
  uint64_t calls = stats_of(s.ctx).device_calls;
  CHECK_EQ(go_to_sleep(s.ctx, KVCACHED_ALL_KINDS), 0); /* sleeps already */
  CHECK_EQ(stats_of(s.ctx).sleeps, 1);
  CHECK_EQ(stats_of(s.ctx).device_calls, calls);

  CHECK_OK(kvcached_enter(s.ctx));
  t = stats_of(s.ctx);
  CHECK_EQ(t.asleep, 0);
  CHECK_EQ(t.mapped, s.in_use);
  CHECK_EQ(t.wakes, 1);
  CHECK(t.last_wake_ns > 0);
  CHECK(kvcached_region_base(s.kv) == kv && kvcached_region_base(s.weights) == weights);
  CHECK(kv_is_there(&s));
  CHECK(filled(s.weights, 3, 60));
  CHECK(holds(s.scratch, 0, 0, s.large)); /* content dropped */
  CHECK_OK(kvcached_leave(s.ctx));
  check_context(s.ctx);
  CHECK_OK(kvcached_ensure(s.kv, 0, 12 * s.page));
  CHECK(holds(s.kv, 8 * s.page, 0, 2 * s.page) && kv_is_there(&s));
  kvcached_shutdown(s.ctx);
  CHECK_EQ(live_slots(s.ledger), 0);
}

TEST(sleep, some_kinds_only) {
  scene s = set_up_in("some");
  CHECK_EQ(go_to_sleep(s.ctx, WEIGHTS), 2 * s.large + s.page);
  CHECK_EQ(asleep(s.ctx), 2 * s.large + s.page);
  CHECK(kv_is_there(&s) && holds_ends(s.scratch, 0, 90));
  CHECK_OK(kvcached_ensure(s.kv, 0, 13 * s.page)); /* another region: nobody wakes */
  CHECK_EQ(asleep(s.ctx), 2 * s.large + s.page);
  CHECK_EQ(go_to_sleep(s.ctx, KV | SCRATCH), 13 * s.page + s.large);
  CHECK_OK(kvcached_wake(s.ctx, SCRATCH));
  CHECK_EQ(asleep(s.ctx), 13 * s.page + 2 * s.large + s.page);
  CHECK_OK(kvcached_wake(s.ctx, KV));
  CHECK(kv_is_there(&s));
  CHECK_EQ(asleep(s.ctx), 2 * s.large + s.page);
  CHECK_OK(kvcached_wake(s.ctx, KVCACHED_ALL_KINDS));
  CHECK(filled(s.weights, 3, 60));
  check_context(s.ctx);
  kvcached_shutdown(s.ctx);
}

/* Every way of touching a sleeper wakes it, and only it. */
TEST(sleep, any_access_wakes) {
  scene s = set_up_in("access");
  unsigned char byte = 0;
  for (int way = 0; way < 6; way++) {
    go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
    size_t expected = s.in_use - 10 * s.page;
    switch (way) {
      case 0: CHECK_OK(kvcached_ensure(s.kv, s.page, s.page)); break; /* of a page that sleeps */
      case 1:
        CHECK_OK(kvcached_ensure(s.kv, 20 * s.page, s.page)); /* of one that does not */
        CHECK(holds(s.kv, 20 * s.page, 0, s.page));
        CHECK_OK(kvcached_release(s.kv, 20 * s.page, s.page));
        break;
      case 2:
        CHECK_OK(kvcached_read(s.kv, 3 * s.page, &byte, 1));
        CHECK_EQ(byte, 13);
        break;
      case 3: CHECK_OK(kvcached_write(s.kv, s.page + 100, &byte, 1)); break;
      case 4: CHECK_OK(kvcached_clear(s.kv, s.page + 100, 5)); break;
      default: enter_and_leave(s.ctx); expected = 0;
    }
    CHECK_EQ(asleep(s.ctx), expected);
    CHECK_OK(kvcached_wake(s.ctx, KVCACHED_ALL_KINDS));
    CHECK(kv_is_there(&s) && filled(s.weights, 3, 60));
    check_context(s.ctx);
  }
  kvcached_shutdown(s.ctx);
}

/* WEIGHTS have one copy, made once: the second sleep reads nothing. What changes them drops it. */
TEST(sleep, weights_are_copied_once) {
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  const size_t large = test_large_page();
  kvcached_region_t w = reserve(ctx, KVCACHED_WEIGHTS, 3 * large);
  fill(w, 2, 1);
  go_to_sleep(ctx, WEIGHTS);
  CHECK_EQ(stats_of(ctx).host_bytes, 2 * large);
  unsigned reads = fault_calls(FAULT_READ);
  for (int i = 0; i < 3; i++) {
    enter_and_leave(ctx);
    CHECK_EQ(stats_of(ctx).host_bytes, 2 * large); /* kept while awake */
    go_to_sleep(ctx, WEIGHTS);
  }
  CHECK_EQ(fault_calls(FAULT_READ), reads);
  CHECK_OK(kvcached_wake(ctx, WEIGHTS));
  CHECK(filled(w, 2, 1));

  for (int way = 0; way < 4; way++) {
    unsigned char byte = (unsigned char)(100 + way);
    if (way == 0) CHECK_OK(kvcached_write(w, 7, &byte, 1));
    if (way == 1) CHECK_OK(kvcached_clear(w, 3, 2));
    if (way == 2) CHECK_OK(kvcached_ensure(w, 2 * large, large));
    if (way == 3) CHECK_OK(kvcached_release(w, large, large));
    reads = fault_calls(FAULT_READ);
    go_to_sleep(ctx, WEIGHTS);
    CHECK(fault_calls(FAULT_READ) > reads);
    CHECK_OK(kvcached_wake(ctx, WEIGHTS));
    CHECK_OK(kvcached_read(w, 7, &byte, 1));
    CHECK_EQ(byte, 100);
    check_context(ctx);
  }
  CHECK(holds(w, 3, 0, 2) && holds(w, 2 * large, 0, large));
  CHECK_EQ(region_stats_of(w).mapped, 2 * large);
  kvcached_shutdown(ctx);
}

/* Content dropped while asleep: each page's copy stays with its page. */
TEST(sleep, release_of_a_sleeper) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 16 * page);
  fill(r, 12, 30);
  go_to_sleep(ctx, KV);
  CHECK_OK(kvcached_release(r, 0, page));
  CHECK_OK(kvcached_release(r, 4 * page + 1, 4 * page)); /* pages 5, 6 and 7 */
  CHECK_EQ(asleep(ctx), 8 * page);
  CHECK_EQ(stats_of(ctx).mapped, 0);
  check_context(ctx);
  enter_and_leave(ctx);
  CHECK_EQ(stats_of(ctx).mapped, 8 * page);
  for (size_t i = 0; i < 12; i++)
    if (i > 0 && (i < 5 || i > 7)) CHECK(holds_ends(r, i, 30 + (int)i));
  CHECK_OK(kvcached_ensure(r, 0, 12 * page));
  CHECK(holds(r, 0, 0, page) && holds(r, 5 * page, 0, 3 * page));
  for (size_t i = 0; i < 12; i++) put_ends(r, i, 70 + (int)i);
  go_to_sleep(ctx, KV);                        /* the next copy is a new one */
  CHECK_OK(kvcached_release(r, 0, 16 * page)); /* all of it: nothing sleeps any more */
  CHECK_EQ(asleep(ctx), 0);
  CHECK_OK(kvcached_ensure(r, 0, 2 * page));
  CHECK(holds(r, 0, 0, 2 * page));
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* Clearing a whole sleeper needs no memory: its copy goes, and it wakes as zeros. */
TEST(sleep, clear_of_a_sleeper) {
  scene s = set_up_in("clear");
  go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
  uint64_t host = stats_of(s.ctx).host_bytes;
  unsigned writes = fault_calls(FAULT_WRITE), maps = fault_calls(FAULT_MAP);
  CHECK_OK(kvcached_clear(s.kv, 0, 32 * s.page));
  CHECK_EQ(stats_of(s.ctx).asleep, s.in_use);
  CHECK_EQ(stats_of(s.ctx).mapped, 0);
  CHECK_LE(stats_of(s.ctx).host_bytes, host - 10 * s.page);
  CHECK_EQ(fault_calls(FAULT_MAP), maps);
  CHECK_OK(kvcached_wake(s.ctx, KV));
  CHECK_EQ(fault_calls(FAULT_WRITE), writes);
  CHECK(holds(s.kv, 0, 0, 8 * s.page) && holds(s.kv, 10 * s.page, 0, 2 * s.page));
  CHECK_OK(kvcached_clear(s.weights, 0, kvcached_region_size(s.weights)));
  CHECK_OK(kvcached_wake(s.ctx, WEIGHTS));
  CHECK(holds(s.weights, 0, 0, kvcached_region_size(s.weights)));
  check_context(s.ctx);
  fill(s.kv, 3, 5); /* and all goes on as ever */
  go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
  enter_and_leave(s.ctx);
  CHECK(filled(s.kv, 3, 5));
  check_context(s.ctx);
  kvcached_shutdown(s.ctx);
}

TEST(sleep, what_ensure_adds_to_a_sleeper) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 24 * page);
  fill(r, 4, 40);
  go_to_sleep(ctx, KV);
  unsigned char *buf = malloc(6 * page);
  CHECK(buf != NULL);
  memset(buf, 'n', 6 * page);
  CHECK_OK(kvcached_write(r, 2 * page, buf, 6 * page));
  CHECK(filled(r, 2, 40) && holds(r, 2 * page, 'n', 6 * page));
  CHECK_EQ(stats_of(ctx).mapped, 8 * page);
  go_to_sleep(ctx, KV);
  memset(buf, 0, 6 * page);
  CHECK_OK(kvcached_read(r, 5 * page, buf, 6 * page)); /* half of it is there */
  CHECK(all_bytes(buf, 3 * page, 'n') && all_bytes(buf + 3 * page, 3 * page, 0));
  free(buf);
  check_context(ctx);
  kvcached_shutdown(ctx);
}

TEST(sleep, allocations_survive) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  void *p = kvcached_alloc(ctx, 5 * page);
  CHECK(p != NULL);
  kvcached_region_t r = ctx->regions;
  put(r, 0, 'a', 5 * page);
  go_to_sleep(ctx, KVCACHED_ALL_KINDS);
  CHECK_EQ(stats_of(ctx).mapped, 0);
  enter_and_leave(ctx);
  CHECK(holds(r, 0, 'a', 5 * page));
  go_to_sleep(ctx, KVCACHED_ALL_KINDS);
  kvcached_free(ctx, p); /* asleep */
  CHECK_EQ(stats_of(ctx).reserved + stats_of(ctx).asleep + stats_of(ctx).host_bytes, 0);
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* More than one piece of host memory, with pages over the seams. */
TEST(sleep, copies_of_many_pieces) {
  const size_t page = test_page(), n = (KVC_HOST_CHUNK + 6 * MIB) / page;
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, n * page);
  CHECK_OK(kvcached_ensure(r, 0, n * page));
  CHECK_OK(kvcached_release(r, page, page)); /* so that pages and pieces do not meet */
  for (size_t i = 0; i < n; i++)
    if (i != 1) put_ends(r, i, (int)(i % 251));
  go_to_sleep(ctx, KV);
  CHECK_EQ(stats_of(ctx).host_bytes, (n - 1) * page);
  CHECK(ctx->regions->copy.n > 1);
  enter_and_leave(ctx);
  for (size_t i = 0; i < n; i++)
    if (i != 1) CHECK(holds_ends(r, i, (int)(i % 251)));
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* ---- host memory ---- */

TEST(sleep, prepared_ahead) {
  scene s = set_up_in("ahead");
  CHECK_OK(kvcached_prepare_sleep(s.ctx, KVCACHED_ALL_KINDS));
  const size_t weights = 2 * s.large + s.page;
  WAIT_FOR(stats_of(s.ctx).host_bytes == 10 * s.page + weights && has_copy(s.weights));
  CHECK_EQ(asleep(s.ctx), 0);
  CHECK(kv_is_there(&s) && filled(s.weights, 3, 60));
  check_context(s.ctx);
  unsigned reads = fault_calls(FAULT_READ), allocs = fault_calls(FAULT_HOST_ALLOC);
  go_to_sleep(s.ctx, WEIGHTS | SCRATCH);
  CHECK_EQ(fault_calls(FAULT_READ), reads); /* the copy of the weights is there */
  go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
  CHECK_EQ(fault_calls(FAULT_HOST_ALLOC), allocs); /* and the memory for the rest */
  enter_and_leave(s.ctx);
  CHECK(kv_is_there(&s) && filled(s.weights, 3, 60));
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
  CHECK(kv_is_there(&s) && filled(s.weights, 3, 60));
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
  CHECK(kv_is_there(&s) && filled(s.weights, 3, 60));
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
  CHECK(filled(s.weights, 3, 60));
  kvcached_shutdown(s.ctx);
}

/* ---- room to wake in ---- */

TEST(sleep, no_room_to_wake) {
  const size_t page = test_page();
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = scratch("room");
  o.group = "g";
  o.limit = 10 * page;
  o.room_wait_ms = 50;
  kvcached_ctx_t a = open_with(&o), b = open_with(&o);
  kvcached_region_t r = reserve(a, KVCACHED_KV, 8 * page), s = reserve(b, KVCACHED_KV, 8 * page);
  fill(r, 6, 80);
  CHECK_IS(kvcached_ensure(s, 0, 8 * page), KVCACHED_E_LIMIT);
  go_to_sleep(a, KV);
  fill(s, 8, 1); /* the room is gone */
  CHECK_IS(kvcached_enter(a), KVCACHED_E_LIMIT);
  CHECK_IS(kvcached_leave(a), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ensure(r, 0, page), KVCACHED_E_LIMIT);
  CHECK_IS(kvcached_wake(a, KV), KVCACHED_E_LIMIT);
  CHECK_EQ(asleep(a), 6 * page);
  check_context(a);
  check_context(b);
  CHECK_OK(kvcached_release(s, 4 * page, 4 * page));
  CHECK_OK(kvcached_trim(b, 0, NULL));
  CHECK_OK(kvcached_enter(a));
  CHECK(filled(r, 6, 80));
  CHECK_OK(kvcached_leave(a));
  CHECK(filled(s, 4, 1));
  CHECK_EQ(stats_of(a).group_charge, 10 * page);
  CHECK_IS(kvcached_wake(b, KV), KVCACHED_OK); /* awake: nothing to do */
  kvcached_shutdown(a);
  kvcached_shutdown(b);
}

/* Own idle memory gives way to a waking region. */
TEST(sleep, idle_memory_gives_way_to_waking) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_alone(0, 10 * page);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 8 * page), w = reserve(ctx, KVCACHED_WEIGHTS, 8 * page);
  fill(r, 6, 80);
  go_to_sleep(ctx, KV);
  CHECK_OK(kvcached_ensure(w, 0, 8 * page));
  CHECK_IS(kvcached_enter(ctx), KVCACHED_E_LIMIT);
  CHECK_OK(kvcached_release(w, 0, 8 * page));
  enter_and_leave(ctx);
  CHECK(filled(r, 6, 80));
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* ---- the device is idle first ---- */

static void do_trim(const scene *s) { CHECK_IS(kvcached_trim(s->ctx, 0, NULL), KVCACHED_E_DEVICE); }
static void do_sleep(const scene *s) {
  CHECK_IS(kvcached_sleep(s->ctx, KVCACHED_ALL_KINDS, 100, NULL), KVCACHED_E_DEVICE);
}
static void do_set_limit(const scene *s) {
  kvcached_set_limit(s->ctx, 0);
  kvcached_set_limit(s->ctx, SIZE_MAX);
}
static void do_pressure(const scene *s) {
  const uint64_t held = stats_of(s->ctx).mapped;
  kvcached_set_limit(s->ctx, held);
  CHECK_IS(kvcached_ensure(s->kv, 20 * s->page, s->page), KVCACHED_E_LIMIT); /* idle pages must not go */
  kvcached_set_limit(s->ctx, SIZE_MAX);
}
static void do_unreserve(const scene *s) { kvcached_unreserve(s->scratch); }

/* Work on the device may use a page until the device is idle. Where the driver cannot say that it is, no
   memory goes, whatever asks for it. */
TEST(sleep, nothing_goes_before_the_device_is_idle) {
  static void (*const ways[])(const scene *) = {do_trim, do_sleep, do_set_limit, do_pressure, do_unreserve};
  scene s = set_up_in("idle");
  for (size_t i = 0; i < sizeof(ways) / sizeof(ways[0]); i++) {
    unsigned unmaps = fault_calls(FAULT_UNMAP), ends = fault_calls(FAULT_DESTROY);
    unsigned failures = fault_failures(FAULT_QUIESCE);
    fault_every(FAULT_QUIESCE, 1, KVCACHED_E_DEVICE);
    ways[i](&s);
    fault_clear();
    CHECK(fault_failures(FAULT_QUIESCE) > failures);
    CHECK_EQ(fault_calls(FAULT_UNMAP), unmaps);
    CHECK_EQ(fault_calls(FAULT_DESTROY), ends);
    CHECK(kv_is_there(&s) && filled(s.weights, 3, 60));
    check_context(s.ctx);
  }
  CHECK_OK(kvcached_trim(s.ctx, 0, NULL));
  CHECK_EQ(stats_of(s.ctx).idle, 0);
  kvcached_shutdown(s.ctx);
}

/* ---- threads ---- */

typedef struct waker {
  scene *s;
  pthread_barrier_t *start;
} waker;

static void *wake_and_look(void *arg) {
  waker *w = arg;
  pthread_barrier_wait(w->start);
  CHECK_OK(kvcached_enter(w->s->ctx));
  CHECK(kv_is_there(w->s) && filled(w->s->weights, 3, 60));
  CHECK_OK(kvcached_leave(w->s->ctx));
  return NULL;
}

/* Several threads wake one region: it is woken once, and each finds it whole. */
TEST(sleep, two_threads_wake_one_region) {
  enum { WAKERS = 4 };
  scene s = set_up_in("wakers");
  for (unsigned i = 0; i < rounds(on_host() ? 30 : 8); i++) {
    pthread_barrier_t start;
    pthread_t t[WAKERS];
    waker w = {&s, &start};
    CHECK(pthread_barrier_init(&start, NULL, WAKERS) == 0);
    go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
    uint64_t wakes = stats_of(s.ctx).wakes;
    for (int k = 0; k < WAKERS; k++) CHECK(pthread_create(&t[k], NULL, wake_and_look, &w) == 0);
    for (int k = 0; k < WAKERS; k++) pthread_join(t[k], NULL);
    CHECK_EQ(stats_of(s.ctx).wakes, wakes + 1);
    pthread_barrier_destroy(&start);
  }
  check_context(s.ctx);
  kvcached_shutdown(s.ctx);
}

/* Memory in use comes back to where it was, however often one sleeps and wakes. */
TEST(sleep, again_and_again) {
  scene s = set_up_in("again");
  uint64_t host = 0, held = 0;
  for (unsigned i = 0; i < rounds(on_host() ? 60 : 15); i++) {
    go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
    if (i == 2) host = stats_of(s.ctx).host_bytes;
    if (i > 2) CHECK_EQ(stats_of(s.ctx).host_bytes, host);
    enter_and_leave(s.ctx);
    if (i == 2) held = memory_held(s.ctx);
    if (i > 2) CHECK_LE(memory_held(s.ctx), held + 2 * MIB);
    CHECK(kv_is_there(&s) && filled(s.weights, 3, 60));
  }
  check_context(s.ctx);
  kvcached_shutdown(s.ctx);
}
