/* Limits set by several threads and processes at once, and while others claim. */
#include "ledger_kit.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

enum { SETTERS = 4, SETTINGS = 1000 };

typedef struct setter {
  kvcached_ledger_t ledger;
  const char *group;
  unsigned seed, applied;
  _Atomic int *go;
} setter;

static void *set_often(void *arg) {
  setter *s = arg;
  while (!atomic_load(s->go)) sched_yield();
  for (unsigned i = 0; i < SETTINGS; i++) {
    uint64_t bytes = (1 + next_random(&s->seed) % 1000) * (uint64_t)UNIT;
    s->applied += limit_set(s->ledger, s->group, bytes, 0).result == KVCACHED_LIMIT_APPLIED;
  }
  return NULL;
}

/* Settings without a revision follow each other: none is lost, each has one of its own. */
static void race_of_threads(const char *path, const char *group) {
  user first = user_take(path, "g"), second = user_take(path, "g");
  setter s[SETTERS];
  pthread_t t[SETTERS];
  unsigned applied = 0;
  _Atomic int go = 0;
  for (unsigned i = 0; i < SETTERS; i++) {
    s[i] = (setter){open_ledger(path), group, i + 1, 0, &go};
    CHECK(pthread_create(&t[i], NULL, set_often, &s[i]) == 0);
  }
  atomic_store(&go, 1);
  for (int i = 0; i < SETTERS; i++) {
    pthread_join(t[i], NULL);
    applied += s[i].applied;
    kvcached_ledger_close(s[i].ledger);
  }
  CHECK_LE(applied, limit_get(first.ledger, group).revision);
  CHECK_EQ(limit_get(first.ledger, group).revision, SETTERS * SETTINGS);
  user_end(&first);
  user_end(&second);
}

TEST_HOST(limits, race_of_threads_for_a_group) { race_of_threads(scratch("race-group"), "g"); }
TEST_HOST(limits, race_of_threads_for_the_card) { race_of_threads(scratch("race-card"), NULL); }

enum { RACE_ROUNDS = 200 };
typedef struct arena {
  _Atomic unsigned ready, round, won[RACE_ROUNDS], lost[RACE_ROUNDS];
  _Atomic uint64_t bytes[RACE_ROUNDS];
} arena;
typedef struct contest {
  const char *path, *group;
  arena *arena;
  unsigned number;
} contest;

static void set_in_step(void *arg) {
  const contest *c = arg;
  kvcached_ledger_t l = open_ledger(c->path);
  for (unsigned i = 0; i < RACE_ROUNDS; i++) {
    atomic_fetch_add(&c->arena->ready, 1);
    while (atomic_load(&c->arena->round) <= i) sched_yield();
    kvcached_limit_t done = limit_set(l, c->group, (c->number + 1) * (uint64_t)UNIT, i + 1);
    if (done.result == KVCACHED_LIMIT_APPLIED) {
      atomic_fetch_add(&c->arena->won[i], 1);
      atomic_store(&c->arena->bytes[i], done.limit);
    } else {
      CHECK_EQ(done.result, KVCACHED_LIMIT_CONFLICT);
      atomic_fetch_add(&c->arena->lost[i], 1);
    }
  }
  kvcached_ledger_close(l);
}

/* One revision, as many values as processes: one is applied, the others hear of the conflict. */
static void race_of_processes(const char *path, const char *group) {
  user first = user_take(path, "g"), second = user_take(path, "g");
  arena *a = shared_memory(sizeof(*a));
  contest c[SETTERS];
  pid_t pid[SETTERS];
  for (unsigned i = 0; i < SETTERS; i++) {
    c[i] = (contest){path, group, a, i};
    pid[i] = child_start(set_in_step, &c[i]);
  }
  for (unsigned i = 0; i < RACE_ROUNDS; i++) {
    WAIT_FOR(atomic_load(&a->ready) == SETTERS * (i + 1));
    atomic_store(&a->round, i + 1);
    WAIT_FOR(atomic_load(&a->won[i]) + atomic_load(&a->lost[i]) == SETTERS);
    CHECK_EQ(atomic_load(&a->won[i]), 1);
    check_limit(limit_get(first.ledger, group), KVCACHED_LIMIT_APPLIED, i + 1, atomic_load(&a->bytes[i]));
  }
  for (int i = 0; i < SETTERS; i++) child_join(pid[i]);
  user_end(&first);
  user_end(&second);
}

TEST_HOST(limits, race_of_processes_for_a_group) { race_of_processes(scratch("race-p-group"), "g"); }
TEST_HOST(limits, race_of_processes_for_the_card) { race_of_processes(scratch("race-p-card"), NULL); }

/* Slots of the group come and go while its limit is set: it is never lost as long as one lives. */
static void come_and_go(void *arg) {
  const char *path = arg;
  for (;;) {
    user u = user_take(path, "g");
    user_end(&u);
  }
}

TEST_HOST(limits, not_lost_while_slots_come_and_go) {
  const char *path = scratch("come-and-go");
  user low = user_take(path, "x"), mine = user_take(path, "g");
  user_end(&low); /* the others take a slot before ours: the group's first one changes all the time */
  pid_t pid[3];
  for (int i = 0; i < 3; i++) pid[i] = child_start(come_and_go, (void *)(uintptr_t)path);
  for (uint32_t i = 1; i <= 200; i++) {
    check_limit(limit_set(mine.ledger, "g", i * (uint64_t)UNIT, i), KVCACHED_LIMIT_APPLIED, i,
                i * (uint64_t)UNIT);
    check_limit(limit_get(mine.ledger, "g"), KVCACHED_LIMIT_APPLIED, i, i * (uint64_t)UNIT);
    CHECK_EQ(slot_in(path, mine.slot).limit, i * (uint64_t)UNIT);
  }
  for (int i = 0; i < 3; i++) child_kill(pid[i]);
  user_end(&mine);
}

/* ---- lowering while others claim ---- */

typedef struct claimer {
  const char *path;
  _Atomic uint64_t *held;
  _Atomic int *stop;
  unsigned seed, won;
} claimer;

static void *claim_often(void *arg) {
  claimer *c = arg;
  user u = user_take(c->path, "g");
  while (!atomic_load(c->stop)) {
    uint64_t bytes = (1 + next_random(&c->seed) % 40) * (uint64_t)UNIT;
    if (user_claim(u, bytes, UINT64_MAX, 50) != KVCACHED_OK) continue;
    c->won++;
    atomic_fetch_add(c->held, bytes);
    sched_yield();
    atomic_fetch_sub(c->held, bytes);
    user_unclaim(u, bytes);
  }
  user_end(&u);
  return NULL;
}

/* Once the ledger said that no more is charged than the new limit, no more can be held. */
static void lower_and_raise(const char *path, const char *group) {
  _Atomic uint64_t held = 0;
  _Atomic int stop = 0;
  user mine = user_take(path, "g");
  claimer c[SETTERS];
  pthread_t t[SETTERS];
  for (unsigned i = 0; i < SETTERS; i++) {
    c[i] = (claimer){path, &held, &stop, i + 1, 0};
    CHECK(pthread_create(&t[i], NULL, claim_often, &c[i]) == 0);
  }
  for (unsigned i = 0; i < rounds(30); i++) {
    const uint64_t low = (10 + i % 30) * (uint64_t)UNIT;
    int result = limit_set(mine.ledger, group, low, 0).result;
    for (int64_t until = now_ms() + 10000; result == KVCACHED_LIMIT_DEFERRED && now_ms() < until;)
      result = limit_get(mine.ledger, group).result;
    CHECK_EQ(result, KVCACHED_LIMIT_APPLIED);
    for (int64_t until = now_ms() + 4; now_ms() < until;) CHECK_LE(atomic_load(&held), low);
    CHECK_EQ(limit_set(mine.ledger, group, 120 * UNIT, 0).result, KVCACHED_LIMIT_APPLIED);
    sleep_ms(1);
  }
  atomic_store(&stop, 1);
  for (int i = 0; i < SETTERS; i++) pthread_join(t[i], NULL);
  for (int i = 0; i < SETTERS; i++) CHECK(c[i].won > 0);
  user_end(&mine);
}

TEST_HOST(limits, lowered_group_is_never_passed) { lower_and_raise(scratch("lower-group"), "g"); }
TEST_HOST(limits, lowered_card_is_never_passed) { lower_and_raise(scratch("lower-card"), NULL); }
