/* Leases and slots. Most tests here are one process: two handles of it exclude each other as two processes
   do. */
#include "ledger_impl.h"
#include "ledger_kit.h"

#include <pthread.h>
#include <stdatomic.h>
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

/* A lease is there to load by: a child that sleeps is charged for what it holds, and has to find room to
 * wake. */
TEST(ledger, sleep_ends_the_lease) {
  const size_t page = test_page();
  const char *path = scratch("sleeper");
  kvcached_ledger_t l = open_ledger(path);
  int slot;
  kvcached_ctx_t ctx;
  CHECK_OK(kvcached_ledger_lease(l, "g", "a", 50 * page, 5 * page, 100 * page, &slot));
  CHECK_OK(attach(path, slot, "g", 100 * page, &ctx));
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 60 * page);
  CHECK_OK(kvcached_ensure(r, 0, 30 * page));
  put(r, 0, 's', 30 * page);
  CHECK_EQ(slot_in(path, slot).charge, 50 * page);
  CHECK_OK(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 1000, NULL));
  kvcached_slot_t s = slot_in(path, slot);
  CHECK(s.leased && s.attached && s.lease == 0);
  CHECK_EQ(s.charge, 5 * page);

  kvcached_ctx_t other = open_in(path, "g", 100 * page);
  kvcached_region_t q = reserve(other, KVCACHED_KV, 100 * page);
  CHECK_OK(kvcached_ensure(q, 0, 95 * page));
  CHECK_IS(kvcached_enter(ctx), KVCACHED_E_LIMIT);
  CHECK_OK(kvcached_release(q, 0, 40 * page));
  CHECK_OK(kvcached_trim(other, 0, NULL));
  CHECK_OK(kvcached_enter(ctx));
  CHECK(holds(r, 0, 's', 30 * page));
  CHECK_OK(kvcached_leave(ctx));
  CHECK_EQ(slot_in(path, slot).charge, 35 * page);
  kvcached_shutdown(other);
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

TEST_HOST(ledger, lease_left) {
  const char *path = scratch("left");
  kvcached_ledger_t parent = open_ledger(path), child = open_ledger(path);
  int slot;
  char group[KVCACHED_GROUP_MAX + 1];
  kvc_account a;
  kvc_shortage s;
  uint64_t fixed;
  CHECK_OK(kvcached_ledger_lease(parent, "g", "m", 100, 30, 100, &slot));
  CHECK_OK(kvc_ledger_attach(child, slot, NULL, NULL, group, &fixed));
  CHECK_TEXT(group, "g");
  CHECK_EQ(fixed, 30);
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
  CHECK_OK(kvc_ledger_attach(child, slot, NULL, NULL, group, &fixed));
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
