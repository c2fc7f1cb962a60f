/* Limits of a group and of the card: revisions, who hears of them, how long they live. */
#include "ledger_kit.h"

#include <stdatomic.h>

TEST_HOST(limits, revisions_of_a_group) {
  const char *path = scratch("revisions");
  user u = user_take(path, "g"), other = user_take(path, "h");
  kvcached_ledger_t l = open_ledger(path);
  check_limit(limit_get(l, "g"), KVCACHED_LIMIT_APPLIED, 0, UINT64_MAX);
  check_limit(limit_set(l, "g", 100 * UNIT, 0), KVCACHED_LIMIT_APPLIED, 1, 100 * UNIT);
  check_limit(limit_set(l, "g", 90 * UNIT, 0), KVCACHED_LIMIT_APPLIED, 2, 90 * UNIT);
  check_limit(limit_set(l, "g", 80 * UNIT, 7), KVCACHED_LIMIT_APPLIED, 7, 80 * UNIT);
  check_limit(limit_set(l, "g", 80 * UNIT, 7), KVCACHED_LIMIT_APPLIED, 7, 80 * UNIT); /* again: no conflict */
  check_limit(limit_set(l, "g", 79 * UNIT, 7), KVCACHED_LIMIT_CONFLICT, 7, 80 * UNIT);
  check_limit(limit_set(l, "g", 70 * UNIT, 6), KVCACHED_LIMIT_STALE, 7, 80 * UNIT);
  check_limit(limit_get(l, "g"), KVCACHED_LIMIT_APPLIED, 7, 80 * UNIT);
  check_limit(limit_get(l, "h"), KVCACHED_LIMIT_APPLIED, 0, UINT64_MAX); /* groups do not meet */
  CHECK_EQ(slot_in(path, u.slot).limit, 80 * UNIT);
  CHECK_EQ(slot_in(path, other.slot).limit, UINT64_MAX);
  check_limit(limit_get(l, NULL), KVCACHED_LIMIT_APPLIED, 0, UINT64_MAX);
  user_end(&u);
  user_end(&other);
  kvcached_ledger_close(l);
}

TEST_HOST(limits, bytes_of_a_limit) {
  const char *path = scratch("bytes");
  user u = user_take(path, "g");
  kvcached_ledger_t l = u.ledger;
  const uint64_t top = UINT64_C(1) << 44;
  CHECK_EQ(limit_set(l, "g", 3 * UNIT + 4095, 0).limit, 3 * UNIT);
  CHECK_EQ(limit_set(l, "g", 0, 0).limit, 0);
  CHECK_IS(user_claim(u, 1, UINT64_MAX, 10), KVCACHED_E_LIMIT);
  CHECK_EQ(limit_set(l, "g", top, 0).limit, UINT64_MAX);
  CHECK_EQ(limit_set(l, "g", UINT64_MAX, 0).limit, UINT64_MAX);
  CHECK_EQ(limit_set(l, "g", top - 2 * UNIT, 0).limit, top - 2 * UNIT);
  CHECK(limit_set(l, "g", top - 1, 0).limit < top); /* a limit stays one */
  CHECK_EQ(limit_get(l, "g").revision, 6);
  user_end(&u);
}

/* What was set holds instead of what contexts bring along, be it more or less. */
TEST_HOST(limits, ledger_goes_before_own_limit) {
  const char *path = scratch("before");
  user u = user_take(path, "g");
  CHECK_IS(user_claim(u, 11 * UNIT, 10 * UNIT, 10), KVCACHED_E_LIMIT);
  CHECK_OK(user_claim(u, 10 * UNIT, 10 * UNIT, 10));
  CHECK_EQ(limit_set(u.ledger, "g", 20 * UNIT, 0).charge, 10 * UNIT);
  CHECK_OK(user_claim(u, 10 * UNIT, 10 * UNIT, 10));
  CHECK_IS(user_claim(u, 1, UINT64_MAX, 10), KVCACHED_E_LIMIT);
  CHECK_DETAIL("the limit is 81920, passed by 1 ");
  kvc_account a;
  CHECK_OK(kvc_ledger_account(u.ledger, u.slot, 5, &a));
  CHECK_EQ(a.group_limit, 20 * UNIT);
  CHECK_EQ(a.group_charge, 20 * UNIT);
  CHECK_EQ(limit_set(u.ledger, "g", UINT64_MAX, 0).result, KVCACHED_LIMIT_APPLIED);
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
  check_limit(limit_set(l, "g", 5 * UNIT, 9), KVCACHED_LIMIT_APPLIED, 9, 5 * UNIT);
  user b = user_take(path, "g"); /* inherits it */
  CHECK_EQ(slot_in(path, b.slot).limit, 5 * UNIT);
  int leased;
  CHECK_OK(kvcached_ledger_lease(l, "g", "m", UNIT, 0, UINT64_MAX, &leased));
  user_end(&a);
  CHECK_IS(user_claim(b, 5 * UNIT, UINT64_MAX, 10), KVCACHED_E_LIMIT);
  CHECK_OK(user_claim(b, 4 * UNIT, UINT64_MAX, 10));
  user_end(&b);
  check_limit(limit_get(l, "g"), KVCACHED_LIMIT_APPLIED, 9, 5 * UNIT); /* in the leased slot */
  CHECK_OK(kvcached_ledger_unlease(l, leased));
  check_limit(limit_get(l, "g"), KVCACHED_LIMIT_APPLIED, 0, UINT64_MAX);
  a = user_take(path, "g"); /* the slot's old word is gone with its group */
  CHECK_OK(user_claim(a, 100 * UNIT, UINT64_MAX, 10));
  user_end(&a);

  check_limit(limit_set(l, NULL, 7 * UNIT, 0), KVCACHED_LIMIT_APPLIED, 1, 7 * UNIT);
  kvcached_ledger_close(l);
  l = open_ledger(path);
  check_limit(limit_get(l, NULL), KVCACHED_LIMIT_APPLIED, 1, 7 * UNIT);
  kvcached_ledger_close(l);
}

TEST_HOST(limits, card_holds_for_all_groups) {
  const char *path = scratch("card");
  user a = user_take(path, "a"), b = user_take(path, "b");
  kvc_shortage s;
  CHECK_EQ(limit_set(a.ledger, NULL, 100 * UNIT, 0).result, KVCACHED_LIMIT_APPLIED);
  CHECK_EQ(limit_set(a.ledger, "b", 50 * UNIT, 0).result, KVCACHED_LIMIT_APPLIED);
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
  kvcached_limit_t card = limit_get(a.ledger, NULL);
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
  kvcached_limit_t done = limit_set(u[0].ledger, "g", 12 * UNIT, 0);
  CHECK_LE(now_ms() - start, 300); /* nobody answers in this test */
  check_limit(done, KVCACHED_LIMIT_DEFERRED, 1, 12 * UNIT);
  CHECK_EQ(done.charge, 30 * UNIT);
  CHECK_EQ(done.overage, 18 * UNIT);
  CHECK_EQ(command_in(u[1]), KVCACHED_CMD_TRIM);
  kvc_ledger_answer(u[1].ledger, u[1].slot, KVCACHED_OK, 0);
  CHECK_EQ(command_in(u[2]), 0); /* it has no control */
  CHECK_EQ(command_in(u[3]), 0); /* another group */
  CHECK_EQ(limit_set(u[0].ledger, "g", 12 * UNIT, 1).result, KVCACHED_LIMIT_DEFERRED);
  CHECK_EQ(command_in(u[0]), KVCACHED_CMD_TRIM);
  kvc_ledger_answer(u[0].ledger, u[0].slot, KVCACHED_OK, 0);
  CHECK_EQ(limit_get(u[0].ledger, "g").result, KVCACHED_LIMIT_DEFERRED);

  CHECK_IS(user_claim(u[0], 1, UINT64_MAX, 10), KVCACHED_E_LIMIT);
  user_unclaim(u[1], 10 * UNIT);
  CHECK_IS(user_claim(u[0], 1, UINT64_MAX, 10), KVCACHED_E_LIMIT); /* still 20 */
  user_unclaim(u[2], 10 * UNIT);
  check_limit(limit_get(u[0].ledger, "g"), KVCACHED_LIMIT_APPLIED, 1, 12 * UNIT);
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
  CHECK_EQ(limit_set(u[0].ledger, NULL, UNIT, 0).result, KVCACHED_LIMIT_DEFERRED);
  CHECK_EQ(command_in(u[0]), KVCACHED_CMD_TRIM);
  CHECK_EQ(command_in(u[3]), KVCACHED_CMD_TRIM);
  for (int i = 0; i < 4; i++) user_end(&u[i]);
}

/* A setter stopped after its first write: whoever claims sees that word, and takes it over. */
TEST_HOST(limits, half_spread) {
  const char *path = scratch("half-spread");
  user a = user_take(path, "g"), b = user_take(path, "g"), c = user_take(path, "g");
  kvc_ledger_map *m = map_ledger(path);
  CHECK_EQ(limit_set(a.ledger, "g", 50 * UNIT, 3).result, KVCACHED_LIMIT_APPLIED);
  atomic_store(&m->slot[a.slot].limit, UINT64_C(4) << 32 | 10);
  check_limit(limit_get(c.ledger, "g"), KVCACHED_LIMIT_APPLIED, 4, 10 * UNIT);
  CHECK_IS(user_claim(b, 11 * UNIT, UINT64_MAX, 10), KVCACHED_E_LIMIT);
  CHECK_EQ(atomic_load(&m->slot[b.slot].limit), UINT64_C(4) << 32 | 10);
  CHECK_EQ(atomic_load(&m->slot[c.slot].limit), UINT64_C(3) << 32 | 50);
  user_end(&a); /* it lives on in b */
  check_limit(limit_get(c.ledger, "g"), KVCACHED_LIMIT_APPLIED, 4, 10 * UNIT);
  /* Two words of one revision (two setters met two first slots): the smaller limit holds. */
  atomic_store(&m->slot[c.slot].limit, UINT64_C(4) << 32 | 9);
  check_limit(limit_get(c.ledger, "g"), KVCACHED_LIMIT_APPLIED, 4, 9 * UNIT);
  check_limit(limit_set(c.ledger, "g", 10 * UNIT, 4), KVCACHED_LIMIT_CONFLICT, 4, 9 * UNIT);
  check_limit(limit_set(c.ledger, "g", 10 * UNIT, 0), KVCACHED_LIMIT_APPLIED, 5, 10 * UNIT);
  CHECK_EQ(atomic_load(&m->slot[b.slot].limit), UINT64_C(5) << 32 | 10);
  /* The last revision there is: nothing can follow. */
  check_limit(limit_set(c.ledger, "g", 10 * UNIT, UINT32_MAX), KVCACHED_LIMIT_APPLIED, UINT32_MAX, 10 * UNIT);
  check_limit(limit_set(c.ledger, "g", 11 * UNIT, 0), KVCACHED_LIMIT_CONFLICT, UINT32_MAX, 10 * UNIT);
  check_limit(limit_set(c.ledger, "g", 10 * UNIT, 0), KVCACHED_LIMIT_APPLIED, UINT32_MAX, 10 * UNIT);
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
  check_limit(limit_set(b.ledger, "g", 10 * UNIT, 0), KVCACHED_LIMIT_APPLIED, 1, 10 * UNIT);
  CHECK_EQ(atomic_load(&m->slot[a.slot].ask[KVC_DEVICE].word), 5 << 2);
  CHECK_EQ(atomic_load(&m->slot[b.slot].ask[KVC_DEVICE].word), 6 << 2 | KVC_ASK_ANNOUNCED);
  /* Past that step it counts as a charge. */
  announce(m, a.slot, KVC_DEVICE, 7, KVC_ASK_COMMITTING, 20 * UNIT);
  check_limit(limit_set(b.ledger, "g", 10 * UNIT, 0), KVCACHED_LIMIT_DEFERRED, 2, 10 * UNIT);
  CHECK_EQ(limit_get(b.ledger, NULL).charge, 40 * UNIT - 20 * UNIT);
  user_end(&a);
  user_end(&b);
  unmap_ledger(m);
}

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
  CHECK_EQ(limit_get(l, NULL).revision, 0); /* none of them set anything */
  CHECK_OK(kvcached_ledger_set_limit(l, NULL, 5 * UNIT, 0, NULL));
  CHECK_EQ(limit_get(l, NULL).limit, 5 * UNIT);
  child_join(child_start(use_parents_handle, l));
  kvcached_ledger_close(l);
}
