/* Events: which come, in which order, with which figures; whoever brings them about. */
#include "event_kit.h"
#include "fault.h"
#include "sleep_kit.h"

#include "cuda_driver.h"

#include <pthread.h>

static scene set_up_heard(hearing *h, const char *ledger) {
  kvcached_options_t o;
  test_options(&o);
  if (ledger) {
    o.ledger_path = scratch(ledger);
    o.group = "g";
  }
  hear(h, &o);
  scene s = set_up(&o);
  h->ctx = s.ctx;
  expect_events(h, "");
  return s;
}

TEST(events, of_the_contexts_own_calls) {
  hearing h = {.n = 0};
  scene s = set_up_heard(&h, NULL);
  kvcached_stats_t before = stats_of(s.ctx);
  go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
  expect_events(&h, "Ss");
  kvcached_stats_t now = last_heard(&h, KVCACHED_EVENT_SLEEPING);
  CHECK_EQ(now.mapped, before.mapped);
  CHECK_EQ(now.asleep, 0);
  CHECK_EQ(now.group_charge, before.group_charge);
  now = last_heard(&h, KVCACHED_EVENT_SLEPT);
  CHECK_EQ(now.mapped + now.pooled, 0);
  CHECK_EQ(now.asleep, s.in_use);
  CHECK_EQ(now.kind_asleep[KVCACHED_KV], 10 * s.page);
  CHECK_EQ(now.kind_asleep[KVCACHED_SCRATCH], s.large);
  CHECK_EQ(now.sleeps, 1);
  go_to_sleep(s.ctx, KVCACHED_ALL_KINDS); /* sleeps already */
  expect_events(&h, "");

  enter_and_leave(s.ctx);
  expect_events(&h, "w");
  now = last_heard(&h, KVCACHED_EVENT_WOKE);
  CHECK_EQ(now.mapped, s.in_use);
  CHECK_EQ(now.asleep, 0);
  CHECK_EQ(now.wakes, 1);
  enter_and_leave(s.ctx);
  CHECK_OK(kvcached_wake(s.ctx, KVCACHED_ALL_KINDS));
  CHECK_OK(kvcached_trim(s.ctx, 0, NULL)); /* there is nothing */
  expect_events(&h, "");

  CHECK_OK(kvcached_release(s.kv, 0, 4 * s.page));
  CHECK_OK(kvcached_trim(s.ctx, 0, NULL));
  expect_events(&h, "t");
  now = last_heard(&h, KVCACHED_EVENT_TRIMMED);
  CHECK_EQ(now.mapped, s.in_use - 4 * s.page);
  CHECK_EQ(now.idle + now.pooled, 0);

  go_to_sleep(s.ctx, KV);
  CHECK_OK(kvcached_ensure(s.kv, 0, s.page)); /* wakes one region */
  CHECK_OK(kvcached_release(s.kv, 0, s.page));
  kvcached_set_limit(s.ctx, 0); /* and what is idle goes */
  expect_events(&h, "Sswt");
  kvcached_set_limit(s.ctx, SIZE_MAX);
  CHECK_EQ(h.plain, 8);
  check_context(s.ctx);
  kvcached_shutdown(s.ctx);
  CHECK_EQ(h.plain, 8);
}

/* Commands, and limits of the ledger, are carried out by another thread. */
TEST(events, of_commands) {
  hearing h = {.n = 0};
  scene s = set_up_heard(&h, "commands");
  int slot = slot_of_ctx(s.ctx);
  kvcached_ledger_t l;
  CHECK_OK(kvcached_ledger_open(s.ledger, &l));
  CHECK_OK(kvcached_ledger_command(l, slot, KVCACHED_CMD_TRIM, 5000, NULL));
  expect_events(&h, "t"); /* the hole of idle pages */
  CHECK_OK(kvcached_ledger_command(l, slot, KVCACHED_CMD_TRIM, 5000, NULL));
  CHECK_OK(kvcached_ledger_command(l, slot, KVCACHED_CMD_WAKE, 5000, NULL));
  expect_events(&h, "");
  CHECK_OK(kvcached_ledger_command(l, slot, KVCACHED_CMD_SLEEP, 5000, NULL));
  CHECK_OK(kvcached_ledger_command(l, slot, KVCACHED_CMD_SLEEP, 5000, NULL));
  expect_events(&h, "Ss");
  CHECK_OK(kvcached_ledger_command(l, slot, KVCACHED_CMD_WAKE, 5000, NULL));
  expect_events(&h, "w");
  CHECK_OK(kvcached_release(s.kv, 0, 4 * s.page));
  CHECK_OK(kvcached_ledger_set_limit(l, "g", s.page, 0, NULL)); /* tells it to trim */
  expect_events(&h, "t");
  CHECK_OK(kvcached_ledger_set_limit(l, "g", UINT64_MAX, 0, NULL));
  CHECK_OK(kvcached_enter(s.ctx));
  CHECK_IS(kvcached_ledger_command(l, slot, KVCACHED_CMD_SLEEP, 5000, NULL), KVCACHED_E_BUSY);
  CHECK_OK(kvcached_leave(s.ctx));
  expect_events(&h, "");
  kvcached_ledger_close(l);
  check_context(s.ctx);
  kvcached_shutdown(s.ctx);
}

/* The need of room: the context's own, and another process's. */
TEST(events, of_pressure) {
  const size_t page = test_page();
  const char *path = scratch("pressure");
  hearing h = {.n = 0};
  kvcached_options_t o;
  kvcached_ledger_t l;
  CHECK_OK(kvcached_ledger_open(path, &l));
  CHECK_OK(kvcached_ledger_set_limit(l, NULL, 20 * page, 0, NULL));
  test_options(&o);
  o.ledger_path = path;
  o.group = "mine";
  o.limit = 16 * page;
  o.pool_limit = 0;
  hear(&h, &o);
  h.ctx = open_with(&o);
  kvcached_region_t a = reserve(h.ctx, KVCACHED_KV, 32 * page), b = reserve(h.ctx, KVCACHED_KV, 32 * page);
  CHECK_OK(kvcached_ensure(a, 0, 12 * page));
  put_ends(a, 0, 'a');
  CHECK_OK(kvcached_release(a, page, 11 * page));
  expect_events(&h, "");
  CHECK_OK(kvcached_ensure(b, 0, 10 * page)); /* at the limit: idle pages give way */
  kvcached_stats_t now = stats_of(h.ctx);
  if (on_host()) { /* where memory is a thing apart, it is used again instead */
    expect_events(&h, "t");
    CHECK_LE(now.mapped, 16 * page);
  } else {
    atomic_store(&h.n, 0);
  }
  CHECK_OK(kvcached_trim(h.ctx, 0, NULL)); /* 11 pages are left */
  expect_events(&h, "t");
  CHECK_OK(kvcached_release(b, 5 * page, 5 * page));

  peer p = peer_start(path, "theirs", UINT64_MAX, -1);
  peer_expect_open(p);
  peer_expect(p, "fill 13 7", "ok"); /* 9 are free: five idle ones are asked for */
  expect_events(&h, "t");
  CHECK_EQ(stats_of(h.ctx).mapped, 6 * page);
  peer_expect(p, "fill 18 7", "ok"); /* and then it has to sleep */
  expect_events(&h, "Ss");
  CHECK_EQ(last_heard(&h, KVCACHED_EVENT_SLEPT).asleep, 6 * page);
  peer_stop(&p);
  CHECK_OK(kvcached_enter(h.ctx));
  expect_events(&h, "w");
  CHECK(holds_ends(a, 0, 'a'));
  CHECK_OK(kvcached_leave(h.ctx));
  check_context(h.ctx);
  kvcached_shutdown(h.ctx);
  kvcached_ledger_close(l);
}

/* SLEEPING is followed by SLEPT, or by WOKE when it came to nothing; and what fails before it is no event. */
TEST(events, of_a_sleep_that_fails) {
  hearing h = {.refuse_calls = 1};
  scene s = set_up_heard(&h, NULL);
  fault_set(FAULT_UNMAP, 1, KVCACHED_E_DEVICE);
  CHECK_IS(kvcached_sleep(s.ctx, KVCACHED_ALL_KINDS, 100, NULL), KVCACHED_E_DEVICE);
  CHECK_DETAIL("injected"); /* whatever failed in the event function */
  expect_events(&h, "Sw");
  CHECK_EQ(last_heard(&h, KVCACHED_EVENT_WOKE).asleep, 0);
  CHECK(kv_is_there(&s) && weights_are_there(&s));
  fault_set(FAULT_QUIESCE, 2, KVCACHED_E_DEVICE); /* for what was launched in there */
  CHECK_IS(kvcached_sleep(s.ctx, KVCACHED_ALL_KINDS, 100, NULL), KVCACHED_E_DEVICE);
  CHECK_DETAIL("injected");
  expect_events(&h, "Sw");
  fault_set(FAULT_QUIESCE, 1, KVCACHED_E_DEVICE);
  CHECK_IS(kvcached_sleep(s.ctx, KVCACHED_ALL_KINDS, 100, NULL), KVCACHED_E_DEVICE);
  CHECK_OK(kvcached_enter(s.ctx));
  CHECK_IS(kvcached_sleep(s.ctx, KVCACHED_ALL_KINDS, 100, NULL), KVCACHED_E_BUSY);
  CHECK_OK(kvcached_leave(s.ctx));
  put(s.kv, 0, 'k', s.page); /* so that it needs a copy */
  fault_set(FAULT_READ, 1, KVCACHED_E_DEVICE);
  CHECK_IS(kvcached_sleep(s.ctx, KV, 100, NULL), KVCACHED_E_DEVICE);
  fault_clear();
  expect_events(&h, "");
  go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
  expect_events(&h, "Ss");
  fault_set(FAULT_MAP, 1, KVCACHED_E_DEVICE);
  CHECK_IS(kvcached_enter(s.ctx), KVCACHED_E_DEVICE); /* nothing woke */
  CHECK_DETAIL("injected");
  fault_clear();
  expect_events(&h, "");
  enter_and_leave(s.ctx);
  expect_events(&h, "w");
  CHECK(holds(s.kv, 0, 'k', s.page) && weights_are_there(&s));
  check_context(s.ctx);
  kvcached_shutdown(s.ctx);
}

/* Calls from in there do not hang, they are refused, and do no harm. */
TEST(events, calls_in_there_are_refused) {
  hearing h = {.refuse_calls = 1};
  scene s = set_up_heard(&h, "refused");
  for (int i = 0; i < 3; i++) {
    go_to_sleep(s.ctx, KVCACHED_ALL_KINDS);
    enter_and_leave(s.ctx);
    CHECK(kv_is_there(&s) && weights_are_there(&s));
    CHECK_OK(kvcached_release(s.kv, 12 * s.page, s.page));
  }
  expect_events(&h, "SswSswSsw");
  check_context(s.ctx);
  kvcached_shutdown(s.ctx);
}

/* ---- what may be done in there ---- */

static void use_the_device(hearing *h, int event) {
  (void)h;
  (void)event;
  const kvc_cuda_driver *d;
  cu_device device;
  cu_context before, mine, popped;
  void *p;
  CHECK_OK(kvc_cuda_load(&d));
  CHECK_EQ(d->ctx_get_current(&before), 0);
  CHECK_EQ(d->device_get(&device, 0), 0);
  CHECK_EQ(d->primary_retain(&mine, device), 0);
  CHECK_EQ(d->ctx_push(mine), 0);
  CHECK_EQ(d->mem_host_alloc(&p, 4096, CU_HOST_ALLOC_PORTABLE), 0);
  CHECK_EQ(d->ctx_synchronize(), 0);
  CHECK_EQ(d->mem_free_host(p), 0);
  CHECK_EQ(d->ctx_pop(&popped), 0);
  CHECK_EQ(d->primary_release(device), 0);
}

TEST_CUDA(events, calls_of_the_driver_are_fine) {
  hearing h = {.also = use_the_device};
  scene s = set_up_heard(&h, "driver");
  kvcached_ledger_t l;
  CHECK_OK(kvcached_ledger_open(s.ledger, &l));
  for (int i = 0; i < 2; i++) {
    CHECK_OK(kvcached_ledger_command(l, slot_of_ctx(s.ctx), KVCACHED_CMD_SLEEP, 5000, NULL));
    enter_and_leave(s.ctx);
  }
  expect_events(&h, "SswSsw");
  CHECK(kv_is_there(&s));
  kvcached_ledger_close(l);
  check_context(s.ctx);
  kvcached_shutdown(s.ctx);
}

/* ---- many threads ---- */

typedef struct work {
  hearing h;
  kvcached_ctx_t ctx;
  atomic_int ends;
} work;

static void *use(void *arg) {
  work *w = arg;
  const size_t page = test_page();
  kvcached_region_t r = reserve(w->ctx, KVCACHED_KV, 8 * page);
  for (int tag = 1; !w->ends; tag = tag % 100 + 1) {
    CHECK_OK(kvcached_enter(w->ctx));
    CHECK_OK(kvcached_ensure(r, 0, 4 * page));
    put_ends(r, 0, tag);
    CHECK_OK(kvcached_leave(w->ctx));
    CHECK_OK(kvcached_enter(w->ctx));
    CHECK(holds_ends(r, 0, tag));
    CHECK_OK(kvcached_leave(w->ctx));
    CHECK_OK(kvcached_release(r, page, 3 * page));
  }
  kvcached_unreserve(r);
  return NULL;
}

static void *put_to_sleep(void *arg) {
  work *w = arg;
  while (!w->ends) {
    (void)kvcached_trim(w->ctx, 0, NULL);
    (void)kvcached_sleep(w->ctx, KVCACHED_ALL_KINDS, 50, NULL);
  }
  return NULL;
}

/* One at a time, in pairs, with figures that add up: by the plain counter, and by ThreadSanitizer. */
TEST(events, come_one_at_a_time) {
  static work w;
  kvcached_options_t o;
  test_options(&o);
  o.lookahead = KVCACHED_LOOKAHEAD_THREAD;
  o.idle_trim_ms = 1;
  hear(&w.h, &o);
  w.ctx = open_with(&o);
  pthread_t t[4];
  for (int i = 0; i < 4; i++) CHECK(pthread_create(&t[i], NULL, i < 3 ? use : put_to_sleep, &w) == 0);
  WAIT_FOR(atomic_load(&w.h.n) >= HEARD_MAX);
  w.ends = 1;
  for (int i = 0; i < 4; i++) pthread_join(t[i], NULL);
  int sleeping = 0;
  for (int i = 0; i < HEARD_MAX; i++) {
    CHECK(!sleeping || w.h.event[i] == KVCACHED_EVENT_SLEPT); /* nothing comes between the two */
    sleeping = w.h.event[i] == KVCACHED_EVENT_SLEEPING;
  }
  check_context(w.ctx);
  kvcached_shutdown(w.ctx);
  CHECK_EQ(w.h.plain, atomic_load(&w.h.n));
}
