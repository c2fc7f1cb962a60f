/* Many threads: on one context, on contexts that share a limit, on one ledger handle. Meant for
 * ThreadSanitizer as well. */
#include "support.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>

/* A thread that has won nothing after ROUNDS goes on, up to PATIENCE times as long: that everybody wins in the end is the
 * library's promise, that everybody wins soon is the scheduler's. */
enum { THREADS = 6, ROUNDS = 150, PATIENCE = 200, PAGES = 64 };
static const size_t page = 4096;

typedef struct job {
  kvcached_ctx_t ctx;
  kvcached_ledger_t ledger;
  _Atomic uint64_t *held;
  uint64_t limit;
  unsigned seed, won;
} job;

static int goes_on(const job *j, int round) {
  if (round >= ROUNDS && j->won == 0) sched_yield();
  return round < ROUNDS || (j->won == 0 && round < PATIENCE * ROUNDS);
}

static void *use_region(void *arg) {
  job *j = arg;
  kvcached_region_t r;
  CHECK_OK(kvcached_reserve(j->ctx, PAGES * page, &r));
  for (int i = 0; goes_on(j, i); i++) {
    size_t first = next_random(&j->seed) % PAGES, n = 1 + next_random(&j->seed) % (PAGES - first);
    char *p = (char *)kvcached_region_base(r) + first * page;
    int err = kvcached_ensure(r, first * page, n * page);
    if (err == KVCACHED_OK) {
      j->won++;
      CHECK(all_bytes(p, n * page, 0));
      memset(p, (int)i + 1, n * page);
      uint64_t now = atomic_fetch_add(j->held, n * page) + n * page;
      CHECK(now <= j->limit);
      CHECK(all_bytes(p, n * page, (unsigned char)(i + 1)));
      atomic_fetch_sub(j->held, n * page);
      CHECK_OK(kvcached_release(r, first * page, n * page));
    } else {
      CHECK_IS(err, KVCACHED_E_LIMIT);
    }
    if (i % 3 == 0) CHECK_OK(kvcached_trim(j->ctx, 0, NULL));
    kvcached_stats_t s = stats_of(j->ctx);
    CHECK(s.mapped <= j->limit && s.idle <= s.mapped);
  }
  kvcached_unreserve(r);
  return NULL;
}

static void run_threads(job *jobs) {
  pthread_t t[THREADS];
  for (int i = 0; i < THREADS; i++) CHECK(pthread_create(&t[i], NULL, use_region, &jobs[i]) == 0);
  for (int i = 0; i < THREADS; i++) pthread_join(t[i], NULL);
}

static void test_one_context(void) {
  const uint64_t limit = 100 * page;
  _Atomic uint64_t held = 0;
  kvcached_ctx_t ctx = open_in(scratch("one"), "g", limit);
  job jobs[THREADS];
  for (unsigned i = 0; i < THREADS; i++) jobs[i] = (job){ctx, NULL, &held, limit, i + 1, 0};
  run_threads(jobs);
  for (int i = 0; i < THREADS; i++) CHECK(jobs[i].won > 0);
  CHECK_EQ(stats_of(ctx).mapped, 0);
  CHECK_EQ(stats_of(ctx).group_charge, 0);
  kvcached_shutdown(ctx);
}

static void test_contexts_of_one_group(void) {
  const uint64_t limit = 100 * page;
  const char *path = scratch("group");
  _Atomic uint64_t held = 0;
  job jobs[THREADS];
  for (unsigned i = 0; i < THREADS; i++)
    jobs[i] = (job){open_in(path, "g", limit), NULL, &held, limit, i + 1, 0};
  run_threads(jobs);
  for (int i = 0; i < THREADS; i++) {
    CHECK(jobs[i].won > 0);
    kvcached_shutdown(jobs[i].ctx);
  }
  CHECK_EQ(live_slots(path), 0);
}

static void *lease_and_look(void *arg) {
  job *j = arg;
  for (int i = 0; goes_on(j, i); i++) {
    int slot;
    size_t n;
    kvcached_slot_t all[THREADS + 2];
    all[0].struct_size = sizeof(all[0]);
    int err = kvcached_ledger_lease(j->ledger, "g", "m", 30, 0, 100, &slot);
    if (err) CHECK_IS(err, KVCACHED_E_LIMIT);
    CHECK_OK(kvcached_ledger_slots(j->ledger, all, THREADS + 2, &n));
    CHECK(n <= THREADS + 1);
    if (!err) {
      j->won++;
      CHECK_OK(kvcached_ledger_unlease(j->ledger, slot));
    }
  }
  return NULL;
}

static void test_one_ledger_handle(void) {
  kvcached_ledger_t l;
  CHECK_OK(kvcached_ledger_open(scratch("handle"), &l));
  job jobs[THREADS];
  pthread_t t[THREADS];
  for (int i = 0; i < THREADS; i++) {
    jobs[i] = (job){.ledger = l};
    CHECK(pthread_create(&t[i], NULL, lease_and_look, &jobs[i]) == 0);
  }
  for (int i = 0; i < THREADS; i++) pthread_join(t[i], NULL);
  for (int i = 0; i < THREADS; i++) CHECK(jobs[i].won > 0);
  kvcached_ledger_close(l);
}

int main(void) {
  RUN(test_one_context);
  RUN(test_contexts_of_one_group);
  RUN(test_one_ledger_handle);
  return 0;
}
