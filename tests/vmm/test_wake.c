/* One wake of several regions: the order of its calls, and what is left when
 * one of them fails. */
#include "context.h"
#include "fault.h"
#include "sleep_kit.h"

enum { CALLS = 4000, NONE = -1 };

/* ---- what was called ---- */

typedef struct call_list {
  fault_call call[CALLS];
  int n;
} call_list;

static void begin_log(call_list *list) { fault_log(list->call, CALLS); }

static void end_log(call_list *list) {
  unsigned n = fault_logged();
  fault_log(NULL, 0);
  CHECK_LE(n, CALLS);
  list->n = (int)n;
}

/* A call of a kind into a region (NULL: anywhere): the first, the last, and how
 * many there are. */
typedef struct found {
  int first, last, n;
} found;
static found find(const call_list *list, fault_kind kind, kvcached_region_t r) {
  found f = {NONE, NONE, 0};
  const char *base = r ? kvcached_region_base(r) : NULL;
  for (int i = 0; i < list->n; i++) {
    const char *at = list->call[i].at;
    if (list->call[i].kind != kind || (r && (at < base || at >= base + kvcached_region_size(r)))) continue;
    if (f.n++ == 0) f.first = i;
    f.last = i;
  }
  return f;
}

/* ---- the order ---- */

/* A region of KV made before and one made after the WEIGHTS, so that order of age would show; more than one
   batch of WEIGHTS, so that it is seen that the first copy does not wait for the last mapping. */
TEST(wake, copies_of_all_are_queued_before_the_wait) {
  static call_list list;
  const size_t page = test_page(), large = test_large_page(), batch = (size_t)64 << 20;
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  kvcached_region_t old = reserve(ctx, KVCACHED_KV, 16 * page);
  kvcached_region_t weights = reserve(ctx, KVCACHED_WEIGHTS, batch + large);
  kvcached_region_t kv = reserve(ctx, KVCACHED_KV, 16 * page);
  kvcached_region_t scratch_region = reserve(ctx, KVCACHED_SCRATCH, 3 * large);
  size_t n = kvcached_region_size(weights) / large;
  fill(old, 4, 1);
  fill(kv, 6, 20);
  CHECK_OK(kvcached_ensure(weights, 0, n * large));
  for (size_t i = 0; i < n; i++) put_ends(weights, i, (int)(i % 251));
  fill(scratch_region, 3, 90);
  go_to_sleep(ctx, KVCACHED_ALL_KINDS);

  begin_log(&list);
  CHECK_OK(kvcached_wake(ctx, KVCACHED_ALL_KINDS));
  end_log(&list);
  found wait = find(&list, FAULT_FINISH, NULL), copies = find(&list, FAULT_WRITE, NULL);
  found w = find(&list, FAULT_WRITE, weights), a = find(&list, FAULT_WRITE, kv),
        b = find(&list, FAULT_WRITE, old);
  CHECK_EQ(wait.n, 1);
  CHECK_EQ(find(&list, FAULT_QUIESCE, NULL).n, 0);
  CHECK(copies.last < wait.first);
  /* The most to copy first; what is not copied last. */
  CHECK_EQ(copies.first, w.first);
  CHECK(w.last < a.first && a.last < b.first);
  CHECK_EQ(find(&list, FAULT_WRITE, scratch_region).n, 0);
  CHECK(w.first < find(&list, FAULT_MAP, weights).last);
  /* Everything else is mapped between the first copy and the wait. */
  kvcached_region_t others[] = {kv, old, scratch_region};
  for (int i = 0; i < 3; i++) {
    found map = find(&list, FAULT_MAP, others[i]), access = find(&list, FAULT_ACCESS, others[i]);
    CHECK(map.first > w.last && map.last < wait.first);
    CHECK(access.first > w.last && access.last < wait.first);
    CHECK_EQ(access.n, 1); /* one call a run */
  }
  CHECK(find(&list, FAULT_MAP, scratch_region).first > copies.last);
  CHECK(find(&list, FAULT_ZERO, NULL).last < wait.first);
  CHECK(filled(old, 4, 1) && filled(kv, 6, 20));
  for (size_t i = 0; i < n; i++) CHECK(holds_ends(weights, i, (int)(i % 251)));
  CHECK(holds(scratch_region, 0, 0, 3 * large));
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* ---- failures ---- */

static uint64_t wakes_of(kvcached_region_t r) { return region_stats_of(r).wakes; }

/* Those that are complete stay awake, the one that is not sleeps in full; the next wake does the rest. */
TEST(wake, complete_regions_stay_awake) {
  scene s = set_up_in("stay");
  const size_t weights = 2 * s.large + s.page;
  go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
  fault_set(FAULT_WRITE, 3, KVCACHED_E_DEVICE); /* two for KV, which is more here, and then one for WEIGHTS */
  CHECK_IS(kvcached_wake(s.ctx, KVCACHED_ALL_KINDS), KVCACHED_E_DEVICE);
  CHECK_DETAIL("injected failure of write");
  fault_clear();
  CHECK_EQ(wakes_of(s.kv), 1);
  CHECK_EQ(wakes_of(s.weights) + wakes_of(s.scratch), 0);
  CHECK_EQ(region_stats_of(s.weights).asleep, weights);
  CHECK_EQ(region_stats_of(s.weights).mapped + region_stats_of(s.scratch).mapped, 0);
  CHECK_EQ(stats_of(s.ctx).mapped, 10 * s.page);
  check_context(s.ctx);
  CHECK(kv_is_there(&s));
  enter_and_leave(s.ctx);
  CHECK_EQ(wakes_of(s.kv), 1);
  CHECK_EQ(wakes_of(s.weights) + wakes_of(s.scratch), 2);
  CHECK(weights_are_there(&s) && holds(s.scratch, 0, 0, s.large));
  check_context(s.ctx);
  kvcached_shutdown(s.ctx);
}

/* Where the wait fails nothing is known to have arrived: all of them sleep.
   Where the device does not come to rest either their memory stays under them,
   claimed, until they wake. */
TEST(wake, a_wait_that_fails_leaves_all_asleep) {
  scene s = set_up_in("wait");
  for (int restless = 0; restless < 2; restless++) {
    go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
    uint64_t wakes = stats_of(s.ctx).wakes;
    fault_set(FAULT_FINISH, 1, KVCACHED_E_DEVICE);
    if (restless) fault_every(FAULT_QUIESCE, 1, KVCACHED_E_DEVICE);
    CHECK_IS(kvcached_wake(s.ctx, KVCACHED_ALL_KINDS), KVCACHED_E_DEVICE);
    CHECK_DETAIL("injected failure of finish"); /* and not what came of it */
    fault_clear();
    CHECK(kvc_sleeps(s.kv) && kvc_sleeps(s.weights) && kvc_sleeps(s.scratch));
    CHECK_EQ(asleep(s.ctx), restless ? 0 : s.in_use); /* counted where they have no memory */
    CHECK_EQ(stats_of(s.ctx).mapped, restless ? s.in_use : 0);
    CHECK_EQ(stats_of(s.ctx).wakes, wakes);
    check_context(s.ctx);
    CHECK_EQ(fault_now().mapped, restless ? (int64_t)s.in_use : 0);
    enter_and_leave(s.ctx);
    CHECK(kv_is_there(&s) && weights_are_there(&s) && holds(s.scratch, 0, 0, s.large));
    CHECK_EQ(stats_of(s.ctx).mapped, s.in_use);
    check_context(s.ctx);
  }
  kvcached_shutdown(s.ctx);
}

/* ---- reload functions ---- */

typedef struct reloads {
  kvcached_region_t kv; /* copied */
  unsigned char kv_tag;
  int calls, fails_at;
} reloads;

/* Whether a program can look at the device's memory. */
static int can_look(void) { return on_host() || getenv("FAKE_CUDA_MEMORY"); }

/* Everything that was queued has been done, for this region and for others. */
static int restore(kvcached_region_t r, void *user) {
  reloads *l = user;
  size_t size = kvcached_region_size(r);
  if (can_look()) {
    CHECK(all_bytes(kvcached_region_base(r), size, 0));
    CHECK(all_bytes(kvcached_region_base(l->kv), 64, l->kv_tag));
  }
  unsigned char *buf = malloc(size);
  CHECK(buf != NULL);
  memset(buf, 100 + l->calls, size);
  CHECK_OK(kvcached_write(r, 0, buf, size));
  free(buf);
  return ++l->calls == l->fails_at;
}

static kvcached_region_t reloaded(kvcached_ctx_t ctx, reloads *l) {
  kvcached_region_t r = reserve(ctx, KVCACHED_WEIGHTS, 2 * test_page());
  CHECK_OK(kvcached_ensure(r, 0, 2 * test_page()));
  CHECK_OK(kvcached_set_reload(r, restore, l));
  return r;
}

TEST(wake, reload_functions_come_last) {
  static call_list list;
  kvcached_options_t o;
  test_options(&o);
  const size_t page = test_page(), large = test_large_page();
  o.ledger_path = scratch("last");
  o.group = "g";
  o.host_limit = 3 * page; /* for the KV alone */
  kvcached_ctx_t ctx = open_with(&o);
  reloads l = {.kv_tag = 40};
  kvcached_region_t third = reloaded(ctx, &l), kv = l.kv = reserve(ctx, KVCACHED_KV, 8 * page);
  kvcached_region_t second = reloaded(ctx, &l), s = reserve(ctx, KVCACHED_SCRATCH, large);
  kvcached_region_t first = reloaded(ctx, &l); /* the newest */
  const size_t size = 2 * page;
  fill(kv, 3, 40);
  fill(s, 1, 90);
  for (int fails_at = 3; fails_at >= 0; fails_at--) {
    go_to_sleep(ctx, KVCACHED_ALL_KINDS);
    CHECK_EQ(stats_of(ctx).host_bytes, 3 * page);
    CHECK_EQ(stats_of(ctx).mapped, 0);
    l.calls = 0;
    l.fails_at = fails_at;
    begin_log(&list);
    CHECK_IS(kvcached_wake(ctx, KVCACHED_ALL_KINDS), fails_at ? KVCACHED_E_RELOAD : KVCACHED_OK);
    end_log(&list);
    CHECK_EQ(l.calls, fails_at ? fails_at : 3);
    int wait = find(&list, FAULT_FINISH, NULL).first;
    kvcached_region_t in_turn[] = {first, second, third};
    for (int i = 0; i < 3; i++) {
      int awake = fails_at == 0 || i < fails_at - 1;
      kvcached_stats_t t = region_stats_of(in_turn[i]);
      CHECK_EQ(t.mapped, awake ? size : 0);
      CHECK_EQ(t.asleep, awake ? 0 : size);
      found map = find(&list, FAULT_MAP, in_turn[i]), write = find(&list, FAULT_WRITE, in_turn[i]);
      CHECK(map.n > 0 && map.last < wait && (write.n == 0 || write.first > wait));
    }
    CHECK(find(&list, FAULT_WRITE, kv).last < wait && find(&list, FAULT_MAP, s).last < wait);
    CHECK(filled(kv, 3, 40) && holds(s, 0, 0, large)); /* they are awake whatever becomes of the others */
    check_context(ctx);
    l.fails_at = l.calls = 0;
    enter_and_leave(ctx);
    CHECK_EQ(l.calls, fails_at ? 4 - fails_at : 0);
    CHECK_EQ(asleep(ctx), 0);
    CHECK(holds(third, 0, fails_at ? 103 - fails_at : 102, size));
    check_context(ctx);
  }
  kvcached_shutdown(ctx);
}

/* One whose function was taken back cannot wake; the others do, and no function
 * is called in vain. */
TEST(wake, a_reload_function_taken_back) {
  kvcached_options_t o;
  test_options(&o);
  o.host_limit = 3 * test_page();
  o.ledger_path = scratch("taken");
  o.group = "g";
  kvcached_ctx_t ctx = open_with(&o);
  reloads l = {.kv_tag = 40};
  kvcached_region_t lost = reloaded(ctx, &l), other = reloaded(ctx, &l);
  kvcached_region_t kv = l.kv = reserve(ctx, KVCACHED_KV, 8 * test_page());
  fill(kv, 3, 40);
  go_to_sleep(ctx, KVCACHED_ALL_KINDS);
  CHECK_OK(kvcached_set_reload(lost, NULL, NULL));
  CHECK_IS(kvcached_wake(ctx, KVCACHED_ALL_KINDS), KVCACHED_E_RELOAD);
  CHECK_DETAIL("taken back");
  CHECK_EQ(l.calls, 0);
  CHECK_EQ(region_stats_of(kv).mapped, 3 * test_page());
  CHECK_EQ(stats_of(ctx).mapped, 3 * test_page());
  CHECK_EQ(region_stats_of(other).asleep, 2 * test_page());
  check_context(ctx);
  CHECK_OK(kvcached_set_reload(lost, restore, &l));
  enter_and_leave(ctx);
  CHECK_EQ(l.calls, 2);
  CHECK(filled(kv, 3, 40));
  check_context(ctx);
  kvcached_shutdown(ctx);
}
