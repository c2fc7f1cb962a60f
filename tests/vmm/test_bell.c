/* The ledger's bell: when it rings, and that nobody who waits for it is forgotten. */
#include "ledger_kit.h"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

/* How often it was rung by now. */
static uint32_t now_at(kvcached_ledger_t l) {
  uint32_t seen = UINT32_MAX;
  CHECK_OK(kvcached_ledger_wait(l, &seen, 0));
  return seen;
}

/* Whether a statement rings it; the count does not move by itself. */
#define RINGS(l, rung, statement)   \
  do {                              \
    uint32_t before_ = now_at(l);   \
    CHECK_EQ(now_at(l), before_);   \
    statement;                      \
    if (rung)                       \
      CHECK(now_at(l) != before_);  \
    else                            \
      CHECK_EQ(now_at(l), before_); \
  } while (0)

TEST(bell, is_rung_when_something_changed) {
  const char *path = scratch("rung");
  const size_t page = test_page();
  kvcached_ledger_t l = open_ledger(path);
  int slot;
  kvcached_options_t o;
  kvcached_ctx_t ctx;
  kvcached_region_t r, other;
  test_options(&o);
  o.ledger_path = path;
  o.group = "g";
  o.pool_limit = 0;
  RINGS(l, 1, CHECK_OK(kvcached_ledger_lease(l, "g", "m", 0, 0, UINT64_MAX, &slot)));
  o.slot = slot;
  RINGS(l, 1, ctx = open_with(&o));
  r = reserve(ctx, KVCACHED_KV, 64 * page);
  other = reserve(ctx, KVCACHED_KV, 64 * page);
  RINGS(l, 0, CHECK_OK(kvcached_ensure(r, 0, 8 * page)));
  RINGS(l, 0, CHECK_OK(kvcached_ensure(other, 0, 8 * page)));
  RINGS(l, 0, CHECK_OK(kvcached_enter(ctx)));
  RINGS(l, 0, CHECK_OK(kvcached_leave(ctx)));
  RINGS(l, 0, CHECK_OK(kvcached_release(r, 0, 4 * page))); /* nobody wants it */
  RINGS(l, 1, CHECK_OK(kvcached_trim(ctx, 0, NULL)));
  RINGS(l, 0, CHECK_OK(kvcached_trim(ctx, 0, NULL)));
  RINGS(l, 1, CHECK_OK(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 0, NULL)));
  RINGS(l, 0, CHECK_OK(kvcached_wake(ctx, KVCACHED_ALL_KINDS)));
  RINGS(l, 1, kvcached_unreserve(other));
  RINGS(l, 1, CHECK_OK(kvcached_ledger_set_limit(l, "g", 1000 * page, 0, NULL)));
  RINGS(l, 0, CHECK_OK(kvcached_ledger_command(l, slot, KVCACHED_CMD_TRIM, 5000, NULL)));
  /* While somebody wants memory, also what happens all the time. */
  kvc_ledger_map *map = map_ledger(path);
  atomic_store(&map->wanted, (uint64_t)now_ms() * 1000000 + 900000000);
  RINGS(l, 1, CHECK_OK(kvcached_release(r, 0, 5 * page)));
  RINGS(l, 0, CHECK_OK(kvcached_enter(ctx)));
  RINGS(l, 1, CHECK_OK(kvcached_leave(ctx)));
  atomic_store(&map->wanted, UINT64_MAX); /* a damaged file */
  RINGS(l, 0, CHECK_OK(kvcached_enter(ctx)));
  RINGS(l, 0, CHECK_OK(kvcached_leave(ctx)));
  unmap_ledger(map);
  RINGS(l, 1, kvcached_shutdown(ctx));
  RINGS(l, 1, CHECK_OK(kvcached_ledger_unlease(l, slot)));
  kvcached_ledger_close(l);
}

TEST_HOST(bell, arguments_and_time) {
  const char *path = scratch("time");
  kvcached_ledger_t l = open_ledger(path);
  uint32_t seen = 7;
  CHECK_IS(kvcached_ledger_wait(NULL, &seen, 0), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_wait(l, NULL, 0), KVCACHED_E_INVAL);
  CHECK_DETAIL("seen");
  seen = now_at(l);
  const uint32_t before = seen;
  int64_t start = now_ms();
  CHECK_OK(kvcached_ledger_wait(l, &seen, 200));
  CHECK_LE(190, now_ms() - start);
  CHECK_LE(now_ms() - start, 1500);
  CHECK_EQ(seen, before);
  user u = user_take(path, "g");
  start = now_ms();
  CHECK_OK(kvcached_ledger_wait(l, &seen, 60000)); /* rung already */
  CHECK_LE(now_ms() - start, 5000);
  CHECK(seen != before);
  user_end(&u);
  kvcached_ledger_close(l);
}

/* ---- many wait ---- */

enum { WAITERS = 4, RINGS_EACH = 2000 };

typedef struct hall {
  const char *path;
  _Atomic uint32_t started, last[WAITERS];
  _Atomic int ends;
} hall;

/* Waits again and again, for much longer than the test may take: a ring that is lost shows. */
static void wait_in(hall *h, int i) {
  kvcached_ledger_t l = open_ledger(h->path);
  uint32_t seen = now_at(l);
  h->last[i] = seen;
  h->started++;
  while (!h->ends) {
    CHECK_OK(kvcached_ledger_wait(l, &seen, 120000));
    h->last[i] = seen;
  }
  kvcached_ledger_close(l);
}

static hall *lobby;

static void *thread_waits(void *arg) {
  wait_in(lobby, (int)(intptr_t)arg);
  return NULL;
}

static void process_waits(void *arg) { wait_in(lobby, (int)(intptr_t)arg); }

TEST_HOST(bell, no_ring_is_lost_on_threads_and_processes) {
  const char *path = scratch("hall");
  kvcached_ledger_t l = open_ledger(path);
  pthread_t thread[WAITERS / 2];
  pid_t pid[WAITERS / 2];
  lobby = shared_memory(sizeof(*lobby));
  lobby->path = path;
  for (int i = 0; i < WAITERS / 2; i++) pid[i] = child_start(process_waits, (void *)(intptr_t)i);
  for (int i = 0; i < WAITERS / 2; i++)
    CHECK(pthread_create(&thread[i], NULL, thread_waits, (void *)(intptr_t)(WAITERS / 2 + i)) == 0);
  WAIT_FOR(lobby->started == WAITERS);
  for (unsigned n = 0; n < RINGS_EACH; n++) {
    kvc_ledger_bell_ring(l);
    if (n % 7) continue;
    /* All of them come by: nobody sleeps on. */
    for (int i = 0; i < WAITERS; i++) WAIT_FOR(lobby->last[i] == now_at(l));
  }
  /* One that is killed while it waits is missed by nobody. */
  child_kill(pid[0]);
  for (unsigned n = 0; n < 100; n++) {
    kvc_ledger_bell_ring(l);
    for (int i = 1; i < WAITERS; i++) WAIT_FOR(lobby->last[i] == now_at(l));
  }
  lobby->ends = 1;
  kvc_ledger_bell_ring(l);
  child_join(pid[1]);
  for (int i = 0; i < WAITERS / 2; i++) pthread_join(thread[i], NULL);
  kvcached_ledger_close(l);
}

static void child_may_not(void *arg) {
  uint32_t seen = 0;
  CHECK_IS(kvcached_ledger_wait(arg, &seen, 0), KVCACHED_E_FORKED);
}

TEST_HOST(bell, not_in_a_forked_child) {
  kvcached_ledger_t l = open_ledger(scratch("forked"));
  child_join(child_start(child_may_not, l));
  kvcached_ledger_close(l);
}
