/*
 * Limits: of a group, kept in each of its live slots, and of the card, in the file's header.
 *
 * A limit is one word, revision << 32 | units of 4096 bytes, changed by compare-and-swap alone; revision 0
 * says that none was set. What holds for a group is the best word among its live slots: the highest
 * revision, of two equal ones the smaller limit. A setting is made in the group's first live slot, where two
 * setters meet, and then spread to the others, so that it lives as long as any of them. A setter stopped in
 * between changes nothing for others: whoever sums the group sees the best word, and takes it over.
 *
 * A slot that becomes live looks for its group's word after it shows itself, and a setter looks for new slots
 * after it wrote: one of the two finds the other.
 */
#include "ledger_impl.h"

#include <inttypes.h>
#include <sched.h>
#include <string.h>

#define UNIT 4096u
#define NO_LIMIT UINT32_MAX /* units */
/* How long a setting without a revision of its own keeps trying while others set theirs. */
#define SET_WAIT_NS INT64_C(1000000000)

static uint32_t revision_of(uint64_t word) { return (uint32_t)(word >> 32); }
static uint32_t units_of(uint64_t word) { return (uint32_t)word; }

uint64_t kvc_limit_bytes(uint64_t word, uint64_t own) {
  if (revision_of(word) == 0) return own;
  return units_of(word) == NO_LIMIT ? UINT64_MAX : (uint64_t)units_of(word) * UNIT;
}

int kvc_limit_beats(uint64_t a, uint64_t b) {
  if (revision_of(a) != revision_of(b)) return revision_of(a) > revision_of(b);
  return revision_of(a) != 0 && units_of(a) < units_of(b);
}

void kvc_limit_raise(kvc_ledger_slot *s, uint64_t word) {
  uint64_t have = atomic_load(&s->limit);
  while (kvc_limit_beats(word, have) && !atomic_compare_exchange_weak(&s->limit, &have, word)) {
  }
}

/* The group's first live slot (-1: none) and its best word. Slots with a lesser word than `spread` get it. */
static int look_at_group(struct kvcached_ledger *l, const char *group, uint64_t spread, int *first,
                         uint64_t *best) {
  *first = -1;
  *best = 0;
  for (int i = 0; i < KVC_LEDGER_SLOTS; i++) {
    kvc_slot_view v;
    if (!kvc_slot_peek(l, i, &v) || strcmp(v.group, group) != 0) continue;
    int err = kvc_slot_confirm(l, i, &v);
    if (err) return err;
    if (!v.holders) continue;
    kvc_ledger_slot *s = &l->map->slot[i];
    kvc_limit_raise(s, spread);
    uint64_t word = atomic_load(&s->limit);
    if (kvc_limit_beats(word, *best)) *best = word;
    if (*first < 0) *first = i;
  }
  return KVCACHED_OK;
}

int kvc_limit_join(struct kvcached_ledger *l, int slot, const char *group) {
  int first;
  uint64_t best;
  int err = look_at_group(l, group, 0, &first, &best);
  if (!err) kvc_limit_raise(&l->map->slot[slot], best);
  return err;
}

/* What becomes of a setting where `have` is in force. WRITE: *want is the word to write. */
enum { WRITE = -1 };
static int decide(uint64_t have, uint32_t units, uint32_t revision, uint64_t *want) {
  uint32_t old = revision_of(have);
  if (revision == 0) revision = old < UINT32_MAX ? old + 1 : old;
  *want = (uint64_t)revision << 32 | units;
  if (revision > old) return WRITE;
  if (revision < old) return KVCACHED_LIMIT_STALE;
  return have == *want ? KVCACHED_LIMIT_APPLIED : KVCACHED_LIMIT_CONFLICT;
}

/* One attempt. *again: another setter came between. */
static int set_card(struct kvcached_ledger *l, uint32_t units, uint32_t revision, int *result, int *again) {
  uint64_t have = atomic_load(&l->map->card_limit), want;
  *result = decide(have, units, revision, &want);
  if (*result != WRITE) return KVCACHED_OK;
  *again = !atomic_compare_exchange_strong(&l->map->card_limit, &have, want);
  *result = *again ? KVCACHED_LIMIT_CONFLICT : KVCACHED_LIMIT_APPLIED;
  return KVCACHED_OK;
}

static int set_group(struct kvcached_ledger *l, const char *group, uint32_t units, uint32_t revision,
                     int *result, int *again) {
  int first;
  uint64_t best, want;
  int err = look_at_group(l, group, 0, &first, &best);
  if (err) return err;
  if (first < 0)
    return kvc_fail(KVCACHED_E_SLOT, "group \"%s\" has no live slot in %s: its limit lives with one", group,
                    l->path);
  *result = decide(best, units, revision, &want);
  if (*result == KVCACHED_LIMIT_STALE || *result == KVCACHED_LIMIT_CONFLICT) return KVCACHED_OK;
  _Atomic uint64_t *word = &l->map->slot[first].limit;
  uint64_t have = atomic_load(word);
  /* One that has the same revision by now is met below: it is not overwritten. */
  if (*result == WRITE && kvc_limit_beats(want, have) && revision_of(want) > revision_of(have))
    *again = !atomic_compare_exchange_strong(word, &have, want);
  else
    *again = *result == WRITE;
  if (*again) {
    *result = KVCACHED_LIMIT_CONFLICT;
    return KVCACHED_OK;
  }
  err = look_at_group(l, group, want, &first, &best);
  if (err) return err;
  /* Somebody may have set the next revision since; or this one, where another slot was the first. */
  if (best == want || first < 0) {
    *result = KVCACHED_LIMIT_APPLIED;
  } else if (revision_of(best) > revision_of(want)) {
    *result = KVCACHED_LIMIT_STALE;
  } else {
    *again = 1;
    *result = KVCACHED_LIMIT_CONFLICT;
  }
  return KVCACHED_OK;
}

/* What is in force, and what it covers. */
static int report(struct kvcached_ledger *l, const char *group, int result, kvcached_limit_t *out) {
  kvc_sums sums;
  int err = kvc_sum_slots(l, KVC_DEVICE, group, -1, 0, group == NULL, &sums);
  if (err) return err;
  uint64_t word = group ? sums.word : atomic_load(&l->map->card_limit);
  *out = (kvcached_limit_t){.struct_size = sizeof(*out),
                            .result = result,
                            .revision = revision_of(word),
                            .limit = kvc_limit_bytes(word, UINT64_MAX),
                            .charge = group ? sums.group.charged : sums.card.charged};
  if (out->charge > out->limit) {
    out->overage = out->charge - out->limit;
    if (result == KVCACHED_LIMIT_APPLIED) out->result = KVCACHED_LIMIT_DEFERRED;
  }
  return KVCACHED_OK;
}

/* Has the slots that a limit covers, but `except`, give back what they do not use. Nobody is waited for; a
   slot without a control thread, or busy with another command, is left alone. */
static void tell_to_trim(struct kvcached_ledger *l, const char *group, int except) {
  for (int i = 0; i < KVC_LEDGER_SLOTS; i++) {
    kvc_slot_view v;
    if (i == except || !kvc_slot_peek(l, i, &v)) continue;
    if (group && strcmp(v.group, group) != 0) continue;
    (void)kvc_command_leave(l, i, KVCACHED_CMD_TRIM);
  }
}

static int set_limit(struct kvcached_ledger *l, const char *group, int except, uint64_t bytes,
                     uint32_t revision, kvcached_limit_t *out) {
  uint64_t all = bytes / UNIT;
  uint32_t units = all < NO_LIMIT ? (uint32_t)all : bytes < (UINT64_C(1) << 44) ? NO_LIMIT - 1 : NO_LIMIT;
  const int64_t deadline = kvc_now_ns() + SET_WAIT_NS;
  int result = KVCACHED_LIMIT_CONFLICT, again, err;
  do {
    again = 0;
    err = group ? set_group(l, group, units, revision, &result, &again)
                : set_card(l, units, revision, &result, &again);
    if (err) return err;
    if (again) (void)sched_yield();
    /* The next attempt sees what came between: with a revision of the caller's own that decides it. */
  } while (again && kvc_now_ns() < deadline);
  /* A claim announced before the limit changed may have read the old one: it has to announce again. */
  if (result == KVCACHED_LIMIT_APPLIED) {
    kvc_withdraw_others(l, KVC_DEVICE, group, -1, 0);
    kvc_ledger_bell_ring(l);
  }
  err = report(l, group, result, out);
  if (!err && out->result == KVCACHED_LIMIT_DEFERRED) tell_to_trim(l, group, except);
  return err;
}

int kvc_ledger_set_own_limit(kvcached_ledger_t l, int slot, uint64_t bytes, kvcached_limit_t *out) {
  const kvc_ledger_slot *s = &l->map->slot[slot];
  char group[sizeof(s->group)];
  kvc_text_get(s->group, KVC_WORDS(s->group), group);
  kvcached_limit_t unused;
  return set_limit(l, group, slot, bytes, 0, out ? out : &unused);
}

static int check_arguments(kvcached_ledger_t l, const char *group, const kvcached_limit_t *out) {
  int err = kvc_check_ledger(l);
  if (!err && group) err = kvc_check_group(group);
  if (!err && out && out->struct_size < sizeof(*out))
    err = kvc_fail(KVCACHED_E_INVAL, "out->struct_size is %zu, a limit has %zu bytes", out->struct_size,
                   sizeof(*out));
  return err;
}

int kvcached_ledger_set_limit(kvcached_ledger_t l, const char *group, uint64_t bytes, uint32_t revision,
                              kvcached_limit_t *out) {
  kvcached_limit_t done;
  int err = check_arguments(l, group, out);
  if (!err) err = set_limit(l, group, -1, bytes, revision, &done);
  if (!err && out) *out = done;
  return err;
}

int kvcached_ledger_get_limit(kvcached_ledger_t l, const char *group, kvcached_limit_t *out) {
  if (!out) return kvc_fail(KVCACHED_E_INVAL, "out is NULL");
  kvcached_limit_t now;
  int err = check_arguments(l, group, out);
  if (!err) err = report(l, group, KVCACHED_LIMIT_APPLIED, &now);
  if (!err) *out = now;
  return err;
}
