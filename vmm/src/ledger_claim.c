/*
 * Claims: how processes keep common limits with no lock and no server between them.
 *
 * A claimer announces in its own slot what it will be charged, then reads the limits and sums what the live
 * slots are charged and have announced. If all of it is within the limits the announcement becomes a claim,
 * else it is withdrawn. Announcing comes before summing, in one order for all processes (seq_cst): of two
 * claimers at least one sees the other, so they cannot both take the last bytes. The step from announced to
 * claimed is a compare-and-swap, so that anybody may withdraw an announcement on behalf of its claimer, and
 * one of the two then fails, never both succeed. That alone keeps the limits, also against a claimer stopped
 * between any two instructions; everything below is about who gets the bytes:
 *
 * - Charges that stand do not leave room: the claim fails.
 * - Older announcements are in the way: step back, wait for them to end, announce again with the same age.
 * - Only younger ones are: withdraw them. Their claimers announce again, see the older one, and step back.
 *
 * So the older claim wins at once, whatever became of the younger claimer. An older claimer that does not get
 * on for half of the time there is to wait is stopped, or gets no processor: its announcement is withdrawn
 * too. It will announce again when it runs.
 */
#include "ledger_impl.h"

#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* A sum is not a snapshot: bytes that one slot gave up and another took may show in both. It has to fail
 * thrice. */
#define FULL_SUMS 3
/* Rounds that nobody has to be waited for in, so that a claim without time to wait goes through them too. */
#define FREE_ROUNDS 16

int64_t kvc_now_ns(void) {
  struct timespec ts;
  (void)clock_gettime(CLOCK_MONOTONIC, &ts);
  return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

static unsigned state_of(uint64_t word) { return (unsigned)(word & 3); }

static uint64_t charge_of(const kvc_slot_view *v, int account, uint64_t more) {
  return account == KVC_HOST ? kvc_sat_add(v->host, more) : kvc_slot_charge(v, more);
}

/* Of two announcements the first drawn, and of two of one age (a damaged file has such) the first slot's. */
static int is_older(uint64_t word, int slot, uint64_t ticket, int than) {
  return word >> 2 < ticket || (word >> 2 == ticket && slot < than);
}

static void add(kvc_sum *sum, uint64_t charge, uint64_t announced, int older) {
  uint64_t *age = older ? &sum->older : &sum->younger;
  sum->charged = kvc_sat_add(sum->charged, charge);
  *age = kvc_sat_add(*age, announced);
  sum->slots++;
}

int kvc_sum_slots(struct kvcached_ledger *l, int account, const char *group, int except, uint64_t ticket,
                  int card, kvc_sums *out) {
  *out = (kvc_sums){0};
  if (group && except >= 0) out->word = atomic_load(&l->map->slot[except].limit);
  for (int i = 0; i < KVC_LEDGER_SLOTS; i++) {
    kvc_slot_view v;
    if (i == except || !kvc_slot_peek(l, i, &v)) continue;
    int same = group && strcmp(v.group, group) == 0;
    if (!same && !card) continue;
    int better = same && kvc_limit_beats(v.limit, out->word);
    int asks = state_of(v.word[account]) != KVC_ASK_NONE;
    if (!better && !asks && charge_of(&v, account, 0) == 0) continue; /* nothing, whether live or not */
    int err = kvc_slot_confirm(l, i, &v);
    if (err) return err;
    if (!v.holders) continue;
    if (better) out->word = v.limit;
    uint64_t word = v.word[account], charge = charge_of(&v, account, 0), announced = 0;
    if (state_of(word) != KVC_ASK_NONE && v.target[account] > charge) {
      if (state_of(word) == KVC_ASK_ANNOUNCED)
        announced = v.target[account] - charge;
      else /* it cannot be withdrawn any more */
        charge = v.target[account];
    }
    if (same) add(&out->group, charge, announced, is_older(word, i, ticket, except));
    if (card) add(&out->card, charge, announced, is_older(word, i, ticket, except));
  }
  return KVCACHED_OK;
}

void kvc_withdraw_others(struct kvcached_ledger *l, int account, const char *group, int except,
                         uint64_t ticket) {
  for (int i = 0; i < KVC_LEDGER_SLOTS; i++) {
    kvc_ledger_slot *s = &l->map->slot[i];
    uint64_t word = atomic_load(&s->ask[account].word);
    if (i == except || state_of(word) != KVC_ASK_ANNOUNCED) continue;
    if (ticket && is_older(word, i, ticket, except)) continue;
    char text[sizeof(s->group)];
    kvc_text_get(s->group, KVC_WORDS(s->group), text);
    if (group && strcmp(text, group) != 0) continue;
    (void)atomic_compare_exchange_strong(&s->ask[account].word, &word, word & ~UINT64_C(3));
  }
}

static _Atomic uint64_t *field_of(kvc_ledger_slot *s, kvc_claim_kind kind) {
  return kind == KVC_CLAIM_LEASE   ? &s->lease
         : kind == KVC_CLAIM_FIXED ? &s->fixed
         : kind == KVC_CLAIM_HOST  ? &s->host
                                   : &s->claim;
}

static void commit(kvc_ledger_slot *s, kvc_claim_kind kind, uint64_t bytes) {
  _Atomic uint64_t *field = field_of(s, kind);
  uint64_t old = atomic_load(field);
  while (!atomic_compare_exchange_weak(field, &old, kvc_sat_add(old, bytes))) {
  }
  /* Who takes memory is at work, be it outside the gate: filling it for the first time, say. */
  if (kind == KVC_CLAIM_PAGES) kvc_slot_mark_used(s);
}

/* Yields at first: the other claim usually ends within microseconds. */
static void pause_for(unsigned round) {
  if (round < 16)
    (void)sched_yield();
  else
    (void)nanosleep(&(struct timespec){.tv_nsec = round < 64 ? 50000 : 500000}, NULL);
}

/* What is in the way of a claim, the worst last. */
typedef enum verdict { FITS, YOUNGER, OLDER, FULL } verdict;

static verdict judge(const kvc_sum *others, uint64_t after, uint64_t limit, uint64_t *excess) {
  *excess = 0;
  if (limit == UINT64_MAX) return FITS;
  uint64_t standing = kvc_sat_add(others->charged, after);
  uint64_t with_older = kvc_sat_add(standing, others->older);
  uint64_t total = kvc_sat_add(with_older, others->younger);
  if (total <= limit) return FITS;
  *excess = (standing > limit ? standing : total) - limit;
  return standing > limit ? FULL : with_older > limit ? OLDER : YOUNGER;
}

static int refuse(struct kvcached_ledger *l, int slot, int account, const kvc_slot_view *self, uint64_t bytes,
                  const kvc_sums *sums, uint64_t limit, uint64_t card, const kvc_shortage *shortage) {
  if (!shortage->group && !shortage->card)
    return kvc_fail(account == KVC_HOST ? KVCACHED_E_HOST_LIMIT : KVCACHED_E_LIMIT,
                    "group \"%s\": %" PRIu64
                    " bytes asked for slot %d of %s would fit, but other claims went "
                    "first each time: try again",
                    self->group, bytes, slot, l->path);
  const kvc_sum *other = shortage->group ? &sums->group : &sums->card;
  char scope[KVCACHED_GROUP_MAX + 16] = "the card";
  if (shortage->group) (void)snprintf(scope, sizeof(scope), "group \"%s\"", self->group);
  return kvc_fail(account == KVC_HOST ? KVCACHED_E_HOST_LIMIT : KVCACHED_E_LIMIT,
                  "%s: %" PRIu64 " bytes%s asked for slot %d, which is charged %" PRIu64
                  "; %d other slots are charged %" PRIu64 " and asking for %" PRIu64 "; the limit is %" PRIu64
                  ", passed by %" PRIu64 " (ledger %s)",
                  scope, bytes, account == KVC_HOST ? " of host memory" : "", slot,
                  charge_of(self, account, 0), other->slots, other->charged,
                  kvc_sat_add(other->older, other->younger), shortage->group ? limit : card,
                  shortage->group ? shortage->group : shortage->card, l->path);
}

int kvc_ledger_claim(kvcached_ledger_t l, int slot, kvc_claim_kind kind, uint64_t bytes, uint64_t own_limit,
                     uint32_t wait_ms, kvc_shortage *shortage) {
  const int account = kind == KVC_CLAIM_HOST ? KVC_HOST : KVC_DEVICE;
  kvc_ledger_slot *s = &l->map->slot[slot];
  kvc_ledger_ask *ask = &s->ask[account];
  *shortage = (kvc_shortage){0};
  kvc_slot_view self;
  int err = kvc_slot_read(l, slot, &self);
  if (err) return err;
  if (!self.holders)
    return kvc_fail(KVCACHED_E_SLOT,
                    "slot %d of %s is not this process's any more: the file was changed by "
                    "something else than this library",
                    slot, l->path);
  const uint64_t after = charge_of(&self, account, bytes);
  if (after == charge_of(&self, account, 0)) { /* nothing, or the lease covers it */
    commit(s, kind, bytes);
    return KVCACHED_OK;
  }

  const uint64_t ticket = (atomic_fetch_add(&l->map->ticket, 1) + 1) & (UINT64_MAX >> 2);
  const uint64_t none = ticket << 2, announced = none | KVC_ASK_ANNOUNCED;
  const int64_t start = kvc_now_ns(), wait = (int64_t)wait_ms * 1000000;
  atomic_store(&ask->word, none);
  atomic_store(&ask->target, after);
  int full = 0;
  kvc_sums sums;
  uint64_t limit, card;
  for (unsigned round = 0;; round++) {
    atomic_store(&ask->word, announced);
    /* Limits are read after announcing: one set later finds the announcement, and withdraws it. */
    card = account == KVC_DEVICE ? kvc_limit_bytes(atomic_load(&l->map->card_limit), UINT64_MAX) : UINT64_MAX;
    err = kvc_sum_slots(l, account, self.group, slot, ticket, card != UINT64_MAX, &sums);
    if (err) break;
    kvc_limit_raise(s, sums.word);
    limit = account == KVC_DEVICE ? kvc_limit_bytes(sums.word, own_limit) : own_limit;
    verdict in_group = judge(&sums.group, after, limit, &shortage->group);
    verdict in_card = judge(&sums.card, after, card, &shortage->card);
    verdict worst = in_group > in_card ? in_group : in_card;
    if (worst == FITS) {
      uint64_t expected = announced;
      if (atomic_compare_exchange_strong(&ask->word, &expected, none | KVC_ASK_COMMITTING)) {
        commit(s, kind, bytes);
        break;
      }
    }
    const int64_t waited = kvc_now_ns() - start;
    const int patient = waited < wait;
    if (worst == YOUNGER || (worst == OLDER && patient && waited >= wait / 2)) {
      kvc_withdraw_others(l, account, in_card > FITS ? NULL : self.group, slot, worst == OLDER ? 0 : ticket);
    } else {
      atomic_store(&ask->word, none);
    }
    full = worst == FULL ? full + 1 : 0;
    if (full >= FULL_SUMS || (!patient && (worst == OLDER || round >= FREE_ROUNDS))) {
      err = refuse(l, slot, account, &self, bytes, &sums, limit, card, shortage);
      break;
    }
    if (worst >= OLDER || round >= FREE_ROUNDS) pause_for(round);
  }
  /* After the claim was added: a reader sees one of the two at any time. */
  atomic_store(&ask->word, none);
  return err;
}

void kvc_ledger_add_fixed(kvcached_ledger_t l, int slot, uint64_t bytes) {
  commit(&l->map->slot[slot], KVC_CLAIM_FIXED, bytes);
}

void kvc_ledger_unclaim(kvcached_ledger_t l, int slot, kvc_claim_kind kind, uint64_t bytes) {
  _Atomic uint64_t *field = field_of(&l->map->slot[slot], kind);
  uint64_t old = atomic_load(field);
  while (!atomic_compare_exchange_weak(field, &old, old > bytes ? old - bytes : 0)) {
  }
}

int kvc_ledger_account(kvcached_ledger_t l, int slot, uint64_t limit, kvc_account *out) {
  kvc_slot_view self;
  kvc_sums device, host;
  int err = kvc_slot_read(l, slot, &self);
  if (!err) err = kvc_sum_slots(l, KVC_DEVICE, self.group, -1, 0, 1, &device);
  if (!err) err = kvc_sum_slots(l, KVC_HOST, self.group, -1, 0, 0, &host);
  if (err) return err;
  *out = (kvc_account){.group_limit = kvc_limit_bytes(device.word, limit),
                       .group_charge = device.group.charged,
                       .card_limit = kvc_limit_bytes(atomic_load(&l->map->card_limit), UINT64_MAX),
                       .card_charge = device.card.charged,
                       .host_charge = host.group.charged,
                       .lease_left = kvc_slot_charge(&self, 0) - kvc_sat_add(self.fixed, self.claim),
                       .held = kvc_sat_add(self.fixed, self.claim),
                       .leased = (self.holders & KVC_HOLD_LESSOR) != 0};
  return KVCACHED_OK;
}
