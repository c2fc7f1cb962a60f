/* Many threads: on one context, on contexts that share a limit, on one ledger handle, with the library's own
   helper and control threads at work beside them. Meant for ThreadSanitizer as well. */
#include "support.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

/* A thread that has won nothing after its rounds goes on, up to PATIENCE times as long: that everybody wins
   in the end is the library's promise, that everybody wins soon is the scheduler's. */
enum { THREADS = 6, PATIENCE = 200, PAGES = 24 };

typedef struct job {
  kvcached_ctx_t ctx;
  kvcached_ledger_t ledger;
  const char *path;
  _Atomic uint64_t *held;
  uint64_t limit;
  uint32_t seed;
  unsigned won, n;
} job;

static unsigned few(unsigned n) { return rounds(on_host() ? n : (n + 3) / 4); }

static int goes_on(const job *j, unsigned round) {
  if (round >= j->n && j->won == 0) sched_yield();
  return round < j->n || (j->won == 0 && round < PATIENCE * j->n);
}

static void run_threads(void *(*body)(void *), job *jobs, int n) {
  pthread_t t[THREADS + 2];
  for (int i = 0; i < n; i++) CHECK(pthread_create(&t[i], NULL, body, &jobs[i]) == 0);
  for (int i = 0; i < n; i++) pthread_join(t[i], NULL);
}

/* ---- a region each ---- */

static void *use_region(void *arg) {
  job *j = arg;
  const size_t page = kvcached_page_size(j->ctx);
  kvcached_region_t r = reserve(j->ctx, KVCACHED_KV, PAGES * page);
  for (unsigned i = 0; goes_on(j, i); i++) {
    size_t first = next_random(&j->seed) % PAGES, n = 1 + next_random(&j->seed) % (PAGES - first);
    const kvcached_range_t two[] = {{first * page, page}, {(first + n - 1) * page, page}};
    if (i % 4 == 0) CHECK_OK(kvcached_prepare(r, first * page, n * page));
    if (i % 4 == 2) CHECK_OK(kvcached_prepare_ranges(r, two, 2));
    int err = kvcached_ensure(r, first * page, n * page);
    if (err == KVCACHED_OK) {
      j->won++;
      for (size_t k = first; k < first + n; k++) {
        CHECK(holds_ends(r, k, 0));
        put_ends(r, k, (int)(i % 255) + 1);
      }
      uint64_t now = atomic_fetch_add(j->held, n * page) + n * page;
      CHECK_LE(now, j->limit);
      for (size_t k = first; k < first + n; k++) CHECK(holds_ends(r, k, (int)(i % 255) + 1));
      atomic_fetch_sub(j->held, n * page);
      CHECK_OK(kvcached_release(r, first * page, n * page));
    } else {
      CHECK_IS(err, KVCACHED_E_LIMIT);
    }
    if (i % 3 == 0) CHECK_OK(kvcached_trim(j->ctx, 0, NULL));
    kvcached_stats_t s = stats_of(j->ctx);
    CHECK_LE(s.mapped + s.pooled, j->limit);
    CHECK_LE(s.idle, s.mapped);
  }
  kvcached_unreserve(r);
  return NULL;
}

TEST(threads, one_context) {
  const uint64_t limit = 40 * test_page();
  _Atomic uint64_t held = 0;
  kvcached_ctx_t ctx = open_in(scratch("one"), "g", limit);
  job jobs[THREADS];
  for (unsigned i = 0; i < THREADS; i++)
    jobs[i] = (job){.ctx = ctx, .held = &held, .limit = limit, .seed = i + 1, .n = few(100)};
  run_threads(use_region, jobs, THREADS);
  for (int i = 0; i < THREADS; i++) CHECK(jobs[i].won > 0);
  CHECK_EQ(stats_of(ctx).mapped, 0);
  CHECK_EQ(stats_of(ctx).group_charge, stats_of(ctx).pooled);
  check_context(ctx);
  kvcached_shutdown(ctx);
}

TEST(threads, contexts_of_one_group) {
  const uint64_t limit = 40 * test_page();
  const char *path = scratch("group");
  _Atomic uint64_t held = 0;
  job jobs[THREADS];
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = path;
  o.group = "g";
  o.limit = limit;
  o.pool_limit = 0; /* what one context keeps, another of its group may miss for good */
  for (unsigned i = 0; i < THREADS; i++)
    jobs[i] = (job){.ctx = open_with(&o), .held = &held, .limit = limit, .seed = i + 1, .n = few(60)};
  run_threads(use_region, jobs, THREADS);
  for (int i = 0; i < THREADS; i++) {
    CHECK(jobs[i].won > 0);
    check_context(jobs[i].ctx);
    kvcached_shutdown(jobs[i].ctx);
  }
  CHECK_EQ(live_slots(path), 0);
}

/* ---- through the gate, with sleep in between ---- */

typedef struct hall {
  kvcached_ctx_t ctx;
  kvcached_region_t weights, kv;
  kvcached_ledger_t l;
  int slot;
  atomic_int ends;
  atomic_uint visits, sleeps, commands;
} hall;

/* Reads what is always there, and has pages of its own. */
static void *visit(void *arg) {
  hall *h = arg;
  uint32_t seed = (uint32_t)(uintptr_t)&seed | 1;
  const size_t page = kvcached_page_size(h->ctx);
  kvcached_region_t own = reserve(h->ctx, KVCACHED_KV, 8 * page);
  int tag = 0;
  while (!h->ends) {
    CHECK_OK(kvcached_enter(h->ctx));
    CHECK(holds_ends(h->weights, 0, 'w') && holds_ends(h->weights, 1, 'W') && holds_ends(h->kv, 3, 'k'));
    if (tag) CHECK(holds_ends(own, 0, tag) && holds_ends(own, 7, tag));
    switch (next_random(&seed) % 4) {
      case 0:
        CHECK_OK(kvcached_release(own, 0, 8 * page));
        tag = 0;
        break;
      case 1: CHECK_OK(kvcached_prepare(own, 0, 8 * page)); break;
      default:
        CHECK_OK(kvcached_ensure(own, 0, 8 * page));
        tag = 1 + (int)(next_random(&seed) % 255);
        put_ends(own, 0, tag);
        put_ends(own, 7, tag);
    }
    CHECK_OK(kvcached_enter(h->ctx)); /* once more, while others may want to be alone */
    CHECK_OK(kvcached_leave(h->ctx));
    CHECK_OK(kvcached_leave(h->ctx));
    h->visits++;
    if (next_random(&seed) % 8 == 0) sleep_ms(1);
  }
  kvcached_unreserve(own);
  return NULL;
}

static void expect_ok_or_busy(int err) {
  if (err) CHECK_IS(err, KVCACHED_E_BUSY);
}

static void *put_to_sleep(void *arg) {
  hall *h = arg;
  uint32_t seed = 12345;
  while (!h->ends) {
    switch (next_random(&seed) % 5) {
      case 0: expect_ok_or_busy(kvcached_trim(h->ctx, 0, NULL)); break;
      case 1: CHECK_OK(kvcached_prepare_sleep(h->ctx, KVCACHED_ALL_KINDS)); break;
      case 2: CHECK_OK(kvcached_trim_host(h->ctx, (int)(next_random(&seed) % 2), NULL)); break;
      case 3: CHECK_OK(kvcached_wake(h->ctx, KVCACHED_ALL_KINDS)); break;
      default: {
        size_t freed;
        int err = kvcached_sleep(h->ctx, 1 + next_random(&seed) % 7, 20, &freed);
        expect_ok_or_busy(err);
        if (!err && freed) h->sleeps++;
      }
    }
    CHECK_OK(kvcached_set_queued(h->ctx, next_random(&seed) % 3));
    sleep_ms(1);
  }
  return NULL;
}

/* Commands from outside, as another process would send them, and figures looked at. */
static void *send_commands(void *arg) {
  hall *h = arg;
  uint32_t seed = 777;
  while (!h->ends) {
    int what = 1 + (int)(next_random(&seed) % 3);
    int err = kvcached_ledger_command(h->l, h->slot, what, 300, NULL);
    if (err != KVCACHED_E_TIMEOUT) expect_ok_or_busy(err);
    h->commands += !err;
    kvcached_stats_t s = stats_of(h->ctx);
    CHECK_LE(s.idle, s.mapped);
    CHECK(kvcached_available(h->ctx) > 0);
    kvcached_slot_t slot = {.struct_size = sizeof(slot)};
    size_t n;
    CHECK_OK(kvcached_ledger_slots(h->l, &slot, 1, &n));
    CHECK_EQ(n, 1);
    sleep_ms(1);
  }
  return NULL;
}

TEST(threads, gate_and_sleep) {
  enum { VISITORS = 3 };
  const char *path = scratch("gate");
  hall h = {.ctx = open_in(path, "g", UINT64_MAX)};
  const size_t page = test_page();
  CHECK_OK(kvcached_ledger_open(path, &h.l));
  h.slot = slot_of_ctx(h.ctx);
  h.weights = reserve(h.ctx, KVCACHED_WEIGHTS, 2 * test_large_page());
  h.kv = reserve(h.ctx, KVCACHED_KV, 4 * page);
  CHECK_OK(kvcached_ensure(h.weights, 0, 2 * test_large_page()));
  CHECK_OK(kvcached_ensure(h.kv, 0, 4 * page));
  put_ends(h.weights, 0, 'w');
  put_ends(h.weights, 1, 'W');
  put_ends(h.kv, 3, 'k');
  pthread_t t[VISITORS + 2];
  for (int i = 0; i < VISITORS; i++) CHECK(pthread_create(&t[i], NULL, visit, &h) == 0);
  CHECK(pthread_create(&t[VISITORS], NULL, put_to_sleep, &h) == 0);
  CHECK(pthread_create(&t[VISITORS + 1], NULL, send_commands, &h) == 0);
  WAIT_FOR(h.visits > few(400) && h.sleeps > few(8) && h.commands > few(8));
  h.ends = 1;
  for (int i = 0; i < VISITORS + 2; i++) pthread_join(t[i], NULL);
  CHECK_OK(kvcached_wake(h.ctx, KVCACHED_ALL_KINDS));
  check_context(h.ctx);
  kvcached_ledger_close(h.l);
  kvcached_shutdown(h.ctx);
}

/* ---- one ledger handle ---- */

static void *lease_and_look(void *arg) {
  job *j = arg;
  for (unsigned i = 0; goes_on(j, i); i++) {
    int slot;
    size_t n;
    kvcached_slot_t all[THREADS + 2];
    all[0].struct_size = sizeof(all[0]);
    int err = kvcached_ledger_lease(j->ledger, "g", "m", 30, 0, 100, &slot);
    if (err) CHECK_IS(err, KVCACHED_E_LIMIT);
    CHECK_OK(kvcached_ledger_slots(j->ledger, all, THREADS + 2, &n));
    CHECK_LE(n, THREADS + 1);
    if (!err) {
      j->won++;
      CHECK_OK(kvcached_ledger_unlease(j->ledger, slot));
    }
  }
  return NULL;
}

TEST_HOST(threads, one_ledger_handle) {
  kvcached_ledger_t l;
  CHECK_OK(kvcached_ledger_open(scratch("handle"), &l));
  job jobs[THREADS];
  for (int i = 0; i < THREADS; i++) jobs[i] = (job){.ledger = l, .n = rounds(150)};
  run_threads(lease_and_look, jobs, THREADS);
  for (int i = 0; i < THREADS; i++) CHECK(jobs[i].won > 0);
  kvcached_ledger_close(l);
}

/* ---- contexts that come and go ---- */

static void *come_and_go(void *arg) {
  job *j = arg;
  for (unsigned i = 0; i < j->n; i++) {
    kvcached_options_t o;
    kvcached_ctx_t ctx;
    test_options(&o);
    o.ledger_path = j->path;
    o.group = "g";
    CHECK_OK(kvcached_open(&o, &ctx));
    kvcached_region_t r = reserve(ctx, KVCACHED_KV, PAGES * kvcached_page_size(ctx));
    CHECK_OK(kvcached_prepare(r, 0, kvcached_region_size(r)));
    if (i % 2) CHECK_OK(kvcached_prepare_sleep(ctx, KVCACHED_ALL_KINDS));
    CHECK_OK(kvcached_enter(ctx));
    CHECK_OK(kvcached_ensure(r, 0, 1));
    CHECK_OK(kvcached_leave(ctx));
    if (i % 3 == 0) CHECK_OK(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 100, NULL));
    kvcached_shutdown(ctx);
  }
  return NULL;
}

TEST(threads, contexts_come_and_go) {
  const char *path = scratch("come");
  (void)test_page(); /* before there are threads */
  job jobs[THREADS];
  for (int i = 0; i < THREADS; i++) jobs[i] = (job){.path = path, .n = few(12)};
  run_threads(come_and_go, jobs, THREADS);
  CHECK_EQ(live_slots(path), 0);
}
