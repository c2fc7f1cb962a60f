/* Claims against other processes: stopped anywhere in the protocol, killed, many at once, and those of other
   containers. */
#include "ledger_kit.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- claims under way elsewhere: stopped processes, played by what they left in their slot ---- */

/* The younger one is withdrawn at once, whatever became of its process. */
TEST_HOST(ledger, older_claim_wins_at_once) {
  const char *path = scratch("older");
  user me = user_take(path, "g"), it = user_take(path, "g");
  kvc_ledger_map *m = map_ledger(path);
  announce(m, it.slot, KVC_DEVICE, 100000, KVC_ASK_ANNOUNCED, 6 * UNIT);
  int64_t start = now_ms();
  CHECK_OK(user_claim(me, 6 * UNIT, 10 * UNIT, 5000));
  CHECK_LE(now_ms() - start, 500);
  CHECK_EQ(atomic_load(&m->slot[it.slot].ask[KVC_DEVICE].word), 100000 << 2); /* withdrawn */
  CHECK_EQ(atomic_load(&m->slot[me.slot].ask[KVC_DEVICE].word) & 3, KVC_ASK_NONE);
  user_unclaim(me, 6 * UNIT);
  announce(m, it.slot, KVC_DEVICE, 100000, KVC_ASK_ANNOUNCED, 6 * UNIT);
  CHECK_OK(user_claim(me, 6 * UNIT, 10 * UNIT, 0)); /* nobody has to be waited for */
  user_unclaim(me, 6 * UNIT);
  announce(m, it.slot, KVC_DEVICE, 100000, KVC_ASK_ANNOUNCED, 6 * UNIT);
  CHECK_OK(user_claim(me, 4 * UNIT, 10 * UNIT, 0)); /* one that is not in the way is left alone */
  CHECK_EQ(atomic_load(&m->slot[it.slot].ask[KVC_DEVICE].word), 100000 << 2 | KVC_ASK_ANNOUNCED);
  user_end(&me);
  user_end(&it);
  unmap_ledger(m);
}

/* An older one that does not get on delays others by a part of the time they have. */
TEST_HOST(ledger, older_claim_of_a_stopped_process) {
  const char *path = scratch("stopped-older");
  user me = user_take(path, "g"), it = user_take(path, "g");
  kvc_ledger_map *m = map_ledger(path);
  atomic_store(&m->ticket, 1000);
  announce(m, it.slot, KVC_DEVICE, 1, KVC_ASK_ANNOUNCED, 6 * UNIT);
  CHECK_IS(user_claim(me, 6 * UNIT, 10 * UNIT, 0), KVCACHED_E_LIMIT); /* no time to wait */
  CHECK_OK(user_claim(me, 4 * UNIT, 10 * UNIT, 0));                   /* beside it, at once */
  user_unclaim(me, 4 * UNIT);
  int64_t start = now_ms();
  CHECK_OK(user_claim(me, 6 * UNIT, 10 * UNIT, 600));
  CHECK(now_ms() - start >= 290);
  CHECK_EQ(atomic_load(&m->slot[it.slot].ask[KVC_DEVICE].word), 1 << 2);
  user_end(&me);
  user_end(&it);
  unmap_ledger(m);
}

typedef struct rival {
  kvc_ledger_slot *its, *mine;
  unsigned withdrawn, standing;
} rival;

/* Watches the claimer for a while, then ends its own announcement. */
static void *play_rival(void *arg) {
  rival *r = arg;
  for (int64_t until = now_ms() + 100; now_ms() < until;) {
    uint64_t word = atomic_load(&r->mine->ask[KVC_DEVICE].word);
    if (word == 0) continue; /* not begun */
    if (word & 3)
      r->standing++;
    else
      r->withdrawn++;
  }
  atomic_store(&r->its->ask[KVC_DEVICE].word, 1 << 2);
  return NULL;
}

TEST_HOST(ledger, younger_claim_steps_back) {
  const char *path = scratch("younger");
  user me = user_take(path, "g"), it = user_take(path, "g");
  kvc_ledger_map *m = map_ledger(path);
  atomic_store(&m->ticket, 1000);
  announce(m, it.slot, KVC_DEVICE, 1, KVC_ASK_ANNOUNCED, 6 * UNIT);
  rival play = {&m->slot[it.slot], &m->slot[me.slot], 0, 0};
  pthread_t thread;
  CHECK(pthread_create(&thread, NULL, play_rival, &play) == 0);
  int64_t start = now_ms();
  CHECK_OK(user_claim(me, 6 * UNIT, 10 * UNIT, 20000));
  CHECK_LE(now_ms() - start, 5000); /* as soon as the other had ended */
  pthread_join(thread, NULL);
  CHECK(play.withdrawn > play.standing);
  user_end(&me);
  user_end(&it);
  unmap_ledger(m);
}

/* Past the step to COMMITTING it is a charge: so is a state that no process of this library writes. */
TEST_HOST(ledger, stopped_while_committing) {
  const char *path = scratch("committing");
  user me = user_take(path, "g"), it = user_take(path, "g");
  kvc_ledger_map *m = map_ledger(path);
  for (int state = KVC_ASK_COMMITTING; state <= 3; state++) {
    announce(m, it.slot, KVC_DEVICE, 100000, state, 6 * UNIT);
    int64_t start = now_ms();
    CHECK_IS(user_claim(me, 6 * UNIT, 10 * UNIT, 5000), KVCACHED_E_LIMIT);
    CHECK_LE(now_ms() - start, 1000); /* no use in waiting */
    CHECK_OK(user_claim(me, 4 * UNIT, 10 * UNIT, 0));
    user_unclaim(me, 4 * UNIT);
    atomic_store(&m->slot[it.slot].claim, 6 * UNIT); /* counted once, not twice */
    CHECK_OK(user_claim(me, 4 * UNIT, 10 * UNIT, 0));
    user_unclaim(me, 4 * UNIT);
    atomic_store(&m->slot[it.slot].claim, 0);
  }
  user_end(&it); /* dead: nothing of it counts */
  CHECK_OK(user_claim(me, 10 * UNIT, 10 * UNIT, 0));
  user_end(&me);
  unmap_ledger(m);
}

/* Host memory has limits, charges and announcements of its own. */
TEST_HOST(ledger, host_account) {
  const char *path = scratch("host");
  user a = user_take(path, "g"), b = user_take(path, "g"), c = user_take(path, "other");
  kvc_ledger_map *m = map_ledger(path);
  kvc_shortage s;
  CHECK_OK(kvcached_ledger_set_limit(a.ledger, "g", 0, 0, NULL)); /* the device's limits are not its */
  CHECK_OK(kvcached_ledger_set_limit(a.ledger, NULL, 0, 0, NULL));
  announce(m, b.slot, KVC_DEVICE, 1, KVC_ASK_ANNOUNCED, UINT64_MAX);
  CHECK_OK(kvc_ledger_claim(a.ledger, a.slot, KVC_CLAIM_HOST, 70, 100, 0, &s));
  CHECK_OK(kvc_ledger_claim(c.ledger, c.slot, KVC_CLAIM_HOST, 90, 100, 0, &s));
  CHECK_IS(kvc_ledger_claim(b.ledger, b.slot, KVC_CLAIM_HOST, 40, 100, 0, &s), KVCACHED_E_HOST_LIMIT);
  CHECK_EQ(s.group, 10);
  CHECK_EQ(s.card, 0);
  CHECK_DETAIL("40 bytes of host memory");
  kvc_account acc;
  CHECK_OK(kvc_ledger_account(b.ledger, b.slot, UINT64_MAX, &acc));
  CHECK_EQ(acc.host_charge, 70);
  CHECK_EQ(acc.group_charge, 0);
  CHECK_EQ(slot_in(path, a.slot).host_bytes, 70);
  CHECK_EQ(slot_in(path, a.slot).charge, 0);
  kvc_ledger_unclaim(a.ledger, a.slot, KVC_CLAIM_HOST, 30);
  CHECK_OK(kvc_ledger_claim(b.ledger, b.slot, KVC_CLAIM_HOST, 60, 100, 0, &s));
  CHECK_EQ(atomic_load(&m->slot[b.slot].ask[KVC_DEVICE].word), 1 << 2 | KVC_ASK_ANNOUNCED);
  user_end(&a);
  CHECK_OK(kvc_ledger_claim(b.ledger, b.slot, KVC_CLAIM_HOST, 40, 100, 0, &s)); /* with its holder */
  user_end(&b);
  user_end(&c);
  unmap_ledger(m);
}

/* ---- many processes, some of them stopped or killed at any moment ---- */

typedef struct arena {
  _Atomic uint64_t held, claims;
  _Atomic int stop;
  int counts; /* 0: whoever is killed leaves `held` as it is, so it says nothing */
  char path[400];
} arena;

enum { CROWD = 6, LIMIT = 20 };

static void count_held(arena *a, uint64_t bytes) {
  atomic_fetch_add(&a->claims, 1);
  if (!a->counts) return;
  CHECK_LE(atomic_fetch_add(&a->held, bytes) + bytes, LIMIT * UNIT);
  atomic_fetch_sub(&a->held, bytes);
}

/* A parent that sets memory aside and gives it up again. */
static void lease_and_drop(void *arg) {
  arena *a = arg;
  kvcached_ledger_t l = open_ledger(a->path);
  uint32_t seed = (uint32_t)getpid() * 2654435761u | 1;
  while (!atomic_load(&a->stop)) {
    uint64_t bytes = (1 + next_random(&seed) % 14) * (uint64_t)UNIT;
    int slot, err = kvcached_ledger_lease(l, "g", "m", bytes, 0, LIMIT * UNIT, &slot);
    if (err == KVCACHED_OK) {
      count_held(a, bytes);
      CHECK_OK(kvcached_ledger_unlease(l, slot));
    } else {
      CHECK_IS(err, KVCACHED_E_LIMIT);
    }
  }
  kvcached_ledger_close(l);
}

static void claim_and_drop(void *arg) {
  arena *a = arg;
  user u = user_take(a->path, "g");
  uint32_t seed = (uint32_t)getpid() * 2654435761u | 1;
  kvc_shortage s;
  while (!atomic_load(&a->stop)) {
    uint64_t bytes = (1 + next_random(&seed) % 14) * (uint64_t)UNIT;
    int err = kvc_ledger_claim(u.ledger, u.slot, KVC_CLAIM_PAGES, bytes, LIMIT * UNIT, 200, &s);
    if (err == KVCACHED_OK) {
      count_held(a, bytes);
      user_unclaim(u, bytes);
    } else {
      CHECK_IS(err, KVCACHED_E_LIMIT);
    }
  }
  user_end(&u);
}

/* Stopped at random, again and again. Nobody passes the limit or waits longer than it may; whoever is not
   stopped gets on, as long as the stopped one does not hold what is wanted. */
TEST_HOST(ledger, crowd_with_stops) {
  arena *a = shared_memory(sizeof(*a));
  snprintf(a->path, sizeof(a->path), "%s", scratch("stops"));
  a->counts = 1;
  user me = user_take(a->path, "g");
  pid_t pid[CROWD];
  uint32_t seed = first_seed(7);
  for (int i = 0; i < CROWD; i++) pid[i] = child_start(i % 3 ? claim_and_drop : lease_and_drop, a);
  WAIT_FOR(atomic_load(&a->claims) > 2 * CROWD);
  for (unsigned round = 0; round < rounds(40); round++) {
    pid_t who = pid[next_random(&seed) % CROWD];
    CHECK(kill(who, SIGSTOP) == 0);
    int64_t start = now_ms();
    int err = user_claim(me, 5 * UNIT, LIMIT * UNIT, 300); /* which checks how long it took */
    if (err == KVCACHED_OK)
      user_unclaim(me, 5 * UNIT);
    else
      CHECK_IS(err, KVCACHED_E_LIMIT);
    kvcached_limit_t l = {.struct_size = sizeof(l)};
    CHECK_OK(kvcached_ledger_get_limit(me.ledger, "g", &l));
    CHECK_LE(now_ms() - start, 1500);
    CHECK_LE(l.charge, 2 * LIMIT * UNIT); /* no snapshot: what moved meanwhile shows twice */
    CHECK(kill(who, SIGCONT) == 0);
    sleep_ms(next_random(&seed) % 4);
  }
  atomic_store(&a->stop, 1);
  for (int i = 0; i < CROWD; i++) child_join(pid[i]);
  CHECK(atomic_load(&a->claims) > 0);
  CHECK_EQ(atomic_load(&a->held), 0);
  CHECK_OK(user_claim(me, LIMIT * UNIT, LIMIT * UNIT, 0)); /* nothing is left of them */
  user_end(&me);
  CHECK_EQ(live_slots(a->path), 0);
}

/* Killed at random: slots, charges and announcements end with them. */
TEST_HOST(ledger, crowd_with_kills) {
  arena *a = shared_memory(sizeof(*a));
  snprintf(a->path, sizeof(a->path), "%s", scratch("kills"));
  uint32_t seed = first_seed(11);
  user me = user_take(a->path, "g");
  for (unsigned round = 0; round < rounds(15); round++) {
    pid_t pid[CROWD];
    for (int i = 0; i < CROWD; i++) pid[i] = child_start(i % 3 ? claim_and_drop : lease_and_drop, a);
    sleep_ms(next_random(&seed) % 12);
    for (int i = 0; i < CROWD; i++) child_kill(pid[i]);
    CHECK_EQ(live_slots(a->path), 1);
    CHECK_OK(user_claim(me, LIMIT * UNIT, LIMIT * UNIT, 0));
    user_unclaim(me, LIMIT * UNIT);
  }
  user_end(&me);
}

/* ---- containers ---- */

typedef struct visitor {
  const char *path;
  int to_parent[2], to_child[2];
  pid_t child; /* as the parent's namespace numbers it */
} visitor;

static void say(int fd) { CHECK(write(fd, "x", 1) == 1); }
static int hear(int fd) {
  char c;
  return read(fd, &c, 1) == 1;
}

/* The first process of a new pid namespace: its number there says nothing outside. */
static void visit(void *arg) {
  const visitor *v = arg;
  CHECK_EQ(getpid(), 1);
  user u = user_take(v->path, "g");
  CHECK_OK(user_claim(u, 60, 100, 100));
  CHECK_EQ(live_slots(v->path), 2); /* and it sees those outside */
  say(v->to_parent[1]);
  CHECK(hear(v->to_child[0]));
  CHECK_OK(user_claim(u, 30, 100, 100)); /* the other one was killed meanwhile */
  say(v->to_parent[1]);
  (void)hear(v->to_child[0]);
}

static void found_namespace(void *arg) {
  visitor *v = arg;
  if (!enter_namespaces(CLONE_NEWPID)) _exit(77);
  child_join(child_start(visit, v));
}

static void hold_forty(void *arg) {
  const visitor *v = arg;
  user u = user_take(v->path, "g");
  CHECK_OK(user_claim(u, 40, 100, 100));
  say(v->to_parent[1]);
  for (;;) pause();
}

TEST_SYSTEM(ledger, other_pid_namespace) {
  visitor v = {.path = scratch("pid-namespace")};
  CHECK(pipe(v.to_parent) == 0 && pipe(v.to_child) == 0);
  pid_t other = child_start(hold_forty, &v);
  CHECK(hear(v.to_parent[0]));
  pid_t pid = child_start(found_namespace, &v);
  int status;
  for (;;) { /* until it has its slot, or may not have a namespace */
    if (waitpid(pid, &status, WNOHANG) == pid) {
      child_kill(other);
      CHECK(WIFEXITED(status));
      CHECK_EQ(WEXITSTATUS(status), 77);
      SKIP("no pid namespace can be made here");
    }
    if (live_slots(v.path) == 2 && slot_in(v.path, 1).charge == 60) break;
    sleep_ms(1);
  }
  CHECK(hear(v.to_parent[0]));
  CHECK_EQ(slot_in(v.path, 1).pid, 1); /* a process that lives here too, but is another */
  user me = user_take(v.path, "g");
  CHECK_IS(user_claim(me, 1, 100, 100), KVCACHED_E_LIMIT); /* it is alive all the same */
  user_end(&me);
  child_kill(other);
  say(v.to_child[1]);
  CHECK(hear(v.to_parent[0]));
  CHECK_EQ(slot_in(v.path, 1).charge, 90);
  say(v.to_child[1]);
  child_join(pid);
  CHECK_EQ(live_slots(v.path), 0);
}

/* A folder of its own at /dev/shm is another ledger; the same one is the same. */
static void in_private_folder(void *arg) {
  (void)arg;
  if (!enter_namespaces(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 ||
      mount("tmpfs", "/dev/shm", "tmpfs", 0, "size=1m,mode=1777") != 0)
    _exit(77);
  kvcached_ledger_t l = open_ledger(NULL);
  size_t n;
  CHECK_OK(kvcached_ledger_slots(l, NULL, 0, &n));
  CHECK_EQ(n, 0);
  int slot;
  CHECK_OK(kvcached_ledger_lease(l, "g", "m", 60, 0, 100, &slot));
  if (!arg) return;
  pid_t inner = child_start(in_private_folder, NULL); /* the same path again, and again empty */
  int status;
  CHECK(waitpid(inner, &status, 0) == inner && WIFEXITED(status));
  CHECK_EQ(WEXITSTATUS(status), 0);
  CHECK_IS(kvcached_ledger_lease(l, "g", "m", 60, 0, 100, &slot), KVCACHED_E_LIMIT); /* here it is not */
  kvcached_ledger_close(l);
}

static void share_folder(void *arg) {
  if (!enter_namespaces(CLONE_NEWNS)) _exit(77); /* another container, with the same folder mounted */
  kvcached_ledger_t l = open_ledger(arg);
  int slot;
  CHECK_IS(kvcached_ledger_lease(l, "g", "m", 60, 0, 100, &slot), KVCACHED_E_LIMIT);
  CHECK_OK(kvcached_ledger_lease(l, "g", "m", 40, 0, 100, &slot));
  kvcached_ledger_close(l);
}

static int ended_well(pid_t pid) {
  int status;
  CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status));
  if (WEXITSTATUS(status) == 77) return 0;
  CHECK_EQ(WEXITSTATUS(status), 0);
  return 1;
}

TEST_SYSTEM(ledger, other_mount_namespace) {
  const char *path = scratch("mounts");
  kvcached_ledger_t l = open_ledger(path);
  int slot, yes = 1;
  CHECK_OK(kvcached_ledger_lease(l, "g", "m", 60, 0, 100, &slot));
  int shared = ended_well(child_start(share_folder, (void *)(uintptr_t)path));
  int private = ended_well(child_start(in_private_folder, &yes));
  kvcached_ledger_close(l);
  if (!shared || !private) SKIP("no file systems can be mounted here");
}
