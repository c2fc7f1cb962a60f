/* Several processes on one ledger: creation, races, sudden death, fork. */
#include "support.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CROWD = 8 };

/* Where pages are large less often is as good. */
static unsigned fewer(unsigned n) { return test_page() > 64 * KIB ? (n + 7) / 8 : n; }

static void start_crowd(peer *p, const char *ledger, uint64_t limit) {
  for (int i = 0; i < CROWD; i++) p[i] = peer_start(ledger, "g", limit, -1);
}

/* All create the file at once. */
TEST(processes, creation_race) {
  const char *path = scratch("creation");
  for (unsigned round = 0; round < rounds(3); round++) {
    peer p[CROWD];
    start_crowd(p, path, UINT64_MAX);
    for (int i = 0; i < CROWD; i++) peer_expect_open(p[i]);
    CHECK_EQ(live_slots(path), CROWD);
    for (int i = 0; i < CROWD; i++) peer_stop(&p[i]);
    CHECK_EQ(live_slots(path), 0);
    CHECK(unlink(path) == 0);
  }
}

/* All want more than half of the limit at the same moment: exactly one gets it, every time. */
TEST(processes, one_winner) {
  const size_t page = test_page();
  const char *path = scratch("winner");
  const size_t limit = 10;
  peer p[CROWD];
  start_crowd(p, path, limit * page);
  for (int i = 0; i < CROWD; i++) peer_expect_open(p[i]);
  for (unsigned round = 0; round < rounds(fewer(60)); round++) {
    unsigned won = 0;
    char line[64];
    for (int i = 0; i < CROWD; i++) peer_send(p[i], "ensure 6");
    for (int i = 0; i < CROWD; i++) {
      peer_reply(p[i], line, sizeof(line));
      if (strcmp(line, "ok") == 0)
        won++;
      else
        CHECK(strcmp(line, "KVCACHED_E_LIMIT") == 0);
    }
    CHECK_EQ(won, 1);
    for (int i = 0; i < CROWD; i++) peer_expect(p[i], "put 6", "ok");
  }
  for (int i = 0; i < CROWD; i++) peer_stop(&p[i]);
}

/* All take and give back as fast as they can; each counts what it holds in one shared number. */
TEST(processes, limit_race) {
  const size_t page = test_page();
  const char *path = scratch("race"), *counter = scratch("counter");
  int fd = open(counter, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  CHECK(fd >= 0 && ftruncate(fd, 8) == 0);
  close(fd);
  peer p[CROWD];
  char command[400], line[64];
  start_crowd(p, path, 20 * page); /* about one and a half of them at a time */
  for (int i = 0; i < CROWD; i++) peer_expect_open(p[i]);
  snprintf(command, sizeof(command), "race %s %u", counter, rounds(fewer(300)));
  for (int i = 0; i < CROWD; i++) peer_send(p[i], command);
  for (int i = 0; i < CROWD; i++) {
    peer_reply(p[i], line, sizeof(line));
    CHECK(strcmp(line, "won 1") == 0); /* never over, and nobody starved throughout */
  }
  for (int i = 0; i < CROWD; i++) peer_stop(&p[i]);
}

/* kill -9 in the middle of mapping: its slot, claim and memory are gone, and all of the limit is there again.
 */
TEST(processes, sudden_death) {
  const size_t page = test_page();
  const char *path = scratch("death");
  const size_t n = page > 64 * KIB ? 64 : 3000; /* pages */
  char more[40];
  snprintf(more, sizeof(more), "pages=%zu", n + n / 2);
  uint32_t seed = 5;
  for (unsigned round = 0; round < rounds(fewer(24)); round++) {
    peer p[3];
    for (int i = 0; i < 3; i++) p[i] = peer_start_with(path, "g", n * page, -1, more);
    for (int i = 0; i < 3; i++) peer_expect_open(p[i]);
    for (int i = 0; i < 3; i++) peer_send(p[i], "churn");
    struct timespec t = {.tv_nsec = (long)(next_random(&seed) % 8000) * 1000};
    nanosleep(&t, NULL);
    for (int i = 0; i < 3; i++) peer_kill(&p[i]);
    CHECK_EQ(live_slots(path), 0);
  }
  kvcached_ctx_t ctx = open_in(path, "g", n * page);
  CHECK_EQ(stats_of(ctx).group_charge, 0);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, n * page);
  CHECK_OK(kvcached_ensure(r, 0, n * page));
  CHECK_EQ(stats_of(ctx).group_charge, n * page);
  kvcached_shutdown(ctx);
}

/* Parent and child on one slot, each dying first. */
TEST(processes, lease_and_death) {
  const size_t page = test_page();
  const char *path = scratch("lease-death");
  kvcached_ledger_t l, observer;
  int slot;
  size_t n;
  kvcached_slot_t s;
  s.struct_size = sizeof(s);
  CHECK_OK(kvcached_ledger_open(path, &l));
  CHECK_OK(kvcached_ledger_open(path, &observer));
  CHECK_OK(kvcached_ledger_lease(l, "g", "m", 10 * page, 0, 100 * page, &slot));
  peer p = peer_start(path, "g", 100 * page, slot);
  peer_expect_open(p);
  peer_expect(p, "ensure 30", "ok");
  CHECK_OK(kvcached_ledger_slots(observer, &s, 1, &n));
  CHECK(n == 1 && s.leased && s.attached && s.pid == p.pid && s.charge == 30 * page);
  peer_kill(&p); /* the child: back to the lease */
  CHECK_OK(kvcached_ledger_slots(observer, &s, 1, &n));
  CHECK(n == 1 && s.leased && !s.attached && s.pid == getpid() && s.charge == 10 * page && s.claim == 0);
  p = peer_start(path, "-", 100 * page, slot);
  peer_expect_open(p);
  peer_expect(p, "ensure 5", "ok");
  kvcached_ledger_close(l); /* the parent: the child goes on */
  CHECK_OK(kvcached_ledger_slots(observer, &s, 1, &n));
  CHECK(n == 1 && !s.leased && s.attached && s.charge == 10 * page);
  peer_expect(p, "ensure 99", "ok");
  peer_expect(p, "ensure 101", "KVCACHED_E_LIMIT");
  peer late = peer_start(path, "g", 100 * page, slot); /* nobody leases it any more, and it is in use */
  char line[64];
  peer_reply(late, line, sizeof(line));
  CHECK(strcmp(line, "KVCACHED_E_SLOT") == 0);
  peer_stop(&late);
  peer_stop(&p);
  CHECK_EQ(live_slots(path), 0);
  kvcached_ledger_close(observer);
}

/* A forked child has no part in its parent's handles, and does not keep them alive. */
TEST(processes, forked_child) {
  const size_t page = test_page();
  const char *path = scratch("fork");
  kvcached_ctx_t ctx = open_in(path, "g", 100 * page);
  kvcached_ledger_t l;
  int slot;
  CHECK_OK(kvcached_ledger_open(path, &l));
  CHECK_OK(kvcached_ledger_lease(l, "g", "m", page, 0, 100 * page, &slot));
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 16 * page);
  CHECK_OK(kvcached_ensure(r, 0, 8 * page));
  put(r, 0, 'p', 8 * page);
  pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    size_t run, n;
    int ensured, other;
    kvcached_stats_t s = {.struct_size = sizeof(s)};
    kvcached_region_t made;
    CHECK_IS(kvcached_ensure(r, 0, 16 * page), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_release(r, 0, 16 * page), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_trim(ctx, 0, NULL), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_mapped_run(r, 0, page, &run, &ensured), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_reserve(ctx, KVCACHED_KV, page, &made), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_enter(ctx), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_leave(ctx), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_set_queued(ctx, 1), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_set_fixed(ctx, page), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_prepare(r, 0, page), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_read(r, 0, &n, 1), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_write(r, 0, &n, 1), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_clear(r, 0, 1), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_prepare_sleep(ctx, 1), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_sleep(ctx, 1, 0, NULL), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_wake(ctx, 1), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_trim_host(ctx, 1, NULL), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_set_reload(r, NULL, NULL), KVCACHED_E_FORKED);
    uint64_t bytes, total;
    CHECK_IS(kvcached_device_memory(ctx, &bytes, &total), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_ledger_set_limit(l, "g", page, 0, NULL), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_ledger_command(l, slot, KVCACHED_CMD_TRIM, 10, NULL), KVCACHED_E_FORKED);
    CHECK(kvcached_alloc(ctx, 1) == NULL);
    CHECK_EQ(kvcached_available(ctx), 0);
    kvcached_free(ctx, kvcached_region_base(r));
    kvcached_set_limit(ctx, 0);
    CHECK_IS(kvcached_stats(ctx, &s), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_region_stats(r, &s), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_ledger_slots(l, NULL, 0, &n), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_ledger_lease(l, "g", "m", 1, 0, 1, &other), KVCACHED_E_FORKED);
    CHECK_IS(kvcached_ledger_unlease(l, slot), KVCACHED_E_FORKED);
    CHECK_DETAIL("forked child");
    if (on_host()) CHECK(!accessible(kvcached_region_base(r)));
    kvcached_unreserve(r);
    kvcached_ledger_close(l);
    kvcached_shutdown(ctx);
    for (int fd = 3; fd < 64; fd++) {
      char link[64], target[600];
      snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
      ssize_t len = readlink(link, target, sizeof(target) - 1);
      if (len > 0) {
        target[len] = 0;
        CHECK(strcmp(target, path) != 0);
      }
    }
    if (on_host()) { /* handles of its own work; a GPU's driver does not survive fork */
      kvcached_ctx_t own = open_in(path, "g", 100 * page);
      CHECK_EQ(stats_of(own).group_charge, 9 * page);
      made = reserve(own, KVCACHED_KV, page);
      CHECK_OK(kvcached_ensure(made, 0, 1));
      kvcached_shutdown(own);
    }
    _exit(0);
  }
  int status;
  CHECK(waitpid(pid, &status, 0) == pid);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(holds(r, 0, 'p', 8 * page)); /* the parent noticed nothing */
  CHECK_EQ(live_slots(path), 2);
  CHECK_OK(kvcached_ensure(r, 0, 16 * page));
  check_context(ctx);
  kvcached_shutdown(ctx);
  kvcached_ledger_close(l);
  CHECK_EQ(live_slots(path), 0);
}

/* The parent is killed while a child that never called exec lives on. */
TEST(processes, orphan_keeps_nothing) {
  const size_t page = test_page();
  const char *path = scratch("orphan");
  peer p = peer_start(path, "g", 100 * page, -1);
  peer_expect_open(p);
  peer_expect(p, "ensure 50", "ok");
  peer_expect(p, "fork", "ok");
  kill(p.pid, SIGKILL);
  CHECK(waitpid(p.pid, NULL, 0) == p.pid);
  CHECK_EQ(live_slots(path), 0);
  char c;
  CHECK(fcntl(p.out, F_SETFL, O_NONBLOCK) == 0);
  CHECK(read(p.out, &c, 1) < 0 && errno == EAGAIN); /* still there: it holds the other end of the pipe */
  close(p.in);
  close(p.out);
}

/* Closing ends the slot even while a bare clone() shares the descriptor. */
TEST(processes, bare_clone) {
  const size_t page = test_page();
  const char *path = scratch("clone");
  kvcached_ctx_t ctx = open_in(path, "g", 100 * page);
  int hold[2];
  CHECK(pipe2(hold, O_CLOEXEC) == 0);
  long pid = syscall(SYS_clone, (long)SIGCHLD, 0L, 0L, 0L, 0L);
  CHECK(pid >= 0);
  if (pid == 0) {
    char c;
    close(hold[1]);
    (void)!read(hold[0], &c, 1);
    _exit(0);
  }
  CHECK_EQ(live_slots(path), 1);
  kvcached_shutdown(ctx);
  CHECK_EQ(live_slots(path), 0);
  close(hold[1]);
  close(hold[0]);
  CHECK(waitpid((pid_t)pid, NULL, 0) == (pid_t)pid);
}
