/* Commands: mailboxes, bounded waits, many who ask. test_commands_lost.c: neighbours that are stopped or
   killed with a command in hand. */
#include "command_kit.h"

#include <pthread.h>
#include <stdatomic.h>

/* ---- somebody who answers ---- */

/* Answers commands, by answer_one, until told to stop. */
typedef struct answerer {
  user user;
  pthread_t thread;
  _Atomic int stop;
  _Atomic unsigned answered, delay_ms;
} answerer;

static void *answer_all(void *arg) {
  answerer *a = arg;
  while (!atomic_load(&a->stop)) {
    int command;
    if (!kvc_ledger_next_command(a->user.ledger, a->user.slot, 10000, &command)) continue;
    unsigned delay = atomic_load(&a->delay_ms);
    if (delay) sleep_ms(delay);
    answer_one(a->user, command, atomic_fetch_add(&a->answered, 1));
  }
  return NULL;
}

static void answerer_start(answerer *a, const char *path, const char *group) {
  memset(a, 0, sizeof(*a));
  a->user = user_take(path, group);
  kvc_ledger_control(a->user.ledger, a->user.slot, 1);
  CHECK(pthread_create(&a->thread, NULL, answer_all, a) == 0);
}

static void answerer_stop(answerer *a) {
  int64_t start = now_ms();
  atomic_store(&a->stop, 1);
  kvc_ledger_ring(a->user.ledger, a->user.slot);
  pthread_join(a->thread, NULL);
  CHECK_LE(now_ms() - start, 2000); /* far less than it would wait for a command */
  kvc_ledger_control(a->user.ledger, a->user.slot, 0);
  user_end(&a->user);
}

/* ---- the simple cases ---- */

TEST_HOST(commands, answered) {
  const char *path = scratch("answered");
  answerer a;
  answerer_start(&a, path, "g");
  kvcached_ledger_t l = open_ledger(path);
  uint64_t freed = 1;
  CHECK_OK(kvcached_ledger_command(l, a.user.slot, KVCACHED_CMD_TRIM, 5000, &freed));
  CHECK_EQ(freed, 1000 * UNIT);
  CHECK_OK(kvcached_ledger_command(l, a.user.slot, KVCACHED_CMD_WAKE, 5000, NULL));
  CHECK_IS(kvcached_ledger_command(l, a.user.slot, KVCACHED_CMD_SLEEP, 5000, &freed), KVCACHED_E_BUSY);
  CHECK_EQ(freed, 1002 * UNIT); /* also where it says no */
  CHECK_DETAIL("answered to sleep");
  int64_t start = now_ms();
  for (unsigned i = 3; i < 200; i++) {
    CHECK_OK(kvcached_ledger_command(l, a.user.slot, KVCACHED_CMD_TRIM, 5000, &freed));
    CHECK_EQ(freed, (1000 + i) * UNIT);
  }
  CHECK_LE(now_ms() - start, 5000); /* the mailbox is free as soon as an answer was read */
  answerer_stop(&a);
  kvcached_ledger_close(l);
}

TEST_HOST(commands, nobody_there) {
  const char *path = scratch("nobody");
  kvcached_ledger_t l = open_ledger(path);
  uint64_t freed = 5;
  CHECK_IS(kvcached_ledger_command(l, 0, KVCACHED_CMD_TRIM, 5000, &freed), KVCACHED_E_SLOT);
  CHECK_EQ(freed, 0);
  CHECK_IS(kvcached_ledger_command(l, -1, KVCACHED_CMD_TRIM, 5000, NULL), KVCACHED_E_SLOT);
  CHECK_IS(kvcached_ledger_command(l, KVC_LEDGER_SLOTS, KVCACHED_CMD_TRIM, 0, NULL), KVCACHED_E_SLOT);
  CHECK_IS(kvcached_ledger_command(NULL, 0, KVCACHED_CMD_TRIM, 0, NULL), KVCACHED_E_INVAL);
  user u = user_take(path, "g");
  CHECK_IS(kvcached_ledger_command(l, u.slot, KVCACHED_CMD_TRIM, 5000, NULL), KVCACHED_E_SLOT);
  CHECK_DETAIL("control thread");
  kvc_ledger_control(u.ledger, u.slot, 1);
  CHECK_IS(kvcached_ledger_command(l, u.slot, 0, 5000, NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_command(l, u.slot, 5, 5000, NULL), KVCACHED_E_INVAL);
  kvc_ledger_control(u.ledger, u.slot, 0);
  CHECK_IS(kvcached_ledger_command(l, u.slot, KVCACHED_CMD_TRIM, 0, NULL), KVCACHED_E_SLOT);
  int leased;
  CHECK_OK(kvcached_ledger_lease(l, "g", "m", 1, 0, UINT64_MAX, &leased));
  CHECK_IS(kvcached_ledger_command(l, leased, KVCACHED_CMD_TRIM, 5000, NULL), KVCACHED_E_SLOT);
  user_end(&u);
  kvcached_ledger_close(l);
}

TEST_HOST(commands, left_without_waiting) {
  const char *path = scratch("left");
  user u = user_take(path, "g");
  kvc_ledger_control(u.ledger, u.slot, 1);
  kvcached_ledger_t l = open_ledger(path);
  int command = 0;
  CHECK_OK(kvcached_ledger_command(l, u.slot, KVCACHED_CMD_TRIM, 0, NULL));
  CHECK_OK(kvcached_ledger_command(l, u.slot, KVCACHED_CMD_TRIM, 0, NULL)); /* it is there already */
  CHECK_IS(kvcached_ledger_command(l, u.slot, KVCACHED_CMD_SLEEP, 0, NULL), KVCACHED_E_BUSY);
  CHECK_EQ(kvc_ledger_next_command(u.ledger, u.slot, 0, &command), 1);
  CHECK_EQ(command, KVCACHED_CMD_TRIM);
  CHECK_IS(kvcached_ledger_command(l, u.slot, KVCACHED_CMD_TRIM, 0, NULL), KVCACHED_E_BUSY); /* begun */
  CHECK_DETAIL("being carried out");
  CHECK_EQ(kvc_ledger_next_command(u.ledger, u.slot, 0, &command), 0); /* once */
  kvc_ledger_answer(u.ledger, u.slot, KVCACHED_OK, 0);
  CHECK_OK(kvcached_ledger_command(l, u.slot, KVCACHED_CMD_SLEEP, 0, NULL));
  user_end(&u);
  kvcached_ledger_close(l);
}

/* Nobody looks: the command is taken back, and not carried out later. */
TEST_HOST(commands, taken_back) {
  const char *path = scratch("back");
  user u = user_take(path, "g");
  kvc_ledger_control(u.ledger, u.slot, 1);
  kvcached_ledger_t l = open_ledger(path);
  int command;
  int64_t start = now_ms();
  CHECK_IS(kvcached_ledger_command(l, u.slot, KVCACHED_CMD_TRIM, 150, NULL), KVCACHED_E_TIMEOUT);
  CHECK(now_ms() - start >= 149);
  CHECK_LE(now_ms() - start, 1000);
  CHECK_DETAIL("taken back");
  CHECK_EQ(kvc_ledger_next_command(u.ledger, u.slot, 0, &command), 0);
  CHECK_OK(kvcached_ledger_command(l, u.slot, KVCACHED_CMD_SLEEP, 0, NULL)); /* the mailbox is free */
  user_end(&u);
  kvcached_ledger_close(l);
}

/* Taken, but not ended in time: the asker says that it may still happen, and leaves it alone. */
TEST_HOST(commands, taken_and_slow) {
  const char *path = scratch("slow");
  user u = user_take(path, "g");
  kvc_ledger_control(u.ledger, u.slot, 1);
  asking first, second, third;
  ask_start(&first, path, u.slot, KVCACHED_CMD_SLEEP, 200);
  CHECK_EQ(next_within(u, 5000), KVCACHED_CMD_SLEEP);
  ask_start(&second, path, u.slot, KVCACHED_CMD_TRIM, 100);
  pthread_join(second.thread, NULL);
  pthread_join(first.thread, NULL);
  CHECK_IS(first.err, KVCACHED_E_TIMEOUT);
  CHECK(strstr(first.detail, "may still") != NULL);
  CHECK_IS(second.err, KVCACHED_E_BUSY);
  CHECK(strstr(second.detail, "another command (sleep)") != NULL);
  ask_start(&third, path, u.slot, KVCACHED_CMD_TRIM, 5000); /* waits for the mailbox */
  sleep_ms(50);
  kvc_ledger_answer(u.ledger, u.slot, KVCACHED_OK, 1 * UNIT); /* of the first, whose asker has gone */
  CHECK_EQ(next_within(u, 5000), KVCACHED_CMD_TRIM);
  kvc_ledger_answer(u.ledger, u.slot, KVCACHED_OK, 2 * UNIT);
  pthread_join(third.thread, NULL);
  CHECK_OK(third.err);
  CHECK_EQ(third.freed, 2 * UNIT);
  user_end(&u);
}

/* Each of many askers gets the answer to its own command. */
enum { ASKERS = 6, QUESTIONS = 50 };
typedef struct crowd {
  const char *path;
  int slot;
  _Atomic unsigned char *seen;
} crowd;

static void *ask_often(void *arg) {
  const crowd *c = arg;
  kvcached_ledger_t l = open_ledger(c->path);
  for (int i = 0; i < QUESTIONS; i++) {
    uint64_t freed;
    CHECK_OK(kvcached_ledger_command(l, c->slot, KVCACHED_CMD_TRIM, 20000, &freed));
    uint64_t number = freed / UNIT - 1000;
    CHECK(freed / UNIT >= 1000 && number < ASKERS * QUESTIONS);
    CHECK_EQ(atomic_fetch_add(&c->seen[number], 1), 0); /* nobody else had this one */
  }
  kvcached_ledger_close(l);
  return NULL;
}

TEST_HOST(commands, many_askers) {
  const char *path = scratch("many");
  static _Atomic unsigned char seen[ASKERS * QUESTIONS];
  answerer a;
  answerer_start(&a, path, "g");
  crowd c = {path, a.user.slot, seen};
  pthread_t t[ASKERS];
  for (int i = 0; i < ASKERS; i++) CHECK(pthread_create(&t[i], NULL, ask_often, &c) == 0);
  for (int i = 0; i < ASKERS; i++) pthread_join(t[i], NULL);
  CHECK_EQ(atomic_load(&a.answered), ASKERS * QUESTIONS);
  answerer_stop(&a);
}

/* A command for one process is not for the next one in its slot. */
TEST_HOST(commands, not_for_the_next_user) {
  const char *path = scratch("next");
  kvcached_ledger_t l = open_ledger(path), child = open_ledger(path);
  int slot, command;
  char group[KVCACHED_GROUP_MAX + 1];
  uint64_t fixed;
  CHECK_OK(kvcached_ledger_lease(l, "g", "m", 1, 0, UINT64_MAX, &slot));
  CHECK_OK(kvc_ledger_attach(child, slot, NULL, "first", group, &fixed));
  kvc_ledger_control(child, slot, 1);
  CHECK_OK(kvcached_ledger_command(l, slot, KVCACHED_CMD_SLEEP, 0, NULL));
  kvcached_ledger_close(child);
  child = open_ledger(path);
  CHECK_OK(kvc_ledger_attach(child, slot, NULL, "second", group, &fixed));
  CHECK_IS(kvcached_ledger_command(l, slot, KVCACHED_CMD_SLEEP, 0, NULL),
           KVCACHED_E_SLOT); /* no control yet */
  kvc_ledger_control(child, slot, 1);
  CHECK_EQ(kvc_ledger_next_command(child, slot, 0, &command), 0);
  kvcached_ledger_close(child);
  kvcached_ledger_close(l);
}

/* Control ends while somebody waits. */
TEST_HOST(commands, control_ends) {
  const char *path = scratch("ends");
  user u = user_take(path, "g");
  kvc_ledger_control(u.ledger, u.slot, 1);
  asking q;
  ask_start(&q, path, u.slot, KVCACHED_CMD_TRIM, 30000);
  kvc_ledger_map *m = map_ledger(path);
  WAIT_FOR((atomic_load(&m->slot[u.slot].mail) & 0x7f) == 1);
  int64_t start = now_ms();
  kvc_ledger_control(u.ledger, u.slot, 0);
  pthread_join(q.thread, NULL);
  CHECK_LE(now_ms() - start, 5000);
  CHECK_IS(q.err, KVCACHED_E_SLOT);
  unmap_ledger(m);
  user_end(&u);
}

/* ---- the waiting of the answering side ---- */

TEST_HOST(commands, ring_is_not_lost) {
  const char *path = scratch("ring");
  user u = user_take(path, "g");
  int command;
  kvc_ledger_ring(u.ledger, u.slot); /* before anybody waits */
  int64_t start = now_ms();
  CHECK_EQ(kvc_ledger_next_command(u.ledger, u.slot, 10000, &command), 0);
  CHECK_LE(now_ms() - start, 2000);
  start = now_ms();
  CHECK_EQ(kvc_ledger_next_command(u.ledger, u.slot, 100, &command), 0); /* only once */
  CHECK(now_ms() - start >= 99);
  user_end(&u);
}

/* What no asker of this library writes is answered or overwritten, never obeyed. */
TEST_HOST(commands, nonsense_in_the_mailbox) {
  const char *path = scratch("nonsense");
  user u = user_take(path, "g");
  kvc_ledger_control(u.ledger, u.slot, 1);
  kvcached_ledger_t l = open_ledger(path);
  kvc_ledger_map *m = map_ledger(path);
  int command = 0;
  atomic_store(&m->slot[u.slot].mail, UINT64_C(7) << 16 | 99 << 8 | 1); /* an unknown command */
  CHECK_EQ(kvc_ledger_next_command(u.ledger, u.slot, 0, &command), 0);
  CHECK(atomic_load(&m->slot[u.slot].mail) >> 16 == 7 && (atomic_load(&m->slot[u.slot].mail) & 0x7f) != 1);
  atomic_store(&m->slot[u.slot].mail, UINT64_MAX); /* an unknown state, and the last sequence there is */
  CHECK_EQ(kvc_ledger_next_command(u.ledger, u.slot, 0, &command), 0);
  CHECK_OK(kvcached_ledger_command(l, u.slot, KVCACHED_CMD_TRIM, 0, NULL));
  CHECK_EQ(kvc_ledger_next_command(u.ledger, u.slot, 0, &command), 1);
  CHECK_EQ(command, KVCACHED_CMD_TRIM);
  atomic_store(&m->slot[u.slot].mail, 0); /* changed by something else while it was carried out */
  kvc_ledger_answer(u.ledger, u.slot, KVCACHED_OK, UINT64_MAX);
  CHECK_EQ(atomic_load(&m->slot[u.slot].mail), 0);
  kvc_ledger_answer(u.ledger, u.slot, KVCACHED_OK, 0); /* nothing was taken: nothing happens */
  CHECK_IS(kvcached_ledger_command(l, u.slot, KVCACHED_CMD_TRIM, 50, NULL), KVCACHED_E_TIMEOUT);
  atomic_store(&m->slot[u.slot].controlled, 77);
  CHECK_IS(kvcached_ledger_command(l, u.slot, KVCACHED_CMD_TRIM, 50, NULL), KVCACHED_E_SLOT);
  unmap_ledger(m);
  kvcached_ledger_close(l);
  user_end(&u);
}

static void use_parents_handle(void *arg) {
  CHECK_IS(kvcached_ledger_command(arg, 0, KVCACHED_CMD_TRIM, 0, NULL), KVCACHED_E_FORKED);
}

TEST_HOST(commands, forked_child) {
  kvcached_ledger_t l = open_ledger(scratch("forked"));
  child_join(child_start(use_parents_handle, l));
  kvcached_ledger_close(l);
}
