/* Limits of a group and of the card: revisions, who hears of them, how long they live, races of setters. */
#include "ledger_kit.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

enum { UNIT = 4096 };

static kvcached_limit_t set(kvcached_ledger_t l, const char *group, uint64_t bytes, uint32_t revision) {
  kvcached_limit_t out = {.struct_size = sizeof(out)};
  CHECK_OK(kvcached_ledger_set_limit(l, group, bytes, revision, &out));
  return out;
}

static kvcached_limit_t get(kvcached_ledger_t l, const char *group) {
  kvcached_limit_t out = {.struct_size = sizeof(out)};
  CHECK_OK(kvcached_ledger_get_limit(l, group, &out));
  return out;
}

static void check_limit(kvcached_limit_t got, int result, uint32_t revision, uint64_t limit) {
  CHECK_EQ(got.result, result);
  CHECK_EQ(got.revision, revision);
  CHECK_EQ(got.limit, limit);
}

TEST_HOST(limits, revisions_of_a_group) {
  const char *path = scratch("revisions");
  user u = user_take(path, "g"), other = user_take(path, "h");
  kvcached_ledger_t l = open_ledger(path);
  check_limit(get(l, "g"), KVCACHED_LIMIT_APPLIED, 0, UINT64_MAX);
  check_limit(set(l, "g", 100 * UNIT, 0), KVCACHED_LIMIT_APPLIED, 1, 100 * UNIT);
  check_limit(set(l, "g", 90 * UNIT, 0), KVCACHED_LIMIT_APPLIED, 2, 90 * UNIT);
  check_limit(set(l, "g", 80 * UNIT, 7), KVCACHED_LIMIT_APPLIED, 7, 80 * UNIT);
  check_limit(set(l, "g", 80 * UNIT, 7), KVCACHED_LIMIT_APPLIED, 7, 80 * UNIT); /* again: no conflict */
  check_limit(set(l, "g", 79 * UNIT, 7), KVCACHED_LIMIT_CONFLICT, 7, 80 * UNIT);
  check_limit(set(l, "g", 70 * UNIT, 6), KVCACHED_LIMIT_STALE, 7, 80 * UNIT);
  check_limit(get(l, "g"), KVCACHED_LIMIT_APPLIED, 7, 80 * UNIT);
  check_limit(get(l, "h"), KVCACHED_LIMIT_APPLIED, 0, UINT64_MAX); /* groups do not meet */
  CHECK_EQ(slot_in(path, u.slot).limit, 80 * UNIT);
  CHECK_EQ(slot_in(path, other.slot).limit, UINT64_MAX);
  check_limit(get(l, NULL), KVCACHED_LIMIT_APPLIED, 0, UINT64_MAX);
  user_end(&u);
  user_end(&other);
  kvcached_ledger_close(l);
}

TEST_HOST(limits, bytes_of_a_limit) {
  const char *path = scratch("bytes");
  user u = user_take(path, "g");
  kvcached_ledger_t l = u.ledger;
  const uint64_t top = UINT64_C(1) << 44;
  CHECK_EQ(set(l, "g", 3 * UNIT + 4095, 0).limit, 3 * UNIT);
  CHECK_EQ(set(l, "g", 0, 0).limit, 0);
  CHECK_IS(user_claim(u, 1, UINT64_MAX, 10), KVCACHED_E_LIMIT);
  CHECK_EQ(set(l, "g", top, 0).limit, UINT64_MAX);
  CHECK_EQ(set(l, "g", UINT64_MAX, 0).limit, UINT64_MAX);
  CHECK_EQ(set(l, "g", top - 2 * UNIT, 0).limit, top - 2 * UNIT);
  CHECK(set(l, "g", top - 1, 0).limit < top); /* a limit stays one */
  CHECK_EQ(get(l, "g").revision, 6);
  user_end(&u);
}

/* What was set holds instead of what contexts bring along, be it more or less. */
TEST_HOST(limits, ledger_goes_before_own_limit) {
  const char *path = scratch("before");
  user u = user_take(path, "g");
  CHECK_IS(user_claim(u, 11 * UNIT, 10 * UNIT, 10), KVCACHED_E_LIMIT);
  CHECK_OK(user_claim(u, 10 * UNIT, 10 * UNIT, 10));
  CHECK_EQ(set(u.ledger, "g", 20 * UNIT, 0).charge, 10 * UNIT);
  CHECK_OK(user_claim(u, 10 * UNIT, 10 * UNIT, 10));
  CHECK_IS(user_claim(u, 1, UINT64_MAX, 10), KVCACHED_E_LIMIT);
  CHECK_DETAIL("the limit is 81920, passed by 1 ");
  kvc_account a;
  CHECK_OK(kvc_ledger_account(u.ledger, u.slot, 5, &a));
  CHECK_EQ(a.group_limit, 20 * UNIT);
  CHECK_EQ(a.group_charge, 20 * UNIT);
  CHECK_EQ(set(u.ledger, "g", UINT64_MAX, 0).result, KVCACHED_LIMIT_APPLIED);
  CHECK_OK(user_claim(u, 1000 * UNIT, 10 * UNIT, 10));
  user_end(&u);
}

/* Of a group: as long as it has a live slot, whichever. Of the card: as long as the file. */
TEST_HOST(limits, life) {
  const char *path = scratch("life");
  kvcached_ledger_t l = open_ledger(path);
  kvcached_limit_t out = {.struct_size = sizeof(out)};
  CHECK_IS(kvcached_ledger_set_limit(l, "g", 5 * UNIT, 0, &out), KVCACHED_E_SLOT);
  CHECK_DETAIL("no live slot");
  user a = user_take(path, "g");
  check_limit(set(l, "g", 5 * UNIT, 9), KVCACHED_LIMIT_APPLIED, 9, 5 * UNIT);
  user b = user_take(path, "g"); /* inherits it */
  CHECK_EQ(slot_in(path, b.slot).limit, 5 * UNIT);
  int leased;
  CHECK_OK(kvcached_ledger_lease(l, "g", "m", UNIT, 0, UINT64_MAX, &leased));
  user_end(&a);
  CHECK_IS(user_claim(b, 5 * UNIT, UINT64_MAX, 10), KVCACHED_E_LIMIT);
  CHECK_OK(user_claim(b, 4 * UNIT, UINT64_MAX, 10));
  user_end(&b);
  check_limit(get(l, "g"), KVCACHED_LIMIT_APPLIED, 9, 5 * UNIT); /* in the leased slot */
  CHECK_OK(kvcached_ledger_unlease(l, leased));
  check_limit(get(l, "g"), KVCACHED_LIMIT_APPLIED, 0, UINT64_MAX);
  a = user_take(path, "g"); /* the slot's old word is gone with its group */
  CHECK_OK(user_claim(a, 100 * UNIT, UINT64_MAX, 10));
  user_end(&a);

  check_limit(set(l, NULL, 7 * UNIT, 0), KVCACHED_LIMIT_APPLIED, 1, 7 * UNIT);
  kvcached_ledger_close(l);
  l = open_ledger(path);
  check_limit(get(l, NULL), KVCACHED_LIMIT_APPLIED, 1, 7 * UNIT);
  kvcached_ledger_close(l);
}

TEST_HOST(limits, card_holds_for_all_groups) {
  const char *path = scratch("card");
  user a = user_take(path, "a"), b = user_take(path, "b");
  kvc_shortage s;
  CHECK_EQ(set(a.ledger, NULL, 100 * UNIT, 0).result, KVCACHED_LIMIT_APPLIED);
  CHECK_EQ(set(a.ledger, "b", 50 * UNIT, 0).result, KVCACHED_LIMIT_APPLIED);
  CHECK_OK(user_claim(a, 70 * UNIT, UINT64_MAX, 10));
  CHECK_IS(kvc_ledger_claim(b.ledger, b.slot, KVC_CLAIM_PAGES, 40 * UNIT, UINT64_MAX, 10, &s),
           KVCACHED_E_LIMIT);
  CHECK_EQ(s.group, 0);
  CHECK_EQ(s.card, 10 * UNIT);
  CHECK_DETAIL("the card");
  CHECK_IS(kvc_ledger_claim(b.ledger, b.slot, KVC_CLAIM_PAGES, 60 * UNIT, UINT64_MAX, 10, &s),
           KVCACHED_E_LIMIT);
  CHECK_EQ(s.group, 10 * UNIT);
  CHECK_EQ(s.card, 30 * UNIT);
  CHECK_DETAIL("group \"b\"");
  CHECK_OK(user_claim(b, 30 * UNIT, UINT64_MAX, 10));
  kvcached_limit_t card = get(a.ledger, NULL);
  CHECK_EQ(card.charge, 100 * UNIT);
  CHECK_EQ(card.overage, 0);
  kvc_account acc;
  CHECK_OK(kvc_ledger_account(b.ledger, b.slot, UINT64_MAX, &acc));
  CHECK_EQ(acc.card_limit, 100 * UNIT);
  CHECK_EQ(acc.card_charge, 100 * UNIT);
  CHECK_EQ(acc.group_charge, 30 * UNIT);
  int slot;
  CHECK_IS(kvcached_ledger_lease(a.ledger, "c", "m", 1, 0, UINT64_MAX, &slot), KVCACHED_E_LIMIT);
  user_end(&a);
  user_end(&b);
}

static int command_in(user u) {
  int command;
  return kvc_ledger_next_command(u.ledger, u.slot, 0, &command) ? command : 0;
}

/* More is in use: the limit holds at once, those it covers are told, nobody is waited for. */
TEST_HOST(limits, deferred) {
  const char *path = scratch("deferred");
  user u[4];
  for (int i = 0; i < 4; i++) {
    u[i] = user_take(path, i < 3 ? "g" : "other");
    CHECK_OK(user_claim(u[i], 10 * UNIT, UINT64_MAX, 10));
    if (i != 2) kvc_ledger_control(u[i].ledger, u[i].slot, 1);
  }
  int64_t start = now_ms();
  kvcached_limit_t done = set(u[0].ledger, "g", 12 * UNIT, 0);
  CHECK_LE(now_ms() - start, 300); /* nobody answers in this test */
  check_limit(done, KVCACHED_LIMIT_DEFERRED, 1, 12 * UNIT);
  CHECK_EQ(done.charge, 30 * UNIT);
  CHECK_EQ(done.overage, 18 * UNIT);
  CHECK_EQ(command_in(u[1]), KVCACHED_CMD_TRIM);
  kvc_ledger_answer(u[1].ledger, u[1].slot, KVCACHED_OK, 0);
  CHECK_EQ(command_in(u[2]), 0); /* it has no control */
  CHECK_EQ(command_in(u[3]), 0); /* another group */
  CHECK_EQ(set(u[0].ledger, "g", 12 * UNIT, 1).result, KVCACHED_LIMIT_DEFERRED);
  CHECK_EQ(command_in(u[0]), KVCACHED_CMD_TRIM);
  kvc_ledger_answer(u[0].ledger, u[0].slot, KVCACHED_OK, 0);
  CHECK_EQ(get(u[0].ledger, "g").result, KVCACHED_LIMIT_DEFERRED);

  CHECK_IS(user_claim(u[0], 1, UINT64_MAX, 10), KVCACHED_E_LIMIT);
  user_unclaim(u[1], 10 * UNIT);
  CHECK_IS(user_claim(u[0], 1, UINT64_MAX, 10), KVCACHED_E_LIMIT); /* still 20 */
  user_unclaim(u[2], 10 * UNIT);
  check_limit(get(u[0].ledger, "g"), KVCACHED_LIMIT_APPLIED, 1, 12 * UNIT);
  CHECK_OK(user_claim(u[0], 2 * UNIT, UINT64_MAX, 10));
  (void)command_in(u[1]);
  kvc_ledger_answer(u[1].ledger, u[1].slot, KVCACHED_OK, 0);
  (void)command_in(u[0]);
  kvc_ledger_answer(u[0].ledger, u[0].slot, KVCACHED_OK, 0);

  /* Its own limit: the others are told, the caller is not. */
  kvcached_limit_t own = {.struct_size = sizeof(own)};
  CHECK_OK(kvc_ledger_set_own_limit(u[0].ledger, u[0].slot, UNIT, &own));
  check_limit(own, KVCACHED_LIMIT_DEFERRED, 2, UNIT);
  CHECK_EQ(command_in(u[0]), 0);
  CHECK_EQ(command_in(u[1]), KVCACHED_CMD_TRIM);
  /* The card's: all. */
  CHECK_EQ(set(u[0].ledger, NULL, UNIT, 0).result, KVCACHED_LIMIT_DEFERRED);
  CHECK_EQ(command_in(u[0]), KVCACHED_CMD_TRIM);
  CHECK_EQ(command_in(u[3]), KVCACHED_CMD_TRIM);
  for (int i = 0; i < 4; i++) user_end(&u[i]);
}

/* A setter stopped after its first write: whoever claims sees that word, and takes it over. */
TEST_HOST(limits, half_spread) {
  const char *path = scratch("half-spread");
  user a = user_take(path, "g"), b = user_take(path, "g"), c = user_take(path, "g");
  kvc_ledger_map *m = map_ledger(path);
  CHECK_EQ(set(a.ledger, "g", 50 * UNIT, 3).result, KVCACHED_LIMIT_APPLIED);
  atomic_store(&m->slot[a.slot].limit, UINT64_C(4) << 32 | 10);
  check_limit(get(c.ledger, "g"), KVCACHED_LIMIT_APPLIED, 4, 10 * UNIT);
  CHECK_IS(user_claim(b, 11 * UNIT, UINT64_MAX, 10), KVCACHED_E_LIMIT);
  CHECK_EQ(atomic_load(&m->slot[b.slot].limit), UINT64_C(4) << 32 | 10);
  CHECK_EQ(atomic_load(&m->slot[c.slot].limit), UINT64_C(3) << 32 | 50);
  user_end(&a); /* it lives on in b */
  check_limit(get(c.ledger, "g"), KVCACHED_LIMIT_APPLIED, 4, 10 * UNIT);
  /* Two words of one revision (two setters met two first slots): the smaller limit holds. */
  atomic_store(&m->slot[c.slot].limit, UINT64_C(4) << 32 | 9);
  check_limit(get(c.ledger, "g"), KVCACHED_LIMIT_APPLIED, 4, 9 * UNIT);
  check_limit(set(c.ledger, "g", 10 * UNIT, 4), KVCACHED_LIMIT_CONFLICT, 4, 9 * UNIT);
  check_limit(set(c.ledger, "g", 10 * UNIT, 0), KVCACHED_LIMIT_APPLIED, 5, 10 * UNIT);
  CHECK_EQ(atomic_load(&m->slot[b.slot].limit), UINT64_C(5) << 32 | 10);
  /* The last revision there is: nothing can follow. */
  check_limit(set(c.ledger, "g", 10 * UNIT, UINT32_MAX), KVCACHED_LIMIT_APPLIED, UINT32_MAX, 10 * UNIT);
  check_limit(set(c.ledger, "g", 11 * UNIT, 0), KVCACHED_LIMIT_CONFLICT, UINT32_MAX, 10 * UNIT);
  check_limit(set(c.ledger, "g", 10 * UNIT, 0), KVCACHED_LIMIT_APPLIED, UINT32_MAX, 10 * UNIT);
  user_end(&b);
  user_end(&c);
  unmap_ledger(m);
}

/* A claim that was announced under the old limit has to announce again, also where its claimer is stopped. */
TEST_HOST(limits, setting_withdraws_announcements) {
  const char *path = scratch("withdraws");
  user a = user_take(path, "g"), b = user_take(path, "h");
  kvc_ledger_map *m = map_ledger(path);
  announce(m, a.slot, KVC_DEVICE, 5, KVC_ASK_ANNOUNCED, 20 * UNIT);
  announce(m, b.slot, KVC_DEVICE, 6, KVC_ASK_ANNOUNCED, 20 * UNIT);
  check_limit(set(b.ledger, "g", 10 * UNIT, 0), KVCACHED_LIMIT_APPLIED, 1, 10 * UNIT);
  CHECK_EQ(atomic_load(&m->slot[a.slot].ask[KVC_DEVICE].word), 5 << 2);
  CHECK_EQ(atomic_load(&m->slot[b.slot].ask[KVC_DEVICE].word), 6 << 2 | KVC_ASK_ANNOUNCED);
  /* Past that step it counts as a charge. */
  announce(m, a.slot, KVC_DEVICE, 7, KVC_ASK_COMMITTING, 20 * UNIT);
  check_limit(set(b.ledger, "g", 10 * UNIT, 0), KVCACHED_LIMIT_DEFERRED, 2, 10 * UNIT);
  CHECK_EQ(get(b.ledger, NULL).charge, 40 * UNIT - 20 * UNIT);
  user_end(&a);
  user_end(&b);
  unmap_ledger(m);
}

/* ---- races ---- */

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
    s->applied += set(s->ledger, s->group, bytes, 0).result == KVCACHED_LIMIT_APPLIED;
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
  CHECK_LE(applied, get(first.ledger, group).revision);
  CHECK_EQ(get(first.ledger, group).revision, SETTERS * SETTINGS);
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
    kvcached_limit_t done = set(l, c->group, (c->number + 1) * (uint64_t)UNIT, i + 1);
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
    check_limit(get(first.ledger, group), KVCACHED_LIMIT_APPLIED, i + 1, atomic_load(&a->bytes[i]));
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
    check_limit(set(mine.ledger, "g", i * (uint64_t)UNIT, i), KVCACHED_LIMIT_APPLIED, i, i * (uint64_t)UNIT);
    check_limit(get(mine.ledger, "g"), KVCACHED_LIMIT_APPLIED, i, i * (uint64_t)UNIT);
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
    int result = set(mine.ledger, group, low, 0).result;
    for (int64_t until = now_ms() + 10000; result == KVCACHED_LIMIT_DEFERRED && now_ms() < until;)
      result = get(mine.ledger, group).result;
    CHECK_EQ(result, KVCACHED_LIMIT_APPLIED);
    for (int64_t until = now_ms() + 4; now_ms() < until;) CHECK_LE(atomic_load(&held), low);
    CHECK_EQ(set(mine.ledger, group, 120 * UNIT, 0).result, KVCACHED_LIMIT_APPLIED);
    sleep_ms(1);
  }
  atomic_store(&stop, 1);
  for (int i = 0; i < SETTERS; i++) pthread_join(t[i], NULL);
  for (int i = 0; i < SETTERS; i++) CHECK(c[i].won > 0);
  user_end(&mine);
}

TEST_HOST(limits, lowered_group_is_never_passed) { lower_and_raise(scratch("lower-group"), "g"); }
TEST_HOST(limits, lowered_card_is_never_passed) { lower_and_raise(scratch("lower-card"), NULL); }

/* ---- arguments ---- */

static void use_parents_handle(void *arg) {
  kvcached_limit_t out = {.struct_size = sizeof(out)};
  CHECK_IS(kvcached_ledger_set_limit(arg, NULL, 1, 0, &out), KVCACHED_E_FORKED);
  CHECK_IS(kvcached_ledger_get_limit(arg, NULL, &out), KVCACHED_E_FORKED);
}

TEST_HOST(limits, arguments) {
  const char *path = scratch("arguments");
  kvcached_ledger_t l = open_ledger(path);
  kvcached_limit_t out = {.struct_size = 3};
  CHECK_IS(kvcached_ledger_set_limit(NULL, NULL, 1, 0, NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_get_limit(l, NULL, NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_get_limit(l, NULL, &out), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_set_limit(l, NULL, 1, 0, &out), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_set_limit(l, "", 1, 0, NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_set_limit(l, "0123456789012345678901234567890X", 1, 0, NULL), KVCACHED_E_INVAL);
  CHECK_EQ(get(l, NULL).revision, 0); /* none of them set anything */
  CHECK_OK(kvcached_ledger_set_limit(l, NULL, 5 * UNIT, 0, NULL));
  CHECK_EQ(get(l, NULL).limit, 5 * UNIT);
  child_join(child_start(use_parents_handle, l));
  kvcached_ledger_close(l);
}
