/* The gate: who is inside, who is alone, how long anybody waits, and what others see of it. */
#include "gate.h"
#include "context.h"
#include "support.h"

#include <pthread.h>
#include <stdatomic.h>

/* ---- the gate by itself ---- */

TEST_HOST(gate, counts_threads_not_entries) {
  kvc_gate g;
  int edge;
  uint32_t inside;
  CHECK_OK(kvc_gate_init(&g));
  CHECK(!kvc_gate_is_inside(&g));
  CHECK_IS(kvc_gate_leave(&g, &edge, &inside), KVCACHED_E_INVAL);
  CHECK_OK(kvc_gate_enter(&g, &edge, &inside));
  CHECK(edge && inside == 1 && kvc_gate_is_inside(&g));
  CHECK_OK(kvc_gate_enter(&g, &edge, &inside));
  CHECK(!edge && inside == 1);
  CHECK_IS(kvc_gate_lock(&g, 10000), KVCACHED_E_BUSY); /* at once: it would wait for itself */
  CHECK_OK(kvc_gate_leave(&g, &edge, &inside));
  CHECK(!edge && inside == 1);
  CHECK_OK(kvc_gate_leave(&g, &edge, &inside));
  CHECK(edge && inside == 0 && !kvc_gate_is_inside(&g));
  CHECK_OK(kvc_gate_lock(&g, 0));
  kvc_gate_unlock(&g);
  kvc_gate_destroy(&g);
}

/* A thread remembers the gates it is in, many at once and in any order. */
TEST_HOST(gate, many_gates_on_one_thread) {
  enum { N = 64 };
  kvc_gate g[N];
  int edge;
  uint32_t inside;
  for (int i = 0; i < N; i++) {
    CHECK_OK(kvc_gate_init(&g[i]));
    CHECK_OK(kvc_gate_enter(&g[i], &edge, &inside));
    CHECK(edge);
  }
  for (int i = 0; i < N; i += 3) {
    CHECK_OK(kvc_gate_leave(&g[i], &edge, &inside));
    CHECK(edge && inside == 0);
  }
  for (int i = 0; i < N; i++) CHECK_EQ(kvc_gate_is_inside(&g[i]), i % 3 != 0);
  for (int i = 0; i < N; i++)
    if (i % 3) CHECK_OK(kvc_gate_leave(&g[i], &edge, &inside));
  for (int i = 0; i < N; i++) kvc_gate_destroy(&g[i]);
  CHECK_OK(kvc_gate_init(&g[0])); /* in the same memory: another gate */
  CHECK(!kvc_gate_is_inside(&g[0]));
  kvc_gate_destroy(&g[0]);
}

enum { THREADS = 6 };

typedef struct crowd {
  kvc_gate gate;
  atomic_int shared, alone, ends;
  atomic_uint visits, locks;
} crowd;

static void *visit(void *arg) {
  crowd *c = arg;
  int edge;
  uint32_t inside;
  while (!c->ends) {
    CHECK_OK(kvc_gate_enter(&c->gate, &edge, &inside));
    c->shared++;
    CHECK_EQ(c->alone, 0);
    CHECK(inside >= 1 && inside <= THREADS);
    CHECK_OK(kvc_gate_enter(&c->gate, &edge, &inside));
    CHECK_EQ(c->alone, 0);
    CHECK_OK(kvc_gate_leave(&c->gate, &edge, &inside));
    c->shared--;
    CHECK_OK(kvc_gate_leave(&c->gate, &edge, &inside));
    c->visits++;
  }
  return NULL;
}

static void *be_alone(void *arg) {
  crowd *c = arg;
  while (!c->ends) {
    int err = kvc_gate_lock(&c->gate, 50);
    if (err) {
      CHECK_IS(err, KVCACHED_E_BUSY);
      continue;
    }
    CHECK_EQ(++c->alone, 1);
    CHECK_EQ(c->shared, 0);
    c->alone--;
    kvc_gate_unlock(&c->gate);
    c->locks++;
    sleep_ms(1);
  }
  return NULL;
}

/* Nobody is alone while others are inside, and neither side starves. */
TEST_HOST(gate, excludes) {
  crowd c = {.ends = 0};
  CHECK_OK(kvc_gate_init(&c.gate));
  pthread_t t[THREADS + 2];
  for (int i = 0; i < THREADS + 2; i++)
    CHECK(pthread_create(&t[i], NULL, i < THREADS ? visit : be_alone, &c) == 0);
  WAIT_FOR(c.visits > 2000 && c.locks > 20);
  c.ends = 1;
  for (int i = 0; i < THREADS + 2; i++) pthread_join(t[i], NULL);
  CHECK_EQ(c.shared + c.alone, 0);
  kvc_gate_destroy(&c.gate);
}

/* ---- through the library ---- */

typedef struct guest {
  kvcached_ctx_t ctx;
  kvcached_region_t region;
  atomic_int stage, result;
} guest;

/* Goes in, says so, stays until told to leave; on the way it enters once more when told to. */
static void *stay(void *arg) {
  guest *g = arg;
  CHECK_OK(kvcached_enter(g->ctx));
  g->stage = 1;
  while (g->stage == 1) sleep_ms(1);
  if (g->stage == 2) { /* while another waits to be alone: must not wait for it */
    CHECK_OK(kvcached_enter(g->ctx));
    CHECK_OK(kvcached_leave(g->ctx));
    g->stage = 3;
    while (g->stage == 3) sleep_ms(1);
  }
  CHECK_OK(kvcached_leave(g->ctx));
  return NULL;
}

static void *sleep_long(void *arg) {
  guest *g = arg;
  g->result = 1;
  g->result = kvcached_sleep(g->ctx, KVCACHED_ALL_KINDS, 8000, NULL);
  return NULL;
}

static pthread_t go(void *(*body)(void *), guest *g) {
  pthread_t t;
  CHECK(pthread_create(&t, NULL, body, g) == 0);
  return t;
}

TEST(gate, enter_and_leave) {
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  CHECK_IS(kvcached_leave(ctx), KVCACHED_E_INVAL);
  CHECK_OK(kvcached_enter(ctx));
  CHECK_OK(kvcached_enter(ctx));
  CHECK_IS(kvcached_trim(ctx, 0, NULL), KVCACHED_E_BUSY);
  CHECK_IS(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 5000, NULL), KVCACHED_E_BUSY);
  CHECK_OK(kvcached_leave(ctx));
  int64_t start = now_ms();
  CHECK_IS(kvcached_trim(ctx, 0, NULL), KVCACHED_E_BUSY);
  CHECK_LE(now_ms() - start, 500); /* it does not wait for itself */
  CHECK_OK(kvcached_leave(ctx));
  CHECK_IS(kvcached_leave(ctx), KVCACHED_E_INVAL);
  CHECK_OK(kvcached_trim(ctx, 0, NULL));
  CHECK_OK(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 0, NULL));
  kvcached_shutdown(ctx);
}

TEST(gate, others_inside_are_waited_for_and_no_longer) {
  guest g = {.ctx = open_alone(0, UINT64_MAX)};
  pthread_t t = go(stay, &g);
  WAIT_FOR(g.stage == 1);
  CHECK_IS(kvcached_leave(g.ctx), KVCACHED_E_INVAL); /* it is the other thread that is inside */
  int64_t start = now_ms();
  CHECK_IS(kvcached_sleep(g.ctx, KVCACHED_ALL_KINDS, 150, NULL), KVCACHED_E_BUSY);
  int64_t took = now_ms() - start;
  CHECK_LE(145, took);
  CHECK_LE(took, 1500);
  CHECK_OK(kvcached_enter(g.ctx)); /* shared: no matter who has given up before */
  CHECK_OK(kvcached_leave(g.ctx));
  g.stage = 4;
  pthread_join(t, NULL);
  CHECK_OK(kvcached_sleep(g.ctx, KVCACHED_ALL_KINDS, 0, NULL));
  kvcached_shutdown(g.ctx);
}

TEST(gate, who_is_inside_may_enter_again_while_one_waits) {
  guest g = {.ctx = open_alone(0, UINT64_MAX)};
  g.region = reserve(g.ctx, KVCACHED_KV, 4 * test_page());
  CHECK_OK(kvcached_ensure(g.region, 0, 4 * test_page()));
  put(g.region, 0, 'g', test_page());
  pthread_t inside = go(stay, &g);
  WAIT_FOR(g.stage == 1);
  pthread_t sleeper = go(sleep_long, &g);
  WAIT_FOR(g.result == 1);
  sleep_ms(20);
  g.stage = 2;
  WAIT_FOR(g.stage == 3); /* it could enter again */
  CHECK_EQ(g.result, 1);  /* and the other still waits */
  g.stage = 4;
  pthread_join(inside, NULL);
  pthread_join(sleeper, NULL);
  CHECK_OK(g.result);
  CHECK_EQ(stats_of(g.ctx).asleep, 4 * test_page());
  CHECK_OK(kvcached_enter(g.ctx));
  CHECK(holds(g.region, 0, 'g', test_page()));
  CHECK_OK(kvcached_leave(g.ctx));
  kvcached_shutdown(g.ctx);
}

/* Who wants to be alone keeps newcomers out, but not longer than it waits itself. */
TEST(gate, newcomers_wait_a_bounded_time) {
  kvcached_options_t o;
  test_options(&o);
  o.room_wait_ms = 200;
  guest g = {.ctx = open_with(&o)};
  pthread_t inside = go(stay, &g);
  WAIT_FOR(g.stage == 1);
  for (int i = 0; i < 3; i++) {
    int64_t start = now_ms();
    CHECK_IS(kvcached_trim(g.ctx, 0, NULL), KVCACHED_E_BUSY);
    CHECK_LE(now_ms() - start, 1500);
    start = now_ms();
    CHECK_OK(kvcached_enter(g.ctx));
    CHECK_OK(kvcached_leave(g.ctx));
    CHECK_LE(now_ms() - start, 1500);
  }
  g.stage = 4;
  pthread_join(inside, NULL);
  kvcached_shutdown(g.ctx);
}

/* What nobody may touch is no reason to wait for those inside without end. */
TEST(gate, idle_pages_go_also_then) {
  const size_t page = test_page();
  kvcached_options_t o;
  test_options(&o);
  o.room_wait_ms = 100;
  o.pool_limit = 0;
  o.limit = 8 * page;
  guest g = {.ctx = open_with(&o)};
  kvcached_region_t r = reserve(g.ctx, KVCACHED_KV, 16 * page);
  CHECK_OK(kvcached_ensure(r, 0, 8 * page));
  put(r, 0, 'i', 2 * page);
  pthread_t inside = go(stay, &g);
  WAIT_FOR(g.stage == 1);
  CHECK_OK(kvcached_release(r, 2 * page, 6 * page));
  CHECK_OK(kvcached_ensure(r, 8 * page, 4 * page)); /* room that is the context's own */
  CHECK_EQ(stats_of(g.ctx).mapped, 8 * page);
  CHECK_EQ(stats_of(g.ctx).idle, 2 * page);
  int64_t start = now_ms();
  kvcached_set_limit(g.ctx, 0);
  CHECK_LE(now_ms() - start, 1500);
  CHECK_EQ(stats_of(g.ctx).idle, 0);
  CHECK_EQ(stats_of(g.ctx).mapped, 6 * page);
  CHECK(holds(r, 0, 'i', 2 * page) && holds(r, 8 * page, 0, 4 * page));
  g.stage = 4;
  pthread_join(inside, NULL);
  check_context(g.ctx);
  kvcached_shutdown(g.ctx);
}

TEST(gate, contexts_have_their_own) {
  kvcached_ctx_t a = open_alone(0, UINT64_MAX), b = open_alone(0, UINT64_MAX);
  CHECK_OK(kvcached_enter(a));
  CHECK_OK(kvcached_sleep(b, KVCACHED_ALL_KINDS, 0, NULL));
  CHECK_OK(kvcached_trim(b, 0, NULL));
  CHECK_IS(kvcached_leave(b), KVCACHED_E_INVAL);
  CHECK_OK(kvcached_enter(b));
  CHECK_OK(kvcached_leave(a));
  CHECK_OK(kvcached_trim(a, 0, NULL));
  CHECK_OK(kvcached_leave(b));
  kvcached_shutdown(a);
  kvcached_shutdown(b);
}

/* Buffers are made and dropped in the middle of work: compute buffers that grow, weights that are loaded. */
TEST(gate, regions_come_and_go_inside) {
  const size_t page = test_page(), large = test_large_page();
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = scratch("inside");
  o.idle_trim_ms = 1;
  guest g = {.ctx = open_with(&o)};
  pthread_t other = go(stay, &g);
  WAIT_FOR(g.stage == 1);
  CHECK_OK(kvcached_enter(g.ctx));
  kvcached_region_t kv = reserve(g.ctx, KVCACHED_KV, 4 * page);
  CHECK_OK(kvcached_ensure(kv, 0, page));
  put(kv, 0, 'k', page);
  for (size_t n = 1; n < 5; n++) {
    kvcached_region_t compute = reserve(g.ctx, KVCACHED_SCRATCH, n * large + page);
    kvcached_region_t weights = reserve(g.ctx, KVCACHED_WEIGHTS, n * large);
    CHECK_OK(kvcached_ensure(compute, 0, n * large + page));
    CHECK_OK(kvcached_ensure(weights, 0, n * large));
    CHECK_OK(kvcached_enter(g.ctx)); /* nested too */
    CHECK(holds_ends(compute, n, 0) && holds_ends(weights, n - 1, 0));
    put_ends(weights, n - 1, 'w');
    kvcached_unreserve(compute);
    CHECK(holds_ends(weights, n - 1, 'w'));
    CHECK_OK(kvcached_leave(g.ctx));
    CHECK_OK(kvcached_release(weights, 0, n * large));
    kvcached_unreserve(weights);
    CHECK_EQ(stats_of(g.ctx).mapped, page);
  }
  CHECK(holds(kv, 0, 'k', page));
  CHECK_OK(kvcached_leave(g.ctx));
  g.stage = 4;
  pthread_join(other, NULL);
  check_context(g.ctx);
  kvcached_shutdown(g.ctx);
}

/* A device that is opened, entered and closed while the process is at work on another one. */
TEST(gate, contexts_open_while_others_are_entered) {
  const size_t page = test_page();
  const char *path = scratch("several");
  guest g = {.ctx = open_in(path, "g", UINT64_MAX)};
  pthread_t other = go(stay, &g);
  WAIT_FOR(g.stage == 1);
  CHECK_OK(kvcached_enter(g.ctx));
  for (int i = 0; i < 3; i++) {
    kvcached_ctx_t more = open_in(path, "g", UINT64_MAX);
    kvcached_region_t r = reserve(more, KVCACHED_KV, 4 * page);
    CHECK_OK(kvcached_enter(more));
    CHECK_OK(kvcached_ensure(r, 0, 4 * page));
    put(r, 0, 'm', page);
    CHECK_OK(kvcached_leave(more));
    CHECK_OK(kvcached_sleep(more, KVCACHED_ALL_KINDS, 0, NULL)); /* nobody is inside this one */
    CHECK_OK(kvcached_enter(more));
    CHECK(holds(r, 0, 'm', page));
    CHECK_OK(kvcached_leave(more));
    kvcached_shutdown(more);
  }
  CHECK_OK(kvcached_leave(g.ctx));
  g.stage = 4;
  pthread_join(other, NULL);
  CHECK_OK(kvcached_sleep(g.ctx, KVCACHED_ALL_KINDS, 0, NULL));
  kvcached_shutdown(g.ctx);
}

/* The marks are made with a clock that is cheap to read and steps on up to every 10 ms. */
#define TICK UINT64_C(20000000)

TEST(gate, shows_in_the_ledger) {
  const char *path = scratch("marks");
  guest g = {.ctx = open_in(path, "g", UINT64_MAX)};
  int slot = slot_of_ctx(g.ctx);
  kvcached_slot_t s = slot_in(path, slot);
  CHECK_EQ(s.inside + s.queued, 0);
  CHECK_EQ(s.controlled, 1);
  CHECK_EQ(s.woke_ns, 0);
  uint64_t before = (uint64_t)kvc_now_ns();
  pthread_t other = go(stay, &g);
  WAIT_FOR(g.stage == 1);
  CHECK_OK(kvcached_enter(g.ctx));
  CHECK_OK(kvcached_enter(g.ctx));
  CHECK_OK(kvcached_set_queued(g.ctx, 7));
  s = slot_in(path, slot);
  CHECK_EQ(s.inside, 2);
  CHECK_EQ(s.queued, 7);
  CHECK_LE(before - TICK, s.last_use_ns);
  CHECK_LE(s.last_use_ns, kvc_now_ns());
  CHECK_OK(kvcached_leave(g.ctx));
  CHECK_EQ(slot_in(path, slot).inside, 2);
  before = (uint64_t)kvc_now_ns();
  CHECK_OK(kvcached_leave(g.ctx));
  CHECK_EQ(slot_in(path, slot).inside, 1);
  g.stage = 4;
  pthread_join(other, NULL);
  CHECK_OK(kvcached_set_queued(g.ctx, 0));
  s = slot_in(path, slot);
  CHECK_EQ(s.inside + s.queued, 0);
  CHECK_LE(before - TICK, s.last_use_ns); /* leaving is use too */
  kvcached_shutdown(g.ctx);
}
