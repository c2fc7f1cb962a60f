/*
 * Slots of the ledger: taking, leasing, listing. The protocol of claims is in ledger_claim.c, the file in
 * ledger_file.c.
 */
#include "ledger_impl.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- all open ledgers of the process ---- */

/* A forked child has to drop their descriptors, or it would keep their slots alive. */

static pthread_mutex_t all_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct kvcached_ledger *all;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;
static int fork_error;

static void before_fork(void) { (void)pthread_mutex_lock(&all_mutex); }

static void after_fork_parent(void) { (void)pthread_mutex_unlock(&all_mutex); }

static void after_fork_child(void) {
  for (struct kvcached_ledger *l = all; l; l = l->next) {
    (void)close(l->fd);
    l->fd = -1;
  }
  all = NULL;
  (void)pthread_mutex_unlock(&all_mutex);
}

static void install_fork_handlers(void) {
  fork_error = pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

int kvc_ledger_open(const char *path, const char *backend, kvcached_ledger_t *out) {
  *out = NULL;
  (void)pthread_once(&fork_once, install_fork_handlers);
  if (fork_error) return kvc_fail_errno(KVCACHED_E_NOMEM, fork_error, "installing the fork handlers");

  struct kvcached_ledger *l = calloc(1, sizeof(*l));
  if (!l) return kvc_fail(KVCACHED_E_NOMEM, "no memory for a ledger handle");
  int err = KVCACHED_OK;
  int len = path ? asprintf(&l->path, "%s", path)
                 : asprintf(&l->path, "/dev/shm/kvcached-%lu-%s", (unsigned long)geteuid(), backend);
  if (len < 0) {
    l->path = NULL;
    err = kvc_fail(KVCACHED_E_NOMEM, "no memory for the ledger's path");
    goto fail;
  }
  l->pid = getpid();
  int e = pthread_mutex_init(&l->mutex, NULL);
  if (e) {
    err = kvc_fail_errno(KVCACHED_E_SYSTEM, e, "making a mutex");
    goto fail;
  }
  /* The list's lock is held from before the descriptor exists: a fork in between would lose sight of it. */
  (void)pthread_mutex_lock(&all_mutex);
  err = kvc_ledger_file_open(l->path, &l->fd, &l->map);
  if (!err) {
    l->next = all;
    all = l;
  }
  (void)pthread_mutex_unlock(&all_mutex);
  if (err) {
    (void)pthread_mutex_destroy(&l->mutex);
    goto fail;
  }
  *out = l;
  return KVCACHED_OK;

fail:
  free(l->path);
  free(l);
  return err;
}

int kvcached_ledger_open(const char *path, kvcached_ledger_t *out) {
  if (!out) return kvc_fail(KVCACHED_E_INVAL, "out is NULL");
  *out = NULL;
  if (path && !*path) return kvc_fail(KVCACHED_E_INVAL, "the ledger's path is empty");
  return kvc_ledger_open(path, kvc_backend_host.name, out);
}

void kvcached_ledger_close(kvcached_ledger_t l) {
  if (!l || l->pid != getpid()) return;
  (void)pthread_mutex_lock(&all_mutex);
  for (struct kvcached_ledger **p = &all; *p; p = &(*p)->next) {
    if (*p == l) {
      *p = l->next;
      break;
    }
  }
  (void)pthread_mutex_unlock(&all_mutex);
  /* Dropped by name: a child made by a bare clone() shares the open file, and closing it here would not end
   * the locks. */
  for (int i = 0; i < KVC_LEDGER_SLOTS; i++)
    if (l->held[i]) (void)kvc_ledger_file_drop(l->fd, i, l->held[i]);
  (void)munmap(l->map, sizeof(*l->map));
  (void)close(l->fd);
  (void)pthread_mutex_destroy(&l->mutex);
  free(l->path);
  free(l);
}

const char *kvcached_ledger_path(kvcached_ledger_t l) { return l ? l->path : NULL; }

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

static void get_text(const _Atomic uint64_t *words, size_t n, char *out) {
  for (size_t i = 0; i < n; i++) {
    uint64_t word = atomic_load(&words[i]);
    memcpy(out + i * 8, &word, 8);
  }
  out[n * 8 - 1] = 0;
}

#define WORDS(array) (sizeof(array) / sizeof((array)[0]))

/* ---- slots ---- */

int kvc_slot_holders(struct kvcached_ledger *l, int slot) {
  if (atomic_load(&l->map->slot[slot].gen) == 0 && !l->held[slot]) return 0;
  int others = kvc_ledger_file_holders(l->fd, slot);
  return others < 0 ? others : others | l->held[slot];
}

int kvc_slot_read(struct kvcached_ledger *l, int slot, kvc_slot_view *v) {
  const kvc_ledger_slot *s = &l->map->slot[slot];
  memset(v, 0, sizeof(*v));
  int holders = kvc_slot_holders(l, slot);
  if (holders < 0) return holders;
  if (!holders) return KVCACHED_OK;
  uint64_t gen = atomic_load(&s->gen);
  if (gen % 2) return KVCACHED_OK;
  /* `pending` before `claim`: a claim moves from the first to the second, and is then seen at least once. */
  v->pending = atomic_load(&s->pending);
  v->ticket = atomic_load(&s->ticket);
  v->claim = atomic_load(&s->claim);
  v->fixed = atomic_load(&s->fixed);
  v->lease = atomic_load(&s->lease);
  get_text(s->group, WORDS(s->group), v->group);
  if (!(holders & KVC_HOLD_USER)) v->pending = v->claim = 0; /* left behind by a user that died */
  v->holders = holders;
  /* Taken anew meanwhile: what was read is mixed. Nothing is charged to it yet, and what will be is summed
     after the caller's own announcement. */
  if (atomic_load(&s->gen) != gen) memset(v, 0, sizeof(*v));
  return KVCACHED_OK;
}

/* Takes both holds of a free slot, so that nobody else takes either, and fills it in. */
static int take_free(struct kvcached_ledger *l, const char *group, const char *name, int *out) {
  for (int i = 0; i < KVC_LEDGER_SLOTS; i++) {
    if (l->held[i]) continue; /* a lock never excludes its own holder */
    int taken = kvc_ledger_file_hold(l->fd, i, KVC_HOLD_BOTH);
    if (taken < 0) return taken;
    if (!taken) continue;
    kvc_ledger_slot *s = &l->map->slot[i];
    uint64_t gen = atomic_load(&s->gen) | 1; /* odd already when the last taker died right here */
    atomic_store(&s->gen, gen);
    _Atomic uint64_t *fields[] = {&s->lease,  &s->fixed,    &s->claim,    &s->pending,
                                  &s->ticket, &s->reserved, &s->user_pid, &s->lessor_pid};
    for (size_t f = 0; f < WORDS(fields); f++) atomic_store(fields[f], 0);
    put_text(s->group, WORDS(s->group), group);
    put_text(s->name, WORDS(s->name), name);
    atomic_store(&s->gen, gen + 1);
    l->held[i] = KVC_HOLD_BOTH;
    *out = i;
    return KVCACHED_OK;
  }
  return kvc_fail(KVCACHED_E_FULL, "all %d slots of %s are taken", KVC_LEDGER_SLOTS, l->path);
}

static void drop_holds(struct kvcached_ledger *l, int slot, int holds) {
  if (kvc_ledger_file_drop(l->fd, slot, holds) == KVCACHED_OK) l->held[slot] &= (uint8_t)~holds;
}

int kvc_ledger_take(kvcached_ledger_t l, const char *group, const char *name, int *slot) {
  (void)pthread_mutex_lock(&l->mutex);
  int err = take_free(l, group, name, slot);
  if (!err) {
    atomic_store(&l->map->slot[*slot].user_pid, (uint64_t)l->pid);
    drop_holds(l, *slot, KVC_HOLD_LESSOR);
  }
  (void)pthread_mutex_unlock(&l->mutex);
  return err;
}

int kvc_ledger_attach(kvcached_ledger_t l, int slot, const char *group, const char *name, char *group_out) {
  if (slot < 0 || slot >= KVC_LEDGER_SLOTS)
    return kvc_fail(KVCACHED_E_SLOT, "slot %d: %s has slots 0 to %d", slot, l->path, KVC_LEDGER_SLOTS - 1);
  (void)pthread_mutex_lock(&l->mutex);
  kvc_ledger_slot *s = &l->map->slot[slot];
  int err;
  int taken = kvc_ledger_file_hold(l->fd, slot, KVC_HOLD_USER);
  if (taken <= 0) {
    err = taken < 0 ? taken
                    : kvc_fail(KVCACHED_E_SLOT, "slot %d of %s is in use by pid %" PRIu64, slot, l->path,
                               atomic_load(&s->user_pid));
    goto out;
  }
  int holders = kvc_ledger_file_holders(l->fd, slot);
  if (holders < 0) {
    err = holders;
    goto drop;
  }
  if (!(holders & KVC_HOLD_LESSOR)) {
    err = kvc_fail(KVCACHED_E_SLOT,
                   "slot %d of %s is not leased: the process that leased it has ended, or never did", slot,
                   l->path);
    goto drop;
  }
  get_text(s->group, WORDS(s->group), group_out);
  if (group && strcmp(group, group_out) != 0) {
    err = kvc_fail(KVCACHED_E_SLOT, "slot %d of %s was leased for group \"%s\", not \"%s\"", slot, l->path,
                   group_out, group);
    goto drop;
  }
  atomic_store(&s->pending, 0);
  atomic_store(&s->claim, 0);
  atomic_store(&s->reserved, 0);
  atomic_store(&s->user_pid, (uint64_t)l->pid);
  if (atomic_load(&s->name[0]) == 0) put_text(s->name, WORDS(s->name), name);
  l->held[slot] = KVC_HOLD_USER;
  err = KVCACHED_OK;
  goto out;

drop:
  (void)kvc_ledger_file_drop(l->fd, slot, KVC_HOLD_USER);
out:
  (void)pthread_mutex_unlock(&l->mutex);
  return err;
}

void kvc_ledger_set_reserved(kvcached_ledger_t l, int slot, uint64_t bytes) {
  atomic_store(&l->map->slot[slot].reserved, bytes);
}

int kvcached_ledger_lease(kvcached_ledger_t l, const char *group, const char *name, uint64_t size,
                          uint64_t fixed, uint64_t limit, int *out) {
  if (!l || !out) return kvc_fail(KVCACHED_E_INVAL, "%s is NULL", l ? "slot" : "ledger");
  *out = -1;
  if (l->pid != getpid()) return kvc_fail_forked(l->pid);
  size_t group_len = group ? strlen(group) : 0;
  if (group_len == 0 || group_len > KVCACHED_GROUP_MAX)
    return kvc_fail(KVCACHED_E_INVAL, "group: %zu bytes, it has 1 to %d", group_len, KVCACHED_GROUP_MAX);

  (void)pthread_mutex_lock(&l->mutex);
  int slot = -1;
  uint64_t excess;
  int err = kvc_ledger_file_check_path(l->path, l->fd);
  if (!err) err = take_free(l, group, name, &slot);
  if (!err) {
    /* Both holds are kept until the lease stands: an announcement counts only while the user's is held. */
    kvc_ledger_slot *s = &l->map->slot[slot];
    atomic_store(&s->lessor_pid, (uint64_t)l->pid);
    err = kvc_claim_locked(l, slot, KVC_CLAIM_LEASE, size > fixed ? size : fixed, limit, &excess);
    if (!err) atomic_store(&s->fixed, fixed);
    drop_holds(l, slot, err ? KVC_HOLD_BOTH : KVC_HOLD_USER);
    if (!err) *out = slot;
  }
  (void)pthread_mutex_unlock(&l->mutex);
  return err;
}

int kvcached_ledger_unlease(kvcached_ledger_t l, int slot) {
  if (!l) return kvc_fail(KVCACHED_E_INVAL, "ledger is NULL");
  if (l->pid != getpid()) return kvc_fail_forked(l->pid);
  (void)pthread_mutex_lock(&l->mutex);
  int err = KVCACHED_OK;
  if (slot < 0 || slot >= KVC_LEDGER_SLOTS || !(l->held[slot] & KVC_HOLD_LESSOR))
    err = kvc_fail(KVCACHED_E_SLOT, "slot %d of %s is not leased through this handle", slot, l->path);
  else
    drop_holds(l, slot, KVC_HOLD_LESSOR);
  (void)pthread_mutex_unlock(&l->mutex);
  return err;
}

/* What observers see of a slot. 1 live, 0 not, negative on error. */
static int describe(struct kvcached_ledger *l, int slot, kvcached_slot_t *out) {
  const kvc_ledger_slot *s = &l->map->slot[slot];
  kvc_slot_view v;
  int err = kvc_slot_read(l, slot, &v);
  if (err) return err;
  if (!v.holders) return 0;
  *out = (kvcached_slot_t){.slot = slot,
                           .lease = v.lease,
                           .fixed = v.fixed,
                           .claim = v.claim,
                           .charge = kvc_slot_charge(&v, 0),
                           .leased = (v.holders & KVC_HOLD_LESSOR) != 0,
                           .attached = (v.holders & KVC_HOLD_USER) != 0};
  out->pid = (int64_t)atomic_load(out->attached ? &s->user_pid : &s->lessor_pid);
  out->reserved = out->attached ? atomic_load(&s->reserved) : 0;
  memcpy(out->group, v.group, sizeof(out->group));
  get_text(s->name, WORDS(s->name), out->name);
  return 1;
}

int kvcached_ledger_slots(kvcached_ledger_t l, kvcached_slot_t *out, size_t cap, size_t *n) {
  if (!l || !n || (!out && cap))
    return kvc_fail(KVCACHED_E_INVAL, "%s is NULL", !l ? "ledger" : !n ? "n" : "out");
  *n = 0;
  if (l->pid != getpid()) return kvc_fail_forked(l->pid);
  size_t stride = cap ? out[0].struct_size : sizeof(*out);
  if (stride < sizeof(*out))
    return kvc_fail(KVCACHED_E_INVAL, "out[0].struct_size is %zu, a slot has %zu bytes", stride,
                    sizeof(*out));

  (void)pthread_mutex_lock(&l->mutex);
  int err = KVCACHED_OK;
  size_t found = 0;
  for (int i = 0; i < KVC_LEDGER_SLOTS; i++) {
    kvcached_slot_t one;
    int live = describe(l, i, &one);
    if (live < 0) {
      err = live;
      break;
    }
    if (!live) continue;
    if (found < cap) {
      one.struct_size = stride;
      memcpy((char *)out + found * stride, &one, sizeof(one));
    }
    found++;
  }
  *n = found;
  (void)pthread_mutex_unlock(&l->mutex);
  return err;
}
