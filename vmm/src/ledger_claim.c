/*
 * Claims: how processes keep one limit with no lock and no server between them.
 *
 * A claimer announces what it wants in its own slot (`pending`), then sums what the live slots of its group
 * are charged and what they have announced. If all of it is within the limit the announcement becomes a
 * claim, else it is withdrawn. Announcing comes before summing, in one order for all processes (seq_cst): of
 * two claimers at least one sees the other, so they cannot both take the last bytes. That alone keeps the
 * limit; everything below is about who gets them:
 *
 * - Charges that stand do not leave room: the claim fails.
 * - Older announcements are in the way: withdraw, wait for them to end, announce again with the same ticket.
 * - Only younger ones are: keep the announcement and look again. They see it and withdraw.
 *
 * The oldest announced claim is therefore never the one to give way. The wait is bounded: the other process
 * may be stopped.
 */
#include "ledger_impl.h"

#include <inttypes.h>
#include <sched.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define CLAIM_WAIT_NS INT64_C(1000000000)
/* A sum is not a snapshot: bytes that one slot gave up and another took may show in both. It has to fail
 * thrice. */
#define FULL_SUMS 3

typedef struct group_sum {
  uint64_t charged, older, younger; /* of the other slots */
  int slots;
} group_sum;

static int sum_others(struct kvcached_ledger *l, int slot, const char *group, uint64_t ticket,
                      group_sum *sum) {
  *sum = (group_sum){0};
  for (int i = 0; i < KVC_LEDGER_SLOTS; i++) {
    if (i == slot) continue;
    kvc_slot_view v;
    int err = kvc_slot_read(l, i, &v);
    if (err) return err;
    if (!v.holders || strcmp(v.group, group) != 0) continue;
    uint64_t charge = kvc_slot_charge(&v, 0);
    uint64_t announced = kvc_slot_charge(&v, v.pending) - charge;
    sum->charged = kvc_sat_add(sum->charged, charge);
    uint64_t *age = v.ticket < ticket ? &sum->older : &sum->younger;
    *age = kvc_sat_add(*age, announced);
    sum->slots++;
  }
  return KVCACHED_OK;
}

static void commit(kvc_ledger_slot *s, kvc_claim_kind kind, uint64_t bytes) {
  _Atomic uint64_t *field = kind == KVC_CLAIM_LEASE   ? &s->lease
                            : kind == KVC_CLAIM_FIXED ? &s->fixed
                                                      : &s->claim;
  atomic_fetch_add(field, bytes);
  atomic_store(&s->pending, 0); /* after: a reader may count it twice for a moment, never not at all */
}

static int64_t now_ns(void) {
  struct timespec ts;
  (void)clock_gettime(CLOCK_MONOTONIC, &ts);
  return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

/* Yields at first: the other claim usually ends within microseconds. */
static void pause_for(unsigned round) {
  if (round < 16)
    (void)sched_yield();
  else
    (void)nanosleep(&(struct timespec){.tv_nsec = round < 64 ? 50000 : 500000}, NULL);
}

int kvc_claim_locked(struct kvcached_ledger *l, int slot, kvc_claim_kind kind, uint64_t bytes, uint64_t limit,
                     uint64_t *excess) {
  kvc_ledger_slot *s = &l->map->slot[slot];
  *excess = 0;
  kvc_slot_view self;
  int err = kvc_slot_read(l, slot, &self);
  if (err) return err;
  uint64_t before = kvc_slot_charge(&self, 0), after = kvc_slot_charge(&self, bytes);
  if (limit == UINT64_MAX || after == before) { /* no limit, or the lease covers it */
    commit(s, kind, bytes);
    return KVCACHED_OK;
  }

  uint64_t ticket = atomic_fetch_add(&l->map->ticket, 1) + 1;
  atomic_store(&s->ticket, ticket);
  const int64_t deadline = now_ns() + CLAIM_WAIT_NS;
  int full = 0;
  group_sum sum;
  for (unsigned round = 0;; round++) {
    atomic_store(&s->pending, bytes);
    err = sum_others(l, slot, self.group, ticket, &sum);
    if (err) {
      atomic_store(&s->pending, 0);
      return err;
    }
    uint64_t standing = kvc_sat_add(sum.charged, after);
    uint64_t with_older = kvc_sat_add(standing, sum.older);
    uint64_t total = kvc_sat_add(with_older, sum.younger);
    if (total <= limit) {
      commit(s, kind, bytes);
      return KVCACHED_OK;
    }
    *excess = (standing > limit ? standing : total) - limit;
    if (standing > limit && ++full >= FULL_SUMS) break;
    if (standing <= limit && with_older > limit) atomic_store(&s->pending, 0);
    if (now_ns() > deadline) break;
    pause_for(round);
  }
  atomic_store(&s->pending, 0);
  return kvc_fail(KVCACHED_E_LIMIT,
                  "group \"%s\": %" PRIu64 " bytes asked for slot %d, which is charged %" PRIu64
                  "; %d other slots are charged %" PRIu64 " and asking for %" PRIu64 "; the limit is %" PRIu64
                  ", passed by %" PRIu64,
                  self.group, bytes, slot, before, sum.slots, sum.charged,
                  kvc_sat_add(sum.older, sum.younger), limit, *excess);
}

int kvc_ledger_claim(kvcached_ledger_t l, int slot, kvc_claim_kind kind, uint64_t bytes, uint64_t limit,
                     uint64_t *excess) {
  (void)pthread_mutex_lock(&l->mutex);
  int err = kvc_claim_locked(l, slot, kind, bytes, limit, excess);
  (void)pthread_mutex_unlock(&l->mutex);
  return err;
}

void kvc_ledger_unclaim(kvcached_ledger_t l, int slot, uint64_t bytes) {
  atomic_fetch_sub(&l->map->slot[slot].claim, bytes);
}

int kvc_ledger_group_charge(kvcached_ledger_t l, int slot, uint64_t *out) {
  kvc_slot_view self;
  group_sum sum = {0};
  (void)pthread_mutex_lock(&l->mutex);
  int err = kvc_slot_read(l, slot, &self);
  if (!err) err = sum_others(l, slot, self.group, UINT64_MAX, &sum);
  (void)pthread_mutex_unlock(&l->mutex);
  if (!err) *out = kvc_sat_add(sum.charged, kvc_slot_charge(&self, 0));
  return err;
}
