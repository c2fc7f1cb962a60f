/* What a slot shows to others, and whom of them the ledger names when room is wanted. */
#include "ledger_kit.h"

#include <stdatomic.h>

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

/* A process that fills its memory for the first time, outside the gate, is at work all the same. */
TEST_HOST(ledger, taking_memory_is_use) {
  const char *path = scratch("taking");
  user u = user_take(path, "g");
  kvc_ledger_map *m = map_ledger(path);
  kvc_shortage shortage;
  CHECK_EQ(atomic_load(&m->slot[u.slot].last_use_ns), 0);
  CHECK_OK(kvc_ledger_claim(u.ledger, u.slot, KVC_CLAIM_HOST, 4096, UINT64_MAX, 0, &shortage));
  CHECK_EQ(atomic_load(&m->slot[u.slot].last_use_ns), 0);
  uint64_t before = (uint64_t)kvc_now_ns();
  CHECK_OK(kvc_ledger_claim(u.ledger, u.slot, KVC_CLAIM_PAGES, 4096, UINT64_MAX, 0, &shortage));
  CHECK_LE(before - 20000000, atomic_load(&m->slot[u.slot].last_use_ns)); /* of a coarse clock */
  unmap_ledger(m);
  user_end(&u);
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
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 0, 0, asked), b.slot); /* unused the longest */
  asked[b.slot / 64] |= UINT64_C(1) << (b.slot % 64);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 0, 0, asked), a.slot); /* c has nothing idle */
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, 0, asked), c.slot);
  asked[a.slot / 64] |= UINT64_C(1) << (a.slot % 64);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 0, 0, asked), -1); /* its own group is not asked */
  asked[0] = asked[1] = 0;
  kvc_ledger_mark_queued(b.ledger, b.slot, 1);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, 0, asked), c.slot);
  kvc_ledger_mark_queued(b.ledger, b.slot, 0);
  atomic_store(&m->slot[b.slot].inside, 1);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, 0, asked), c.slot);
  atomic_store(&m->slot[b.slot].inside, 0);
  kvc_ledger_mark_woke(b.ledger, b.slot);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, 0, asked), c.slot);
  atomic_store(&m->slot[b.slot].woke_ns, (uint64_t)kvc_now_ns() - 2 * second);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, 0, asked), b.slot);
  kvc_ledger_control(b.ledger, b.slot, 0);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, 0, asked), c.slot);
  user_end(&c);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, 0, asked), a.slot);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, 1, asked), a.slot);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 0, 1, asked), a.slot);
  atomic_store(&m->slot[a.slot].lease, atomic_load(&m->slot[a.slot].claim)); /* its charge would stay */
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 0, 0, asked), a.slot);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 0, 1, asked), -1);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, 1, asked), a.slot); /* but for a sleep */
  atomic_store(&m->slot[a.slot].claim, 0);
  CHECK_EQ(kvc_ledger_pick_victim(me.ledger, me.slot, 1, 0, asked), -1);
  unmap_ledger(m);
  user_end(&me);
  user_end(&mate);
  user_end(&a);
  user_end(&b);
}
