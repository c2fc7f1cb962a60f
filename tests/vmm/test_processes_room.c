/* Room that processes on one card make for each other: whose memory is asked for, whose is not, and how long
   that may take. */
#include "support.h"

#include <signal.h>
#include <sys/wait.h>

static void expect_asleep(peer p, size_t bytes) {
  char line[64];
  snprintf(line, sizeof(line), "asleep %zu", bytes);
  peer_expect(p, "asleep", line);
}

/* A card's limit, a peer of another group that fills it, and a context that wants more. */
typedef struct tight {
  const char *path;
  kvcached_ledger_t l;
  kvcached_ctx_t ctx;
  kvcached_region_t r;
  peer p;
} tight;

static tight squeeze(const char *name, const char *peer_group, const char *more) {
  const size_t page = test_page();
  tight t = {.path = scratch(name)};
  CHECK_OK(kvcached_ledger_open(t.path, &t.l));
  CHECK_OK(kvcached_ledger_set_limit(t.l, NULL, 20 * page, 0, NULL));
  t.ctx = open_in(t.path, "mine", UINT64_MAX);
  t.r = reserve(t.ctx, KVCACHED_KV, 64 * page);
  t.p = peer_start_with(t.path, peer_group, UINT64_MAX, -1, more);
  peer_expect_open(t.p);
  return t;
}

static void release_all(tight *t) {
  peer_stop(&t->p);
  check_context(t->ctx);
  kvcached_shutdown(t->ctx);
  kvcached_ledger_close(t->l);
  CHECK_EQ(live_slots(t->path), 0);
}

TEST(processes, idle_memory_of_others_is_asked_for_first) {
  const size_t page = test_page();
  tight t = squeeze("others-trim", "theirs", "");
  peer_expect(t.p, "fill 16 7", "ok");
  peer_expect(t.p, "release 10", "ok");
  CHECK_OK(kvcached_ensure(t.r, 0, 12 * page)); /* 4 are free, 10 idle there */
  expect_asleep(t.p, 0);
  CHECK_LE(stats_of(t.ctx).card_charge, 20 * page);
  release_all(&t);
}

/* What a lease sets aside stays charged, however little of it is in use: a trim within it would help nobody.
   A sleep does, it ends the lease. */
TEST(processes, no_trim_within_a_lease) {
  const size_t page = test_page();
  tight t = {.path = scratch("leased")};
  int slot;
  CHECK_OK(kvcached_ledger_open(t.path, &t.l));
  CHECK_OK(kvcached_ledger_set_limit(t.l, NULL, 20 * page, 0, NULL));
  CHECK_OK(kvcached_ledger_lease(t.l, "theirs", "m", 16 * page, 0, UINT64_MAX, &slot));
  t.ctx = open_in(t.path, "mine", UINT64_MAX);
  t.r = reserve(t.ctx, KVCACHED_KV, 64 * page);
  t.p = peer_start(t.path, "theirs", UINT64_MAX, slot);
  peer_expect_open(t.p);
  peer_expect(t.p, "fill 16 7", "ok");
  peer_expect(t.p, "release 4", "ok");
  CHECK_OK(kvcached_ensure(t.r, 0, 4 * page)); /* what the lease leaves: nobody is asked */
  CHECK_EQ(slot_in(t.path, slot).idle, 4 * page);
  CHECK_OK(kvcached_ensure(t.r, 0, 12 * page));
  expect_asleep(t.p, 12 * page);
  kvcached_slot_t s = slot_in(t.path, slot);
  CHECK(s.leased && s.attached);
  CHECK_EQ(s.lease, 0);
  CHECK_EQ(s.charge, 0);
  CHECK_OK(kvcached_ensure(t.r, 0, 20 * page));
  kvcached_shutdown(t.ctx);
  peer_stop(&t.p);
  kvcached_ledger_close(t.l);
}

TEST(processes, others_sleep_where_that_is_not_enough) {
  const size_t page = test_page();
  tight t = squeeze("others-sleep", "theirs", "");
  peer_expect(t.p, "fill 16 7", "ok");
  CHECK_OK(kvcached_ensure(t.r, 0, 12 * page));
  put(t.r, 0, 'm', 12 * page);
  expect_asleep(t.p, 16 * page);
  CHECK_EQ(stats_of(t.ctx).card_charge, 12 * page);
  CHECK_IS(kvcached_ensure(t.r, 0, 21 * page), KVCACHED_E_LIMIT); /* more than there can ever be */
  CHECK(holds(t.r, 0, 'm', 12 * page));
  CHECK_OK(kvcached_release(t.r, 0, 12 * page)); /* idle: the other has it when it wants it */
  peer_expect(t.p, "check 16 7", "ok");
  CHECK_LE(stats_of(t.ctx).mapped, 4 * page);
  release_all(&t);
}

/* Nobody is put to sleep who is inside, has requests waiting, has just woken, belongs to the same group, or
   does not answer commands. */
static void no_victim(const char *name, const char *group, const char *more, const char *command) {
  const size_t page = test_page();
  tight t = squeeze(name, group, more);
  peer_expect(t.p, "fill 16 7", "ok");
  if (command) peer_expect(t.p, command, "ok");
  int64_t start = now_ms();
  CHECK_IS(kvcached_ensure(t.r, 0, 12 * page), KVCACHED_E_LIMIT);
  CHECK_LE(now_ms() - start, 2500);
  CHECK_EQ(stats_of(t.ctx).mapped, 0);
  expect_asleep(t.p, 0);
  CHECK_OK(kvcached_ensure(t.r, 0, 4 * page));
  release_all(&t);
}

TEST(processes, no_victim_inside) { no_victim("inside", "theirs", "", "enter"); }
TEST(processes, no_victim_with_requests) { no_victim("queued", "theirs", "", "queued 1"); }
TEST(processes, no_victim_of_the_same_group) { no_victim("same", "mine", "", NULL); }
TEST(processes, no_victim_without_a_thread) { no_victim("no-thread", "theirs", "no_control", NULL); }

TEST(processes, no_victim_that_has_just_woken) {
  const size_t page = test_page();
  tight t = squeeze("woken", "theirs", "");
  peer_expect(t.p, "fill 16 7", "ok");
  peer_expect(t.p, "sleep", "ok");
  peer_expect(t.p, "check 16 7", "ok"); /* woken now: for two seconds it is left alone */
  CHECK_IS(kvcached_ensure(t.r, 0, 12 * page), KVCACHED_E_LIMIT);
  expect_asleep(t.p, 0);
  sleep_ms(2100);
  CHECK_OK(kvcached_ensure(t.r, 0, 12 * page));
  expect_asleep(t.p, 16 * page);
  release_all(&t);
}

/* A stopped neighbour has what is asked of it, and answers nothing: no call takes longer than its bound. */
TEST(processes, a_stopped_neighbour_delays_nobody) {
  const size_t page = test_page();
  tight t = squeeze("stopped", "theirs", "");
  peer_expect(t.p, "fill 16 7", "ok");
  kill(t.p.pid, SIGSTOP);
  CHECK(waitpid(t.p.pid, NULL, WUNTRACED) == t.p.pid);
  int64_t start = now_ms();
  CHECK_OK(kvcached_ensure(t.r, 0, 4 * page)); /* what is free is had at once */
  CHECK_OK(kvcached_enter(t.ctx));
  CHECK_OK(kvcached_leave(t.ctx));
  CHECK_OK(kvcached_sleep(t.ctx, KVCACHED_ALL_KINDS, 100, NULL));
  CHECK_OK(kvcached_wake(t.ctx, KVCACHED_ALL_KINDS));
  CHECK_LE(now_ms() - start, 1000);
  start = now_ms();
  CHECK_IS(kvcached_ensure(t.r, 0, 12 * page), KVCACHED_E_LIMIT);
  CHECK_LE(now_ms() - start, 2500); /* room_wait_ms, and what the claims around it may take */
  uint64_t freed;
  start = now_ms();
  CHECK_IS(kvcached_ledger_command(t.l, 1 - slot_of_ctx(t.ctx), KVCACHED_CMD_SLEEP, 100, &freed),
           KVCACHED_E_TIMEOUT);
  CHECK_LE(now_ms() - start, 1000);
  kill(t.p.pid, SIGCONT);
  peer_expect(t.p, "check 16 7", "ok");
  release_all(&t);
}
