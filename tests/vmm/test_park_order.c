/* Waiting for room: who goes first, and a device that is short. */
#include "park_kit.h"
#include "sleep_kit.h"

static int ensure(house *h) { return kvcached_ensure(h->r, 0, 12 * h->page); }
static int more(house *h) { return kvcached_ensure(h->r, 0, 18 * h->page); }

/* What the older one lacks is left to it, though the younger one's would fit; for a moment. */
TEST(park_order, the_older_one_goes_first) {
  house h = house_build("order", 0);
  call old, young;
  CHECK_OK(kvcached_ensure(h.r, 0, 2 * h.page));
  kvcached_ctx_t third;
  int slot;
  CHECK_OK(kvcached_ledger_lease(h.l, "g", "m", 0, 0, FULL * h.page, &slot));
  third = house_open(&h, slot);
  kvcached_region_t full = reserve(third, KVCACHED_KV, 64 * h.page);
  CHECK_OK(kvcached_ensure(full, 0, 16 * h.page)); /* 2 left */
  call_start(&old, &h, more);                      /* 16 more */
  WAIT_FOR(shown(&h).parked == 1);
  house other = h;
  other.ctx = h.other;
  other.r = h.theirs;
  call_start(&young, &other, ensure); /* 12 */
  WAIT_FOR(slot_in(h.path, h.other_slot).parked == 1);
  CHECK_EQ(go_to_sleep(third, KVCACHED_ALL_KINDS), 16 * h.page);
  CHECK_OK(call_result(&old)); /* 18 of 20, before the younger one's 12 */
  CHECK_EQ(slot_in(h.path, h.other_slot).parked, 1);
  CHECK_OK(kvcached_release(h.r, 0, 18 * h.page));
  CHECK_OK(kvcached_trim(h.ctx, 0, NULL));
  CHECK_OK(call_result(&young));
  kvcached_shutdown(third);
  CHECK_OK(kvcached_ledger_unlease(h.l, slot));
  house_end(&h);
}

/* An older one that lacks more than there is for now does not hold up the younger one for long. */
TEST(park_order, the_younger_one_does_not_wait_for_ever) {
  house h = house_build("younger", 16);
  call old, young;
  CHECK_OK(kvcached_ensure(h.r, 0, 2 * h.page));
  call_start(&old, &h, more); /* 16 */
  WAIT_FOR(shown(&h).parked == 1);
  kvcached_ctx_t third;
  int slot;
  CHECK_OK(kvcached_ledger_lease(h.l, "g", "m", 0, 0, FULL * h.page, &slot));
  third = house_open(&h, slot);
  house other = h;
  other.ctx = third;
  other.r = reserve(third, KVCACHED_KV, 64 * h.page);
  call_start(&young, &other, ensure); /* 12 */
  WAIT_FOR(slot_in(h.path, slot).parked == 1);
  /* Room for the younger one only: the older one has 2 itself, and 6 are with the other. */
  CHECK_OK(kvcached_release(h.theirs, 0, 10 * h.page));
  CHECK_OK(kvcached_trim(h.other, 0, NULL));
  CHECK_OK(call_result(&young));
  CHECK_EQ(shown(&h).parked, 1);
  kvcached_shutdown(third);
  CHECK_OK(kvcached_release(h.theirs, 0, 16 * h.page));
  CHECK_OK(kvcached_trim(h.other, 0, NULL));
  CHECK_OK(call_result(&old));
  CHECK_OK(kvcached_ledger_unlease(h.l, slot));
  house_end(&h);
}

/* ---- several devices ---- */

typedef struct two_houses {
  house a, b;
} two_houses;
static two_houses pair;

/* Inside both, it waits in the first. */
static int in_both(house *unused) {
  (void)unused;
  CHECK_OK(kvcached_enter(pair.b.ctx));
  CHECK_OK(kvcached_enter(pair.a.ctx));
  CHECK_OK(kvcached_enter(pair.b.ctx));
  int err = more(&pair.a);
  CHECK_EQ(asleep(pair.b.ctx), 0);
  CHECK(filled(pair.b.r, 6, 70));
  CHECK_OK(kvcached_leave(pair.b.ctx));
  CHECK_OK(kvcached_leave(pair.a.ctx));
  CHECK_EQ(slot_in(pair.b.path, pair.b.slot).inside, 1);
  CHECK_OK(kvcached_leave(pair.b.ctx));
  return err;
}

/* With two ledgers, as of two GPUs: what it has on the other one may be had meanwhile. */
TEST(park_order, gates_of_other_devices_are_left_too) {
  call c;
  pair = (two_houses){.a = house_build("gpu-a", 4), .b = house_build("gpu-b", 14)};
  fill(pair.b.r, 6, 70);
  call_start(&c, &pair.a, in_both);
  WAIT_FOR(shown(&pair.a).parked == 1);
  WAIT_FOR(shown(&pair.b).parked == 1);
  WAIT_FOR(shown(&pair.b).inside == 0);
  CHECK_EQ(shown(&pair.b).wants, 0);
  uint64_t freed;
  CHECK_OK(kvcached_ledger_command(pair.b.l, pair.b.slot, KVCACHED_CMD_SLEEP, 5000, &freed));
  CHECK_EQ(freed, 6 * pair.b.page);
  CHECK_OK(kvcached_ensure(pair.b.theirs, 0, 20 * pair.b.page)); /* and is */
  (void)go_to_sleep(pair.a.other, KVCACHED_ALL_KINDS);
  /* It waits to wake there now, out of both. */
  WAIT_FOR(shown(&pair.b).wants == 6 * pair.b.page);
  WAIT_FOR(shown(&pair.a).inside == 0);
  CHECK_OK(kvcached_ledger_command(pair.a.l, pair.a.slot, KVCACHED_CMD_TRIM, 5000, NULL));
  (void)go_to_sleep(pair.b.other, KVCACHED_ALL_KINDS);
  CHECK_OK(kvcached_ledger_command(pair.b.l, pair.b.slot, KVCACHED_CMD_WAKE, 5000, NULL));
  CHECK_OK(call_result(&c));
  CHECK_EQ(shown(&pair.a).parked, 0);
  CHECK_EQ(shown(&pair.b).parked, 0);
  CHECK_EQ(shown(&pair.a).charge, 18 * pair.a.page);
  house_end(&pair.a);
  house_end(&pair.b);
}

/* ---- a device that is short ---- */

/* Not a limit, the driver has no more: with a card of its own, which only the fake driver has. */
TEST_CUDA(park_order, a_short_device) {
  if (!getenv("FAKE_CUDA_MEMORY")) return;
  const char *path = scratch("device");
  const size_t page = test_page(), n = (64 * MIB) / page / 2 + 64; /* two do not fit */
  char *state = getenv("FAKE_CUDA_STATE"), before[600], line[64];
  (void)snprintf(before, sizeof(before), "%s", state ? state : "");
  CHECK(setenv("FAKE_CUDA_STATE", scratch("small-card"), 1) == 0);
  CHECK(setenv("FAKE_CUDA_MEMORY", "67108864", 1) == 0);
  family f = {.path = path, .page = page, .l = open_ledger(path)};
  child c[2];
  for (int i = 0; i < 2; i++) {
    CHECK_OK(kvcached_ledger_lease(f.l, "g", "m", 0, 0, UINT64_MAX, &c[i].slot));
    c[i].p = peer_start_with(path, "-", UINT64_MAX, c[i].slot, "group_wait_ms=60000 room_wait_ms=100");
    peer_expect_open(c[i].p);
  }
  CHECK(setenv("FAKE_CUDA_MEMORY", "8589934592", 1) == 0);
  if (before[0])
    CHECK(setenv("FAKE_CUDA_STATE", before, 1) == 0);
  else
    unsetenv("FAKE_CUDA_STATE");
  (void)snprintf(line, sizeof(line), "fill %zu 65", n);
  peer_expect(c[0].p, line, "ok");
  (void)snprintf(line, sizeof(line), "ensure %zu", n);
  child_parks(&f, c[1], line, n);
  tell(&f, c[0], KVCACHED_CMD_SLEEP);
  child_answers(c[1], "ok");
  (void)snprintf(line, sizeof(line), "check %zu 65", n);
  child_parks(&f, c[0], line, n);
  tell(&f, c[0], KVCACHED_CMD_REFUSE);
  child_answers(c[0], "KVCACHED_E_NOMEM");
  peer_expect(c[1].p, "put 4000", "ok");
  peer_expect(c[0].p, line, "ok");
  for (int i = 0; i < 2; i++) child_end(&f, &c[i]);
  family_end(&f);
}
