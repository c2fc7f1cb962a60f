/*
 * Slots of the ledger: taking, leasing.
 *
 *   ledger_file.c   the file, its checks and locks     ledger_limit.c     limits and their revisions
 *   ledger_claim.c  the protocol of claims, sums       ledger_command.c   mailboxes
 *   ledger_look.c   figures, lists, whom to ask        ledger_bell.c      the bell, who waits for memory
 *   ledger_handle.c opening and closing
 *
 * Nothing read from the file is trusted to be sensible: another process may have been stopped or killed
 * anywhere, and a damaged file must not do more than make the library refuse or show nonsense. So texts get
 * an end, sums stop at the largest number, and no number from the file is an index or a bound.
 */
#include "ledger_impl.h"

#include <inttypes.h>
#include <string.h>
#include <unistd.h>

/* ---- what callers give ---- */

int kvc_check_ledger(const struct kvcached_ledger *l) {
  if (!l) return kvc_fail(KVCACHED_E_INVAL, "ledger is NULL");
  return l->pid == getpid() ? KVCACHED_OK : kvc_fail_forked(l->pid);
}

int kvc_check_slot(const struct kvcached_ledger *l, int slot) {
  if (slot >= 0 && slot < KVC_LEDGER_SLOTS) return KVCACHED_OK;
  return kvc_fail(KVCACHED_E_SLOT, "slot %d: %s has slots 0 to %d", slot, l->path, KVC_LEDGER_SLOTS - 1);
}

int kvc_check_group(const char *group) {
  size_t len = group ? strlen(group) : 0;
  if (len > 0 && len <= KVCACHED_GROUP_MAX) return KVCACHED_OK;
  return kvc_fail(KVCACHED_E_INVAL, "group: %zu bytes, it has 1 to %d", len, KVCACHED_GROUP_MAX);
}

/* ---- text in a slot ---- */

/* Whole words, so that a reader never sees half a letter of one text and half of another's. */

static void put_text(_Atomic uint64_t *words, size_t n, const char *text) {
  size_t len = text ? strnlen(text, n * 8 - 1) : 0;
  for (size_t i = 0; i < n; i++) {
    uint64_t word = 0;
    if (i * 8 < len) memcpy(&word, text + i * 8, len - i * 8 < 8 ? len - i * 8 : 8);
    atomic_store(&words[i], word);
  }
}

void kvc_text_get(const _Atomic uint64_t *words, size_t n, char *out) {
  for (size_t i = 0; i < n; i++) {
    uint64_t word = atomic_load(&words[i]);
    memcpy(out + i * 8, &word, 8);
  }
  out[n * 8 - 1] = 0;
}

/* ---- slots ---- */

int kvc_slot_peek(struct kvcached_ledger *l, int slot, kvc_slot_view *v) {
  const kvc_ledger_slot *s = &l->map->slot[slot];
  memset(v, 0, sizeof(*v));
  uint64_t gen = atomic_load(&s->gen);
  if (gen == 0 || gen % 2) return 0;
  v->gen = gen;
  /* Announcements before claims: a claim moves from the first to the second, and is then seen at least once.
   */
  for (int i = 0; i < KVC_ACCOUNTS; i++) {
    v->word[i] = atomic_load(&s->ask[i].word);
    v->target[i] = atomic_load(&s->ask[i].target);
  }
  v->claim = atomic_load(&s->claim);
  v->host = atomic_load(&s->host);
  v->fixed = atomic_load(&s->fixed);
  v->lease = atomic_load(&s->lease);
  v->limit = atomic_load(&s->limit);
  kvc_text_get(s->group, KVC_WORDS(s->group), v->group);
  return 1;
}

int kvc_slot_confirm(struct kvcached_ledger *l, int slot, kvc_slot_view *v) {
  const kvc_ledger_slot *s = &l->map->slot[slot];
  int others = kvc_ledger_file_holders(l->fd, slot);
  if (others < 0) return others;
  v->holders = others | atomic_load(&l->held[slot]);
  if (!(v->holders & KVC_HOLD_USER)) {
    /* Left behind by a user that died; or the announcement of a lease, which has become one before that hold
       was dropped: so that is read once more. */
    v->claim = v->host = 0;
    memset(v->word, 0, sizeof(v->word));
    v->fixed = atomic_load(&s->fixed);
    v->lease = atomic_load(&s->lease);
    if (v->fixed > v->lease) v->fixed = v->lease; /* the user had more, and has nothing now */
  }
  /* Not held; or taken anew meanwhile, and what was read is mixed. Nothing was charged to it before the new
     user announced, and whoever announces after the caller did sees the caller. */
  if (!v->holders || atomic_load(&s->gen) != v->gen) memset(v, 0, sizeof(*v));
  return KVCACHED_OK;
}

int kvc_slot_read(struct kvcached_ledger *l, int slot, kvc_slot_view *v) {
  return kvc_slot_peek(l, slot, v) ? kvc_slot_confirm(l, slot, v) : KVCACHED_OK;
}

/* What a user that died may have left. */
static void clear_user(kvc_ledger_slot *s) {
  _Atomic uint64_t *fields[] = {&s->ask[KVC_DEVICE].word,
                                &s->ask[KVC_HOST].word,
                                &s->claim,
                                &s->host,
                                &s->controlled,
                                &s->ask[KVC_DEVICE].target,
                                &s->ask[KVC_HOST].target,
                                &s->kind_bytes[0],
                                &s->kind_bytes[1],
                                &s->kind_bytes[2],
                                &s->reserved,
                                &s->idle,
                                &s->pooled,
                                &s->asleep,
                                &s->last_use_ns,
                                &s->woke_ns,
                                &s->inside,
                                &s->queued,
                                &s->wants,
                                &s->wants_since_ns,
                                &s->context_bytes,
                                &s->kind_reserved[0],
                                &s->kind_reserved[1],
                                &s->kind_reserved[2],
                                &s->kind_asleep[0],
                                &s->kind_asleep[1],
                                &s->kind_asleep[2],
                                &s->parked};
  for (size_t i = 0; i < KVC_WORDS(fields); i++) atomic_store(fields[i], 0);
  kvc_mail_reset(s);
}

static void drop_holds(struct kvcached_ledger *l, int slot, int holds) {
  if (kvc_ledger_file_drop(l->fd, slot, holds) == KVCACHED_OK)
    atomic_fetch_and(&l->held[slot], (uint8_t)~holds);
}

/* Takes both holds of a free slot, so that nobody else takes either, and fills it in. */
static int take_free(struct kvcached_ledger *l, const char *group, const char *name, int *out) {
  for (int i = 0; i < KVC_LEDGER_SLOTS; i++) {
    if (atomic_load(&l->held[i])) continue; /* a lock never excludes its own holder */
    int taken = kvc_ledger_file_hold(l->fd, i, KVC_HOLD_BOTH);
    if (taken < 0) return taken;
    if (!taken) continue;
    kvc_ledger_slot *s = &l->map->slot[i];
    uint64_t gen = atomic_load(&s->gen) | 1; /* odd already when the last taker died right here */
    if (gen == UINT64_MAX) gen = 1;          /* 0 would say that it was never used */
    atomic_store(&s->gen, gen);
    clear_user(s);
    _Atomic uint64_t *fields[] = {&s->lease, &s->fixed, &s->limit, &s->user_pid, &s->lessor_pid};
    for (size_t f = 0; f < KVC_WORDS(fields); f++) atomic_store(fields[f], 0);
    put_text(s->group, KVC_WORDS(s->group), group);
    put_text(s->name, KVC_WORDS(s->name), name);
    atomic_store(&l->held[i], KVC_HOLD_BOTH);
    atomic_store(&s->gen, gen + 1);
    int err = kvc_limit_join(l, i, group);
    if (err) drop_holds(l, i, KVC_HOLD_BOTH);
    *out = i;
    return err;
  }
  return kvc_fail(KVCACHED_E_FULL, "all %d slots of %s are taken: end processes that use it",
                  KVC_LEDGER_SLOTS, l->path);
}

int kvc_ledger_take(kvcached_ledger_t l, const char *group, const char *name, int *slot) {
  (void)pthread_mutex_lock(&l->mutex);
  int err = take_free(l, group, name, slot);
  if (!err) {
    atomic_store(&l->map->slot[*slot].user_pid, (uint64_t)l->pid);
    drop_holds(l, *slot, KVC_HOLD_LESSOR);
  }
  (void)pthread_mutex_unlock(&l->mutex);
  if (!err) kvc_ledger_bell_ring(l);
  return err;
}

/* Whether a slot whose user's hold was just taken is leased, and to whose group. */
static int check_lease(struct kvcached_ledger *l, int slot, const char *group, char *group_out) {
  int holders = kvc_ledger_file_holders(l->fd, slot);
  if (holders < 0) return holders;
  if (!(holders & KVC_HOLD_LESSOR))
    return kvc_fail(KVCACHED_E_SLOT,
                    "slot %d of %s is not leased: the process that leased it has ended, or never did", slot,
                    l->path);
  const kvc_ledger_slot *s = &l->map->slot[slot];
  kvc_text_get(s->group, KVC_WORDS(s->group), group_out);
  if (!*group_out || atomic_load(&s->gen) % 2)
    return kvc_fail(KVCACHED_E_SLOT,
                    "slot %d of %s is leased, but has no group: the file was changed by something else than "
                    "this library",
                    slot, l->path);
  if (group && strcmp(group, group_out) != 0)
    return kvc_fail(KVCACHED_E_SLOT, "slot %d of %s was leased for group \"%s\", not \"%s\"", slot, l->path,
                    group_out, group);
  return KVCACHED_OK;
}

int kvc_ledger_attach(kvcached_ledger_t l, int slot, const char *group, const char *name, char *group_out,
                      uint64_t *fixed) {
  int err = kvc_check_slot(l, slot);
  if (err) return err;
  kvc_ledger_slot *s = &l->map->slot[slot];
  (void)pthread_mutex_lock(&l->mutex);
  /* A hold of this very handle would not be in the way of taking it again. */
  int taken = atomic_load(&l->held[slot]) ? 0 : kvc_ledger_file_hold(l->fd, slot, KVC_HOLD_USER);
  if (taken < 0) {
    err = taken;
  } else if (!taken) {
    err = kvc_fail(KVCACHED_E_SLOT, "slot %d of %s is in use by pid %" PRIu64, slot, l->path,
                   atomic_load(&s->user_pid));
  } else if ((err = check_lease(l, slot, group, group_out)) != 0) {
    (void)kvc_ledger_file_drop(l->fd, slot, KVC_HOLD_USER);
  } else {
    clear_user(s);
    uint64_t lease = atomic_load(&s->lease);
    *fixed = atomic_load(&s->fixed);
    if (*fixed > lease) atomic_store(&s->fixed, *fixed = lease); /* the last user's own */
    atomic_store(&s->user_pid, (uint64_t)l->pid);
    if (atomic_load(&s->name[0]) == 0) put_text(s->name, KVC_WORDS(s->name), name);
    atomic_store(&l->held[slot], KVC_HOLD_USER);
  }
  (void)pthread_mutex_unlock(&l->mutex);
  if (!err) kvc_ledger_bell_ring(l);
  return err;
}

/* ---- leases ---- */

#define LEASE_WAIT_MS 1000

int kvcached_ledger_lease(kvcached_ledger_t l, const char *group, const char *name, uint64_t size,
                          uint64_t fixed, uint64_t limit, int *out) {
  if (!out) return kvc_fail(KVCACHED_E_INVAL, "slot is NULL");
  *out = -1;
  int err = kvc_check_ledger(l);
  if (!err) err = kvc_check_group(group);
  if (err) return err;

  int slot = -1;
  kvc_shortage shortage;
  (void)pthread_mutex_lock(&l->mutex);
  err = kvc_ledger_file_check_path(l->path, l->fd);
  if (!err) err = take_free(l, group, name, &slot);
  if (!err) atomic_store(&l->map->slot[slot].lessor_pid, (uint64_t)l->pid);
  (void)pthread_mutex_unlock(&l->mutex);
  if (err) return err;
  /* Both holds are kept until the lease stands: an announcement counts only while the user's is held. Other
     threads' leases do not wait for this one. */
  err = kvc_ledger_claim(l, slot, KVC_CLAIM_LEASE, size > fixed ? size : fixed, limit, LEASE_WAIT_MS,
                         &shortage);
  if (!err) atomic_store(&l->map->slot[slot].fixed, fixed);
  (void)pthread_mutex_lock(&l->mutex);
  drop_holds(l, slot, err ? KVC_HOLD_BOTH : KVC_HOLD_USER);
  (void)pthread_mutex_unlock(&l->mutex);
  if (err) return err;
  *out = slot;
  kvc_ledger_bell_ring(l);
  return KVCACHED_OK;
}

void kvc_ledger_end_lease(kvcached_ledger_t l, int slot) { atomic_store(&l->map->slot[slot].lease, 0); }

int kvcached_ledger_unlease(kvcached_ledger_t l, int slot) {
  int err = kvc_check_ledger(l);
  if (err) return err;
  (void)pthread_mutex_lock(&l->mutex);
  /* Both: another thread is still leasing it. */
  if (slot < 0 || slot >= KVC_LEDGER_SLOTS || atomic_load(&l->held[slot]) != KVC_HOLD_LESSOR)
    err = kvc_fail(KVCACHED_E_SLOT, "slot %d of %s is not leased through this handle", slot, l->path);
  else
    drop_holds(l, slot, KVC_HOLD_LESSOR);
  (void)pthread_mutex_unlock(&l->mutex);
  if (!err) kvc_ledger_bell_ring(l);
  return err;
}
