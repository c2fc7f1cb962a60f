/* Waiting for the lessor to make room: two processes of one group, and the lessor. */
#include "park_kit.h"

#include <signal.h>

enum { LONG = 60000 }; /* longer than any test takes */

/* The first has 12 pages and is idle; the second wants 12, of 20. */
static void two(family *f, child *a, child *b, const char *name) {
  *f = family_start(name);
  *a = child_of(f, LONG);
  *b = child_of(f, LONG);
  peer_expect(a->p, "fill 12 97", "ok");
}

static void end_two(family *f, child *a, child *b) {
  child_end(f, a);
  child_end(f, b);
  family_end(f);
}

TEST(park, goes_on_once_another_sleeps) {
  family f;
  child a, b;
  two(&f, &a, &b, "sleeps");
  child_parks(&f, b, "fill 12 98", 12);
  tell(&f, a, KVCACHED_CMD_SLEEP);
  child_answers(b, "ok");
  peer_expect(b.p, "check 12 98", "ok");
  peer_expect(b.p, "parks", "parks 1");
  kvcached_slot_t s = slot_of(&f, b);
  CHECK_EQ(s.wants, 0);
  CHECK_EQ(s.parked, 0);
  CHECK_EQ(s.wants_since_ns, 0);
  CHECK_EQ(s.charge, 12 * f.page);
  CHECK_EQ(slot_of(&f, a).kind_asleep[KVCACHED_KV], 12 * f.page);
  /* The one that slept waits to wake, in the same way. */
  child_parks(&f, a, "check 12 97", 12);
  tell(&f, b, KVCACHED_CMD_SLEEP);
  child_answers(a, "ok");
  peer_expect(a.p, "parks", "parks 1");
  end_two(&f, &a, &b);
}

TEST(park, goes_on_once_another_trims) {
  family f;
  child a, b;
  two(&f, &a, &b, "trims");
  peer_expect(b.p, "fill 8 98", "ok");
  child_parks(&f, b, "ensure 12", 4);
  peer_expect(a.p, "release 12", "ok"); /* idle is not free; and the bell is rung for it */
  uint32_t seen = f.seen;
  CHECK_OK(kvcached_ledger_wait(f.l, &f.seen, 5000));
  CHECK(seen != f.seen);
  CHECK_EQ(slot_of(&f, b).parked, 1);
  tell(&f, a, KVCACHED_CMD_TRIM);
  child_answers(b, "ok");
  peer_expect(b.p, "check 8 98", "ok");
  end_two(&f, &a, &b);
}

/* Inside the gate twice, it is put to sleep while it waits, and woken before it goes on. */
TEST(park, may_be_put_to_sleep_meanwhile) {
  family f;
  child a, b;
  two(&f, &a, &b, "asleep");
  peer_expect(b.p, "fill 6 98", "ok");
  peer_expect(b.p, "enter", "ok");
  peer_expect(b.p, "enter", "ok");
  CHECK_IS(kvcached_ledger_command(f.l, b.slot, KVCACHED_CMD_SLEEP, 10000, NULL), KVCACHED_E_BUSY);
  child_parks(&f, b, "ensure 12", 6);
  tell(&f, b, KVCACHED_CMD_SLEEP);
  kvcached_slot_t s = slot_of(&f, b);
  CHECK_EQ(s.charge, 0);
  CHECK_EQ(s.asleep, 6 * f.page);
  CHECK_EQ(s.wants, 12 * f.page); /* what it has to have to go on */
  peer_expect(a.p, "fill 20 97", "ok");
  CHECK_IS(kvcached_ledger_command(f.l, b.slot, KVCACHED_CMD_WAKE, 10000, NULL), KVCACHED_E_LIMIT);
  CHECK_EQ(slot_of(&f, b).parked, 1);
  tell(&f, a, KVCACHED_CMD_SLEEP);
  /* There is room now; but it was its lessor that had it sleep, and may want the room for somebody else. */
  sleep_ms(250);
  s = slot_of(&f, b);
  CHECK_EQ(s.parked, 1);
  CHECK_EQ(s.asleep, 6 * f.page);
  CHECK_EQ(s.wants, 12 * f.page);
  tell(&f, b, KVCACHED_CMD_WAKE);
  child_answers(b, "ok");
  s = slot_of(&f, b);
  CHECK_EQ(s.inside, 1);
  CHECK_EQ(s.asleep, 0);
  CHECK_EQ(s.charge, 12 * f.page);
  CHECK_IS(kvcached_ledger_command(f.l, b.slot, KVCACHED_CMD_SLEEP, 10000, NULL), KVCACHED_E_BUSY);
  peer_expect(b.p, "check 6 98", "ok");
  peer_expect(b.p, "leave", "ok");
  peer_expect(b.p, "leave", "ok");
  peer_expect(b.p, "leave", "KVCACHED_E_INVAL");
  peer_expect(b.p, "put 12", "ok");
  peer_expect(a.p, "check 20 97", "ok");
  end_two(&f, &a, &b);
}

TEST(park, fails_when_refused) {
  family f;
  child a, b;
  two(&f, &a, &b, "refused");
  peer_expect(b.p, "fill 6 98", "ok");
  peer_expect(b.p, "enter", "ok");
  child_parks(&f, b, "ensure 12", 6);
  tell(&f, b, KVCACHED_CMD_REFUSE);
  child_answers(b, "KVCACHED_E_LIMIT");
  kvcached_slot_t s = slot_of(&f, b);
  CHECK_EQ(s.wants, 0);
  CHECK_EQ(s.inside, 1);
  CHECK_EQ(s.charge, 6 * f.page);
  peer_expect(b.p, "check 6 98", "ok");
  tell(&f, b, KVCACHED_CMD_REFUSE); /* nobody waits: nothing */
  child_parks(&f, b, "ensure 12", 6);
  tell(&f, a, KVCACHED_CMD_SLEEP);
  child_answers(b, "ok");
  peer_expect(b.p, "leave", "ok");
  end_two(&f, &a, &b);
}

/* Refused while it sleeps inside the gate: it waits to be awake again before it says so. */
TEST(park, is_awake_when_it_fails) {
  family f;
  child a, b;
  two(&f, &a, &b, "refused-asleep");
  peer_expect(b.p, "fill 6 98", "ok");
  peer_expect(b.p, "enter", "ok");
  child_parks(&f, b, "ensure 12", 6);
  tell(&f, b, KVCACHED_CMD_SLEEP);
  peer_expect(a.p, "fill 20 97", "ok");
  tell(&f, b, KVCACHED_CMD_REFUSE);
  WAIT_FOR(slot_of(&f, b).wants == 6 * f.page); /* its own only */
  CHECK_EQ(slot_of(&f, b).asleep, 6 * f.page);
  peer_expect(a.p, "put 20", "ok");
  child_answers(b, "KVCACHED_E_LIMIT");
  CHECK_EQ(slot_of(&f, b).asleep, 0);
  CHECK_EQ(slot_of(&f, b).inside, 1);
  peer_expect(b.p, "check 6 98", "ok");
  /* Refused that too, it sleeps inside the gate; entering again wakes it. */
  peer_expect(a.p, "fill 12 97", "ok");
  child_parks(&f, b, "ensure 12", 6);
  tell(&f, b, KVCACHED_CMD_SLEEP);
  peer_expect(a.p, "fill 20 97", "ok");
  tell(&f, b, KVCACHED_CMD_REFUSE);
  WAIT_FOR(slot_of(&f, b).wants == 6 * f.page);
  tell(&f, b, KVCACHED_CMD_REFUSE);
  child_answers(b, "KVCACHED_E_LIMIT");
  CHECK_EQ(slot_of(&f, b).asleep, 6 * f.page);
  CHECK_EQ(slot_of(&f, b).inside, 1);
  peer_expect(a.p, "put 20", "ok");
  peer_expect(b.p, "check 6 98", "ok");
  peer_expect(b.p, "leave", "ok");
  end_two(&f, &a, &b);
}

TEST(park, fails_after_its_time) {
  family f = family_start("late");
  child a = child_of(&f, 0), b = child_of(&f, 300);
  peer_expect(a.p, "fill 12 97", "ok");
  int64_t start = now_ms();
  child_parks(&f, b, "ensure 12", 12);
  child_answers(b, "KVCACHED_E_LIMIT");
  CHECK_LE(300, now_ms() - start);
  CHECK_LE(now_ms() - start, 2000);
  CHECK_EQ(slot_of(&f, b).wants, 0);
  CHECK_EQ(slot_of(&f, b).charge, 0);
  peer_expect(b.p, "ensure 8", "ok");
  /* Without a time to wait it fails at once. */
  peer_expect(a.p, "ensure 20", "KVCACHED_E_LIMIT");
  peer_expect(a.p, "parks", "parks 0");
  end_two(&f, &a, &b);
}

TEST(park, fails_at_once_where_nobody_can_help) {
  family f;
  child a, b;
  two(&f, &a, &b, "hopeless");
  int64_t start = now_ms();
  peer_expect(b.p, "ensure 21", "KVCACHED_E_LIMIT");
  peer_expect(b.p, "parks", "parks 0");
  /* What it could give up itself is not counted against it. */
  peer_expect(b.p, "ensure 8", "ok");
  peer_expect(b.p, "release 8", "ok");
  CHECK_LE(now_ms() - start, 5000);
  child_parks(&f, b, "ensure 20", 12);
  /* A limit that is lowered meanwhile ends it as well. */
  kvcached_limit_t set = {.struct_size = sizeof(set)};
  CHECK_OK(kvcached_ledger_set_limit(f.l, "g", 19 * f.page, 0, &set));
  child_answers(b, "KVCACHED_E_LIMIT");
  end_two(&f, &a, &b);
}

TEST(park, goes_on_under_a_raised_limit) {
  family f;
  child a, b;
  two(&f, &a, &b, "raised");
  child_parks(&f, b, "ensure 12", 12);
  CHECK_OK(kvcached_ledger_set_limit(f.l, "g", 24 * f.page, 0, NULL));
  child_answers(b, "ok");
  end_two(&f, &a, &b);
}

/* Without a lease, however long it would wait. */
TEST(park, only_on_a_leased_slot) {
  const char *path = scratch("no-lease");
  const size_t page = test_page();
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = path;
  o.limit = 4 * page;
  o.group_wait_ms = LONG;
  kvcached_ctx_t ctx = open_with(&o);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 64 * page);
  CHECK_OK(kvcached_ensure(r, 0, 3 * page));
  peer p = peer_start(path, "pid", UINT64_MAX, -1);
  peer_expect_open(p);
  CHECK_IS(kvcached_ensure(r, 0, 5 * page), KVCACHED_E_LIMIT);
  CHECK_EQ(stats_of(ctx).parks, 0);
  peer_stop(&p);
  kvcached_shutdown(ctx);
}

/* ---- what is killed ---- */

TEST(park, goes_on_once_another_is_killed) {
  family f;
  child a, b;
  two(&f, &a, &b, "killed-holder");
  child_parks(&f, b, "fill 12 98", 12);
  peer_kill(&a.p);
  child_answers(b, "ok"); /* nobody rings for the dead */
  peer_expect(b.p, "check 12 98", "ok");
  CHECK_OK(kvcached_ledger_unlease(f.l, a.slot));
  child_end(&f, &b);
  family_end(&f);
}

TEST(park, leaves_nothing_when_killed) {
  family f;
  child a, b;
  two(&f, &a, &b, "killed-parked");
  peer_expect(b.p, "fill 6 98", "ok");
  child_parks(&f, b, "ensure 12", 6);
  peer_kill(&b.p);
  kvcached_slot_t s = slot_of(&f, b); /* it is leased still */
  CHECK_EQ(s.attached, 0);
  CHECK_EQ(s.wants, 0);
  CHECK_EQ(s.parked, 0);
  CHECK_EQ(s.charge, 0);
  /* The next user of the slot begins anew, and another that came later need not wait for the dead one. */
  child c = child_of(&f, LONG);
  peer_expect(c.p, "fill 6 99", "ok");
  child_parks(&f, c, "fill 12 99", 6);
  tell(&f, a, KVCACHED_CMD_SLEEP);
  child_answers(c, "ok");
  CHECK_OK(kvcached_ledger_unlease(f.l, b.slot));
  end_two(&f, &a, &c);
}

TEST(park, goes_on_once_a_sleeper_is_killed) {
  family f;
  child a, b;
  two(&f, &a, &b, "killed-sleeper");
  tell(&f, a, KVCACHED_CMD_SLEEP);
  peer_expect(b.p, "fill 12 98", "ok");
  child_parks(&f, a, "check 12 97", 12); /* to wake */
  child c = child_of(&f, LONG);
  child_parks(&f, c, "fill 20 99", 20);
  peer_kill(&a.p); /* the older one that waits */
  tell(&f, b, KVCACHED_CMD_SLEEP);
  child_answers(c, "ok");
  peer_expect(c.p, "check 20 99", "ok");
  CHECK_OK(kvcached_ledger_unlease(f.l, a.slot));
  end_two(&f, &b, &c);
}

typedef struct lessor {
  const char *path;
  uint64_t limit;
  _Atomic int slot; /* + 1 */
} lessor;

static void lease_and_wait(void *arg) {
  lessor *m = arg;
  int slot;
  CHECK_OK(kvcached_ledger_lease(open_ledger(m->path), "g", "m", 0, 0, m->limit, &slot));
  m->slot = slot + 1;
  for (;;) sleep_ms(1000);
}

static void lessor_killed(const char *name, int sleeps) {
  family f = family_start(name);
  child a = child_of(&f, LONG);
  peer_expect(a.p, "fill 12 97", "ok");
  lessor *m = shared_memory(sizeof(*m));
  *m = (lessor){.path = f.path, .limit = FULL * f.page};
  pid_t pid = child_start(lease_and_wait, m);
  WAIT_FOR(m->slot > 0);
  child b = {.slot = m->slot - 1};
  b.p = peer_start_with(f.path, "-", FULL * f.page, b.slot, "group_wait_ms=60000");
  peer_expect_open(b.p);
  peer_expect(b.p, "fill 6 98", "ok");
  peer_expect(b.p, "enter", "ok");
  child_parks(&f, b, "ensure 12", 6);
  if (sleeps) tell(&f, b, KVCACHED_CMD_SLEEP);
  child_kill(pid);
  child_answers(b, "KVCACHED_E_LIMIT");
  CHECK_EQ(slot_of(&f, b).asleep, 0); /* there is nobody else to wake it */
  CHECK_EQ(slot_of(&f, b).inside, 1);
  peer_expect(b.p, "check 6 98", "ok");
  peer_stop(&b.p);
  child_end(&f, &a);
  family_end(&f);
}

TEST(park, fails_once_its_lessor_is_killed) { lessor_killed("killed-lessor", 0); }
TEST(park, wakes_once_its_lessor_is_killed) { lessor_killed("killed-lessor-asleep", 1); }
