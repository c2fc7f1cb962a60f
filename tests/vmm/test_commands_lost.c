/* Neighbours that are stopped or killed with a command in hand, those who ask and those who answer. */
#include "command_kit.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

/* A process that answers commands. */
static void answer_for_ever(void *arg) {
  user u = user_take(arg, "g");
  kvc_ledger_control(u.ledger, u.slot, 1);
  for (unsigned n = 0;;) {
    int command;
    if (kvc_ledger_next_command(u.ledger, u.slot, 100, &command)) answer_one(u, command, n++);
  }
}

static pid_t start_process(const char *path) {
  pid_t pid = child_start(answer_for_ever, (void *)(uintptr_t)path);
  WAIT_FOR(live_slots(path) == 1 && slot_in(path, 0).controlled);
  return pid;
}

TEST_HOST(commands, stopped_answerer) {
  const char *path = scratch("stopped-answerer");
  kvcached_ledger_t l = open_ledger(path);
  pid_t pid = start_process(path);
  CHECK_OK(kvcached_ledger_command(l, 0, KVCACHED_CMD_TRIM, 5000, NULL));
  CHECK(kill(pid, SIGSTOP) == 0);
  int64_t start = now_ms();
  CHECK_IS(kvcached_ledger_command(l, 0, KVCACHED_CMD_TRIM, 200, NULL), KVCACHED_E_TIMEOUT);
  CHECK_LE(now_ms() - start, 1000);
  CHECK_DETAIL("taken back");
  CHECK(kill(pid, SIGCONT) == 0);
  uint64_t freed;
  CHECK_OK(kvcached_ledger_command(l, 0, KVCACHED_CMD_TRIM, 5000, &freed));
  CHECK_EQ(freed, 1001 * UNIT); /* the one taken back was not carried out */
  child_kill(pid);
  kvcached_ledger_close(l);
}

static void take_and_hang(void *arg) {
  user u = user_take(arg, "g");
  kvc_ledger_control(u.ledger, u.slot, 1);
  int command;
  while (!kvc_ledger_next_command(u.ledger, u.slot, 1000, &command)) {
  }
  for (;;) pause();
}

/* It ends while somebody waits for it: that is noticed long before the wait is over. */
static void killed_answerer(const char *path, void (*body)(void *), int stopped) {
  pid_t pid = child_start(body, (void *)(uintptr_t)path);
  WAIT_FOR(live_slots(path) == 1 && slot_in(path, 0).controlled);
  if (stopped) CHECK(kill(pid, SIGSTOP) == 0);
  asking q;
  ask_start(&q, path, 0, KVCACHED_CMD_SLEEP, 30000);
  kvc_ledger_map *m = map_ledger(path);
  WAIT_FOR((atomic_load(&m->slot[0].mail) & 0x7f) == (stopped ? 1 : 2)); /* posted; taken */
  int64_t start = now_ms();
  child_kill(pid);
  pthread_join(q.thread, NULL);
  CHECK_LE(now_ms() - start, 5000);
  CHECK_IS(q.err, KVCACHED_E_SLOT);
  CHECK(strstr(q.detail, "ended before it answered") != NULL);
  /* The next user of the slot has an empty mailbox, and answers. */
  pid = start_process(path);
  ask_start(&q, path, 0, KVCACHED_CMD_TRIM, 5000);
  pthread_join(q.thread, NULL);
  CHECK_OK(q.err);
  CHECK_EQ(q.freed, 1000 * UNIT);
  child_kill(pid);
  unmap_ledger(m);
}

TEST_HOST(commands, killed_answerer_with_command_posted) {
  killed_answerer(scratch("killed-posted"), answer_for_ever, 1);
}
TEST_HOST(commands, killed_answerer_with_command_taken) {
  killed_answerer(scratch("killed-taken"), take_and_hang, 0);
}

static void ask_and_wait(void *arg) {
  kvcached_ledger_t l = open_ledger(arg);
  (void)kvcached_ledger_command(l, 0, KVCACHED_CMD_SLEEP, 60000, NULL);
}

/* The asker ends or stops in the middle: its command is carried out once, and nobody else is held up. */
static void lost_asker(const char *path, int signal_number) {
  user u = user_take(path, "g");
  kvc_ledger_control(u.ledger, u.slot, 1);
  pid_t pid = child_start(ask_and_wait, (void *)(uintptr_t)path);
  kvc_ledger_map *m = map_ledger(path);
  WAIT_FOR((atomic_load(&m->slot[u.slot].mail) & 0x7f) == 1);
  CHECK(kill(pid, signal_number) == 0);
  if (signal_number == SIGKILL) CHECK_EQ(waitpid(pid, NULL, 0), pid);
  CHECK_EQ(next_within(u, 5000), KVCACHED_CMD_SLEEP);
  kvc_ledger_answer(u.ledger, u.slot, KVCACHED_OK, UNIT);
  for (uint64_t i = 2; i < 4 + KVC_LEDGER_ANSWERS; i++) { /* more than there are answers kept */
    asking q;
    ask_start(&q, path, u.slot, KVCACHED_CMD_TRIM, 5000);
    CHECK_EQ(next_within(u, 5000), KVCACHED_CMD_TRIM);
    kvc_ledger_answer(u.ledger, u.slot, KVCACHED_OK, i * UNIT);
    pthread_join(q.thread, NULL);
    CHECK_OK(q.err);
    CHECK_EQ(q.freed, i * UNIT);
  }
  if (signal_number == SIGSTOP) { /* its answer has been overwritten by now: it ends all the same */
    CHECK(kill(pid, SIGCONT) == 0);
    child_join(pid);
  }
  unmap_ledger(m);
  user_end(&u);
}

TEST_HOST(commands, killed_asker) { lost_asker(scratch("killed-asker"), SIGKILL); }
TEST_HOST(commands, stopped_asker) { lost_asker(scratch("stopped-asker"), SIGSTOP); }

/* A few later answers do not hide one: the asker was slow to look. */
TEST_HOST(commands, answer_is_kept_a_while) {
  const char *path = scratch("kept");
  user u = user_take(path, "g");
  kvc_ledger_control(u.ledger, u.slot, 1);
  kvcached_ledger_t l = open_ledger(path);
  pid_t pid = child_start(ask_and_wait, (void *)(uintptr_t)path); /* waits a minute unless answered */
  kvc_ledger_map *m = map_ledger(path);
  WAIT_FOR((atomic_load(&m->slot[u.slot].mail) & 0x7f) == 1);
  CHECK(kill(pid, SIGSTOP) == 0);
  CHECK_EQ(next_within(u, 5000), KVCACHED_CMD_SLEEP);
  kvc_ledger_answer(u.ledger, u.slot, KVCACHED_OK, UNIT);
  for (int i = 1; i < KVC_LEDGER_ANSWERS; i++) {
    CHECK_OK(kvcached_ledger_command(l, u.slot, KVCACHED_CMD_TRIM, 0, NULL));
    CHECK_EQ(next_within(u, 0), KVCACHED_CMD_TRIM);
    kvc_ledger_answer(u.ledger, u.slot, KVCACHED_OK, 2 * UNIT);
  }
  int64_t start = now_ms();
  CHECK(kill(pid, SIGCONT) == 0);
  child_join(pid);
  CHECK_LE(now_ms() - start, 5000);
  kvcached_ledger_close(l);
  unmap_ledger(m);
  user_end(&u);
}
