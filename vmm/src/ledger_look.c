/* What processes show of themselves in the ledger, the list of it, and whom to ask for room. Nothing here
   decides how much anybody may have. */
#include "ledger_impl.h"

#include <string.h>
#include <time.h>

#define JUST_WOKEN_NS INT64_C(2000000000)

void kvc_ledger_publish(kvcached_ledger_t l, int slot, const kvc_figures *f) {
  kvc_ledger_slot *s = &l->map->slot[slot];
  atomic_store(&s->reserved, f->reserved);
  for (int i = 0; i < 3; i++) {
    atomic_store(&s->kind_bytes[i], f->kind_bytes[i]);
    atomic_store(&s->kind_reserved[i], f->kind_reserved[i]);
    atomic_store(&s->kind_asleep[i], f->kind_asleep[i]);
  }
  atomic_store(&s->idle, f->idle);
  atomic_store(&s->pooled, f->pooled);
  atomic_store(&s->asleep, f->asleep);
}

uint64_t kvc_coarse_ns(void) {
  struct timespec now;
  (void)clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Made on the way into and out of the gate, so as cheap as can be, and without a barrier, since nothing is
   decided by it but who is asked first. */
void kvc_slot_mark_used(kvc_ledger_slot *s) {
  atomic_store_explicit(&s->last_use_ns, kvc_coarse_ns(), memory_order_release);
}

void kvc_ledger_mark_inside(kvcached_ledger_t l, int slot, uint32_t inside) {
  kvc_ledger_slot *s = &l->map->slot[slot];
  kvc_slot_mark_used(s);
  atomic_store_explicit(&s->inside, inside, memory_order_release);
}

void kvc_ledger_mark_woke(kvcached_ledger_t l, int slot) {
  atomic_store(&l->map->slot[slot].woke_ns, (uint64_t)kvc_now_ns());
}

void kvc_ledger_mark_queued(kvcached_ledger_t l, int slot, uint32_t requests) {
  atomic_store(&l->map->slot[slot].queued, requests);
}

void kvc_ledger_mark_context(kvcached_ledger_t l, int slot, uint64_t bytes) {
  atomic_store(&l->map->slot[slot].context_bytes, bytes);
}

static uint32_t small(uint64_t n) { return n < UINT32_MAX ? (uint32_t)n : UINT32_MAX; }

/* What observers see of a slot. 1 live, 0 not, negative on error. */
static int describe(struct kvcached_ledger *l, int slot, kvcached_slot_t *out) {
  const kvc_ledger_slot *s = &l->map->slot[slot];
  kvc_slot_view v;
  int err = kvc_slot_read(l, slot, &v);
  if (err) return err;
  if (!v.holders) return 0;
  memset(out, 0, sizeof(*out));
  out->slot = slot;
  out->lease = v.lease;
  out->fixed = v.fixed;
  out->claim = v.claim;
  out->charge = kvc_slot_charge(&v, 0);
  out->leased = (v.holders & KVC_HOLD_LESSOR) != 0;
  out->attached = (v.holders & KVC_HOLD_USER) != 0;
  out->pid = (int64_t)atomic_load(out->attached ? &s->user_pid : &s->lessor_pid);
  out->limit = kvc_limit_bytes(v.limit, UINT64_MAX);
  out->host_bytes = v.host;
  (void)memcpy(out->group, v.group, sizeof(out->group));
  kvc_text_get(s->name, KVC_WORDS(s->name), out->name);
  if (!out->attached) return 1; /* the rest is the user's */
  out->reserved = atomic_load(&s->reserved);
  for (int i = 0; i < 3; i++) {
    out->kind_bytes[i] = atomic_load(&s->kind_bytes[i]);
    out->kind_reserved[i] = atomic_load(&s->kind_reserved[i]);
    out->kind_asleep[i] = atomic_load(&s->kind_asleep[i]);
  }
  out->idle = atomic_load(&s->idle);
  out->pooled = atomic_load(&s->pooled);
  out->asleep = atomic_load(&s->asleep);
  out->last_use_ns = atomic_load(&s->last_use_ns);
  out->woke_ns = atomic_load(&s->woke_ns);
  out->inside = small(atomic_load(&s->inside));
  out->queued = small(atomic_load(&s->queued));
  out->controlled = atomic_load(&s->controlled) == 1;
  out->wants = atomic_load(&s->wants);
  out->wants_since_ns = atomic_load(&s->wants_since_ns);
  out->context_bytes = atomic_load(&s->context_bytes);
  out->parked = small(atomic_load(&s->parked));
  return 1;
}

/* The structure as it was in ABI 1: the least that a caller may have. */
#define FIRST_SLOT_SIZE offsetof(kvcached_slot_t, kind_bytes)

int kvcached_ledger_slots(kvcached_ledger_t l, kvcached_slot_t *out, size_t cap, size_t *n) {
  if (!l || !n || (!out && cap))
    return kvc_fail(KVCACHED_E_INVAL, "%s is NULL", !l ? "ledger" : !n ? "n" : "out");
  *n = 0;
  int err = kvc_check_ledger(l);
  if (err) return err;
  size_t stride = cap ? out[0].struct_size : sizeof(*out);
  if (stride < FIRST_SLOT_SIZE || stride % _Alignof(kvcached_slot_t))
    return kvc_fail(KVCACHED_E_INVAL, "out[0].struct_size is %zu, a slot has %zu bytes", stride,
                    sizeof(*out));

  size_t found = 0;
  for (int i = 0; i < KVC_LEDGER_SLOTS && !err; i++) {
    kvcached_slot_t one;
    int live = describe(l, i, &one);
    if (live < 0) err = live;
    if (live <= 0) continue;
    if (found < cap) {
      one.struct_size = stride < sizeof(one) ? stride : sizeof(one);
      memcpy((char *)out + found * stride, &one, one.struct_size);
    }
    found++;
  }
  *n = found;
  return err;
}

/* How long ago a mark was made; a mark from the future (a damaged file, a process in another time namespace)
   tells nothing: `unknown`. */
static int64_t age(uint64_t mark_ns, int64_t unknown) {
  int64_t now = kvc_now_ns();
  if (mark_ns == 0 || mark_ns > (uint64_t)now) return unknown;
  return now - (int64_t)mark_ns;
}

int kvc_ledger_pick_victim(kvcached_ledger_t l, int slot, int want_sleep, int charged,
                           const uint64_t *asked) {
  char own[KVCACHED_GROUP_MAX + 1];
  kvc_text_get(l->map->slot[slot].group, KVC_WORDS(l->map->slot[slot].group), own);
  int best = -1;
  int64_t best_age = 0;
  for (int i = 0; i < KVC_LEDGER_SLOTS; i++) {
    if (i == slot || (asked[i / 64] >> (i % 64) & 1)) continue;
    kvcached_slot_t one;
    if (describe(l, i, &one) <= 0) continue;
    if (!one.attached || !one.controlled || one.inside || one.queued || strcmp(one.group, own) == 0) continue;
    if (one.parked || one.wants) continue; /* at work, but for the room: only its lessor puts it to sleep */
    if (want_sleep ? one.claim == 0 : one.idle == 0 && one.pooled == 0) continue;
    if (charged && !want_sleep && one.lease >= kvc_sat_add(one.fixed, one.claim)) continue;
    if (age(one.woke_ns, INT64_MAX) < JUST_WOKEN_NS) continue;
    int64_t unused = age(one.last_use_ns, INT64_MAX);
    if (best < 0 || unused > best_age) {
      best = i;
      best_age = unused;
    }
  }
  return best;
}
