/* Leases, slots and claims. Most tests here are one process: two handles of it exclude each other as two
   processes do. */
#include "ledger_impl.h"
#include "ledger_kit.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

static int attach(const char *path, int slot, const char *group, uint64_t limit, kvcached_ctx_t *ctx) {
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = path;
  o.slot = slot;
  o.group = group;
  o.limit = limit;
  o.name = "child";
  return kvcached_open(&o, ctx);
}

TEST(ledger, lease_and_child) {
  const size_t page = test_page();
  const char *path = scratch("lease");
  kvcached_ledger_t parent = open_ledger(path), other = open_ledger(path);
  int a, b;
  CHECK_OK(kvcached_ledger_lease(parent, "ollama", "model-a", 60 * page, 10 * page, 100 * page, &a));
  kvcached_slot_t s = slot_in(path, a);
  CHECK(s.leased && !s.attached && s.pid == getpid());
  CHECK(strcmp(s.group, "ollama") == 0 && strcmp(s.name, "model-a") == 0);
  CHECK(s.lease == 60 * page && s.fixed == 10 * page && s.claim == 0 && s.charge == 60 * page);

  CHECK_IS(kvcached_ledger_lease(other, "ollama", "model-b", 41 * page, 0, 100 * page, &b), KVCACHED_E_LIMIT);
  CHECK_EQ(b, -1);
  CHECK_DETAIL("group \"ollama\"");
  char limit[40];
  snprintf(limit, sizeof(limit), "the limit is %zu,", 100 * page);
  CHECK_DETAIL(limit);
  CHECK_EQ(live_slots(path), 1);
  CHECK_OK(kvcached_ledger_lease(other, "another", "model-b", 100 * page, 0, 100 * page,
                                 &b)); /* groups do not meet */
  CHECK(a != b);
  CHECK_IS(kvcached_ledger_unlease(parent, b), KVCACHED_E_SLOT); /* not its own */
  CHECK_OK(kvcached_ledger_unlease(other, b));
  CHECK_EQ(live_slots(path), 1);

  kvcached_ctx_t ctx = NULL, second = NULL;
  CHECK_IS(attach(path, b, NULL, UINT64_MAX, &ctx), KVCACHED_E_SLOT);
  CHECK_DETAIL("not leased");
  CHECK_IS(attach(path, KVC_LEDGER_SLOTS, NULL, UINT64_MAX, &ctx), KVCACHED_E_SLOT);
  CHECK_IS(attach(path, a, "another", UINT64_MAX, &ctx), KVCACHED_E_SLOT);
  CHECK_DETAIL("leased for group \"ollama\"");
  CHECK_OK(attach(path, a, "ollama", 100 * page, &ctx));
  CHECK_IS(attach(path, a, "ollama", 100 * page, &second), KVCACHED_E_SLOT);
  CHECK_DETAIL("in use by pid");

  /* The child's first pages consume the lease; what goes beyond it is charged on top. */
  kvcached_region_t r;
  CHECK_OK(kvcached_reserve(ctx, KVCACHED_KV, 200 * page, &r));
  CHECK_OK(kvcached_ensure(r, 0, 50 * page));
  s = slot_in(path, a);
  CHECK(s.leased && s.attached && s.claim == 50 * page && s.charge == 60 * page && s.reserved == 200 * page);
  CHECK(strcmp(s.name, "model-a") == 0);
  CHECK_OK(kvcached_ledger_lease(other, "ollama", "b", 30 * page, 0, 100 * page, &b));
  CHECK_OK(kvcached_ensure(r, 0, 60 * page));
  CHECK_EQ(slot_in(path, a).charge, 70 * page);
  CHECK_EQ(stats_of(ctx).group_charge, 100 * page);
  CHECK_IS(kvcached_ensure(r, 0, 61 * page), KVCACHED_E_LIMIT);
  CHECK_EQ(slot_in(path, a).claim, 60 * page);
  CHECK_OK(kvcached_ledger_unlease(other, b));
  CHECK_OK(kvcached_ensure(r, 0, 61 * page));

  /* A lease outlives its child, and its parent's handle. */
  kvcached_shutdown(ctx);
  s = slot_in(path, a);
  CHECK(s.leased && !s.attached && s.claim == 0 && s.charge == 60 * page && s.reserved == 0);
  CHECK_OK(attach(path, a, NULL, 100 * page, &ctx)); /* the next child; the group is the lease's */
  CHECK_EQ(slot_in(path, a).claim, 0);
  CHECK_OK(kvcached_ledger_unlease(parent, a));
  s = slot_in(path, a);
  CHECK(!s.leased && s.attached && s.charge == 60 * page);
  CHECK_IS(kvcached_ledger_lease(parent, "ollama", "b", 41 * page, 0, 100 * page, &b), KVCACHED_E_LIMIT);
  kvcached_shutdown(ctx);
  CHECK_EQ(live_slots(path), 0);
  CHECK_OK(kvcached_ledger_lease(parent, "ollama", "b", 100 * page, 0, 100 * page, &b));
  kvcached_ledger_close(parent); /* drops what it leased */
  CHECK_EQ(live_slots(path), 0);
  kvcached_ledger_close(other);
}

/* A limit already passed (others were given more) does not take back what a lease promised. */
TEST(ledger, lease_is_kept) {
  const size_t page = test_page();
  const char *path = scratch("kept");
  kvcached_ledger_t l = open_ledger(path);
  int a, b;
  kvcached_ctx_t ctx;
  kvcached_region_t r;
  CHECK_OK(kvcached_ledger_lease(l, "g", "a", 10 * page, 0, 10 * page, &a));
  CHECK_OK(kvcached_ledger_lease(l, "g", "b", 50 * page, 0, 100 * page, &b));
  CHECK_OK(attach(path, a, "g", 10 * page, &ctx));
  CHECK_OK(kvcached_reserve(ctx, KVCACHED_KV, 100 * page, &r));
  CHECK_OK(kvcached_ensure(r, 0, 10 * page));
  CHECK_IS(kvcached_ensure(r, 0, 11 * page), KVCACHED_E_LIMIT);
  kvcached_shutdown(ctx);
  kvcached_ledger_close(l);
}

/* More above the limit than is asked for: idle pages make up for both. */
TEST(ledger, idle_gives_way_to_others) {
  const size_t page = test_page();
  const char *path = scratch("gives-way");
  kvcached_ctx_t a = open_in(path, "g", 20 * page), b = open_in(path, "g", 40 * page);
  kvcached_region_t ra, rb;
  CHECK_OK(kvcached_reserve(a, KVCACHED_KV, 100 * page, &ra));
  CHECK_OK(kvcached_reserve(b, KVCACHED_KV, 100 * page, &rb));
  CHECK_OK(kvcached_ensure(ra, 0, 16 * page));
  CHECK_OK(kvcached_release(ra, 0, 12 * page));
  CHECK_OK(kvcached_ensure(rb, 0, 10 * page)); /* 26 in all: above a's limit, not b's */
  CHECK_OK(kvcached_ensure(ra, 20 * page, 2 * page));
  CHECK_EQ(stats_of(a).group_charge, 20 * page);
  CHECK_EQ(stats_of(a).idle, 4 * page);
  check_region(ra);
  CHECK_IS(kvcached_ensure(ra, 30 * page, 5 * page), KVCACHED_E_LIMIT);
  CHECK_EQ(stats_of(a).idle, 4 * page);
  CHECK_OK(kvcached_ensure(ra, 30 * page, 4 * page));
  kvcached_shutdown(a);
  kvcached_shutdown(b);
}

TEST(ledger, slots_without_lease) {
  const size_t page = test_page();
  const char *path = scratch("plain");
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = path;
  o.limit = 20 * page;
  o.fixed = 15 * page;
  o.group = "g";
  char long_name[200];
  memset(long_name, 'n', sizeof(long_name));
  long_name[199] = 0;
  o.name = long_name;
  kvcached_ctx_t a, b, c;
  CHECK_OK(kvcached_open(&o, &a));
  CHECK_IS(kvcached_open(&o, &b), KVCACHED_E_LIMIT); /* its fixed part does not fit */
  CHECK_EQ(live_slots(path), 1);
  o.fixed = 5 * page;
  CHECK_OK(kvcached_open(&o, &b));
  kvcached_ledger_t l = open_ledger(path);
  kvcached_slot_t s = slot_in(path, 0);
  CHECK(!s.leased && s.attached && s.fixed == 15 * page && s.charge == 15 * page &&
        strlen(s.name) == KVCACHED_NAME_MAX);
  kvcached_region_t r;
  CHECK_OK(kvcached_reserve(b, KVCACHED_KV, 10 * page, &r));
  CHECK_IS(kvcached_ensure(r, 0, 1), KVCACHED_E_LIMIT);
  o.group = NULL; /* a group of its own */
  CHECK_OK(kvcached_open(&o, &c));
  char own[40];
  snprintf(own, sizeof(own), "pid-%ld", (long)getpid());
  CHECK(strcmp(slot_in(path, 2).group, own) == 0);
  kvcached_shutdown(a);
  CHECK_OK(kvcached_ensure(r, 0, 10 * page));
  kvcached_shutdown(b);
  kvcached_shutdown(c);
  o.group = "0123456789012345678901234567890X"; /* 32 bytes */
  CHECK_IS(kvcached_open(&o, &a), KVCACHED_E_INVAL);
  o.group = "";
  CHECK_IS(kvcached_open(&o, &a), KVCACHED_E_INVAL);
  CHECK_EQ(live_slots(path), 0);
  kvcached_ledger_close(l);
}

TEST_HOST(ledger, arguments) {
  const char *path = scratch("arguments");
  kvcached_ledger_t l = open_ledger(path);
  int slot = 5;
  size_t n;
  CHECK_IS(kvcached_ledger_lease(l, NULL, "n", 1, 0, 1, &slot), KVCACHED_E_INVAL);
  CHECK_EQ(slot, -1);
  CHECK_IS(kvcached_ledger_lease(l, "", "n", 1, 0, 1, &slot), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_lease(NULL, "g", "n", 1, 0, 1, &slot), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_unlease(l, -1), KVCACHED_E_SLOT);
  CHECK_IS(kvcached_ledger_unlease(l, 4000), KVCACHED_E_SLOT);
  kvcached_slot_t s = {.struct_size = 3};
  CHECK_IS(kvcached_ledger_slots(l, &s, 1, &n), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_slots(l, NULL, 1, &n), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_lease(l, "g", "n", UINT64_MAX, 1, UINT64_MAX - 1, &slot), KVCACHED_E_LIMIT);
  CHECK_OK(kvcached_ledger_lease(l, "g", NULL, 1, 7, 7, &slot)); /* fixed is the larger */
  CHECK_EQ(slot_in(path, slot).charge, 7);
  kvcached_ledger_close(l);
}

TEST_HOST(ledger, full) {
  const char *path = scratch("full");
  kvcached_ledger_t l = open_ledger(path), other = open_ledger(path);
  int slot, used[KVC_LEDGER_SLOTS] = {0};
  for (int i = 0; i < KVC_LEDGER_SLOTS; i++) {
    CHECK_OK(kvcached_ledger_lease(i % 2 ? l : other, "g", "n", 1, 0, UINT64_MAX, &slot));
    CHECK(!used[slot]++);
  }
  CHECK_IS(kvcached_ledger_lease(l, "g", "n", 1, 0, UINT64_MAX, &slot), KVCACHED_E_FULL);
  CHECK_IS(kvcached_ledger_lease(other, "g", "n", 1, 0, UINT64_MAX, &slot), KVCACHED_E_FULL);
  kvcached_slot_t few[3];
  size_t n;
  few[0].struct_size = sizeof(few[0]);
  CHECK_OK(kvcached_ledger_slots(l, few, 3, &n));
  CHECK_EQ(n, KVC_LEDGER_SLOTS);
  CHECK_EQ(few[2].slot, 2);
  kvcached_ledger_close(other);
  CHECK_OK(kvcached_ledger_lease(l, "g", "n", 1, 0, UINT64_MAX, &slot));
  kvcached_ledger_close(l);
}

/* ---- claims under way elsewhere: stopped processes, played by what they left in their slot ---- */

enum { UNIT = 4096 };

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

/* A taker killed while filling a slot in leaves it marked so: it counts for nothing and can be taken. */
TEST_HOST(ledger, half_taken_slot) {
  const char *path = scratch("half");
  user u = user_take(path, "g");
  kvc_ledger_map *m = map_ledger(path);
  atomic_fetch_add(&m->slot[0].gen, 1);
  atomic_store(&m->slot[0].claim, 1 << 30);
  CHECK_EQ(live_slots(path), 0); /* stopped there */
  user_end(&u);
  CHECK_EQ(live_slots(path), 0); /* dead */
  u = user_take(path, "g");
  CHECK_EQ(u.slot, 0);
  CHECK_EQ(live_slots(path), 1);
  CHECK_EQ(atomic_load(&m->slot[0].gen) % 2, 0);
  CHECK_OK(user_claim(u, 10, 10, 0));
  user_end(&u);
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

TEST_HOST(ledger, lease_left) {
  const char *path = scratch("left");
  kvcached_ledger_t parent = open_ledger(path), child = open_ledger(path);
  int slot;
  char group[KVCACHED_GROUP_MAX + 1];
  kvc_account a;
  kvc_shortage s;
  CHECK_OK(kvcached_ledger_lease(parent, "g", "m", 100, 30, 100, &slot));
  CHECK_OK(kvc_ledger_attach(child, slot, NULL, NULL, group));
  CHECK_TEXT(group, "g");
  CHECK_OK(kvc_ledger_account(child, slot, 100, &a));
  CHECK_EQ(a.lease_left, 70);
  CHECK_OK(kvc_ledger_claim(child, slot, KVC_CLAIM_PAGES, 50, 100, 0, &s));
  CHECK_OK(kvc_ledger_account(child, slot, 100, &a));
  CHECK_EQ(a.lease_left, 20);
  CHECK_EQ(a.group_charge, 100);
  CHECK_OK(kvc_ledger_claim(child, slot, KVC_CLAIM_PAGES, 60, 200, 0, &s));
  CHECK_OK(kvc_ledger_account(child, slot, 100, &a));
  CHECK_EQ(a.lease_left, 0);
  CHECK_EQ(a.group_charge, 140);
  CHECK_OK(kvc_ledger_claim(child, slot, KVC_CLAIM_HOST, 60, 200, 0, &s));
  kvcached_ledger_close(child); /* as if killed: nothing was given back */
  kvcached_slot_t left = slot_in(path, slot);
  CHECK(left.charge == 100 && left.claim == 0 && left.host_bytes == 0 && left.leased && !left.attached);
  child = open_ledger(path);
  CHECK_OK(kvc_ledger_attach(child, slot, NULL, NULL, group));
  left = slot_in(path, slot);
  CHECK(left.charge == 100 && left.claim == 0 && left.host_bytes == 0 && left.attached);
  kvcached_ledger_close(child);
  kvcached_ledger_close(parent);
}

typedef struct leasing {
  kvcached_ledger_t ledger;
  int err, slot;
} leasing;

static void *lease_six(void *arg) {
  leasing *x = arg;
  x->err = kvcached_ledger_lease(x->ledger, "g", "m", 6, 0, 10, &x->slot);
  return NULL;
}

/* A lease that waits holds up neither other threads of its handle nor other leases; and nobody ends it. */
TEST_HOST(ledger, lease_under_way) {
  const char *path = scratch("under-way");
  user it = user_take(path, "g");
  kvc_ledger_map *m = map_ledger(path);
  leasing x = {.ledger = open_ledger(path)};
  pthread_t thread;
  atomic_store(&m->ticket, 1000);
  announce(m, it.slot, KVC_DEVICE, 1, KVC_ASK_ANNOUNCED, 6); /* it waits for this one, half a second */
  int64_t start = now_ms();
  CHECK(pthread_create(&thread, NULL, lease_six, &x) == 0);
  WAIT_FOR(live_slots(path) == 2);
  CHECK_IS(kvcached_ledger_unlease(x.ledger, 1), KVCACHED_E_SLOT);
  int slot;
  CHECK_OK(kvcached_ledger_lease(x.ledger, "h", "m", 6, 0, 10, &slot));
  CHECK_OK(kvcached_ledger_unlease(x.ledger, slot));
  CHECK_LE(now_ms() - start, 450);
  kvc_slot_view seen; /* somebody who sums looks at the slot, and is interrupted before asking who holds it */
  CHECK(kvc_slot_peek(it.ledger, 1, &seen) && seen.lease == 0);
  pthread_join(thread, NULL);
  CHECK_OK(x.err);
  CHECK_OK(kvc_slot_confirm(it.ledger, 1, &seen));
  CHECK_EQ(kvc_slot_charge(&seen, 0), 6); /* not overlooked, though it was announced, and is not any more */
  CHECK_EQ(x.slot, 1);
  CHECK(slot_in(path, 1).leased && slot_in(path, 1).charge == 6);
  CHECK_OK(kvcached_ledger_unlease(x.ledger, 1));
  kvcached_ledger_close(x.ledger);
  user_end(&it);
  unmap_ledger(m);
}

/* ---- what is shown, and whom to ask for room ---- */

TEST_HOST(ledger, figures) {
  const char *path = scratch("figures");
  user u = user_take(path, "g");
  kvc_figures f = {.reserved = 1, .kind_bytes = {2, 3, 4}, .idle = 5, .pooled = 6, .asleep = 7};
  int64_t before = kvc_now_ns();
  kvc_ledger_publish(u.ledger, u.slot, &f);
  kvc_ledger_mark_inside(u.ledger, u.slot, 8);
  kvc_ledger_mark_woke(u.ledger, u.slot);
  kvc_ledger_mark_queued(u.ledger, u.slot, 9);
  kvcached_slot_t s = slot_in(path, u.slot);
  CHECK(s.reserved == 1 && s.kind_bytes[0] == 2 && s.kind_bytes[1] == 3 && s.kind_bytes[2] == 4);
  CHECK(s.idle == 5 && s.pooled == 6 && s.asleep == 7 && s.inside == 8 && s.queued == 9);
  CHECK(!s.controlled && s.limit == UINT64_MAX && s.host_bytes == 0);
  CHECK_LE(before - 20000000, s.last_use_ns); /* of a coarse clock */
  CHECK_LE(s.last_use_ns, s.woke_ns);
  CHECK_LE(s.woke_ns, kvc_now_ns());
  kvc_ledger_control(u.ledger, u.slot, 1);
  CHECK_EQ(slot_in(path, u.slot).controlled, 1);
  user_end(&u);
  u = user_take(path, "g"); /* nothing of it is left */
  s = slot_in(path, u.slot);
  CHECK(s.reserved == 0 && s.idle == 0 && s.inside == 0 && s.queued == 0 && s.last_use_ns == 0 &&
        !s.controlled && s.woke_ns == 0 && s.asleep == 0 && s.kind_bytes[2] == 0);
  user_end(&u);
}

/* Older callers have a smaller structure, newer ones a larger one. */
TEST_HOST(ledger, sizes_of_a_slot) {
  const char *path = scratch("sizes");
  user u[3];
  for (int i = 0; i < 3; i++) u[i] = user_take(path, "g");
  const size_t old = offsetof(kvcached_slot_t, kind_bytes), large = sizeof(kvcached_slot_t) + 64;
  size_t n;
  char *bytes = malloc(3 * large);
  CHECK(bytes != NULL);
  memset(bytes, 0x5a, 3 * large);
  memcpy(bytes, &old, sizeof(old));
  CHECK_OK(kvcached_ledger_slots(u[0].ledger, (kvcached_slot_t *)(void *)bytes, 3, &n));
  CHECK_EQ(n, 3);
  for (size_t i = 0; i < 3; i++) {
    int slot;
    memcpy(&slot, bytes + i * old + offsetof(kvcached_slot_t, slot), sizeof(slot));
    CHECK_EQ(slot, i);
  }
  CHECK(all_bytes(bytes + 3 * old, 3 * (large - old), 0x5a));
  memset(bytes, 0x5a, 3 * large);
  memcpy(bytes, &large, sizeof(large));
  CHECK_OK(kvcached_ledger_slots(u[0].ledger, (kvcached_slot_t *)(void *)bytes, 3, &n));
  for (size_t i = 0; i < 3; i++) {
    kvcached_slot_t one;
    memcpy(&one, bytes + i * large, sizeof(one));
    CHECK(one.slot == (int)i && one.struct_size == sizeof(one));
    CHECK(all_bytes(bytes + i * large + sizeof(one), 64, 0x5a));
  }
  free(bytes);
  for (int i = 0; i < 3; i++) user_end(&u[i]);
}

static void make_victim(kvc_ledger_map *m, user u, uint64_t used_ns_ago, uint64_t idle, uint64_t claim) {
  kvc_ledger_control(u.ledger, u.slot, 1);
  kvc_ledger_publish(u.ledger, u.slot, &(kvc_figures){.idle = idle});
  atomic_store(&m->slot[u.slot].last_use_ns, (uint64_t)kvc_now_ns() - used_ns_ago);
  atomic_store(&m->slot[u.slot].claim, claim);
}

TEST_HOST(ledger, victims) {
  const char *path = scratch("victims");
  user me = user_take(path, "mine"), mate = user_take(path, "mine"), a = user_take(path, "x"),
       b = user_take(path, "y"), c = user_take(path, "z");
  kvc_ledger_map *m = map_ledger(path);
  const uint64_t second = 1000000000;
  make_victim(m, mate, 90 * second, 1, 1);
  make_victim(m, a, 5 * second, 1, 1);
  make_victim(m, b, 50 * second, 1, 1);
  make_victim(m, c, 20 * second, 0, 1);
  uint64_t asked[2] = {0, 0};
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 0, asked), b.slot); /* unused the longest */
  asked[b.slot / 64] |= UINT64_C(1) << (b.slot % 64);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 0, asked), a.slot); /* c has nothing idle */
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, asked), c.slot);
  asked[a.slot / 64] |= UINT64_C(1) << (a.slot % 64);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 0, asked), -1); /* its own group is not asked */
  asked[0] = asked[1] = 0;
  kvc_ledger_mark_queued(b.ledger, b.slot, 1);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, asked), c.slot);
  kvc_ledger_mark_queued(b.ledger, b.slot, 0);
  atomic_store(&m->slot[b.slot].inside, 1);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, asked), c.slot);
  atomic_store(&m->slot[b.slot].inside, 0);
  kvc_ledger_mark_woke(b.ledger, b.slot);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, asked), c.slot);
  atomic_store(&m->slot[b.slot].woke_ns, (uint64_t)kvc_now_ns() - 2 * second);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, asked), b.slot);
  kvc_ledger_control(b.ledger, b.slot, 0);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, asked), c.slot);
  user_end(&c);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, asked), a.slot);
  atomic_store(&m->slot[a.slot].claim, 0);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, asked), -1);
  unmap_ledger(m);
  user_end(&me);
  user_end(&mate);
  user_end(&a);
  user_end(&b);
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
