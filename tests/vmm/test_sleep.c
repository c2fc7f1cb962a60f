/* Sleep and wake: what keeps its content and how, what memory goes where, and what may fail. */
#include "context.h"
#include "fault.h"
#include "sleep_kit.h"

#include <pthread.h>
#include <stdatomic.h>

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
  CHECK(weights_are_there(&s));
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
  CHECK(weights_are_there(&s));
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
    CHECK(kv_is_there(&s) && weights_are_there(&s));
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
    CHECK(kv_is_there(&s) && weights_are_there(&s));
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
  CHECK(kv_is_there(w->s) && weights_are_there(w->s));
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
    CHECK(kv_is_there(&s) && weights_are_there(&s));
  }
  check_context(s.ctx);
  kvcached_shutdown(s.ctx);
}
