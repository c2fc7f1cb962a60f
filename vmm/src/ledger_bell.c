/*
 * The bell: one futex word in the file's header that is rung when something has changed that others wait for:
 * a slot began or ceased to want memory, a charge fell, a slot came or went, a limit was set.
 *
 *   bell     rings << 1 | somebody waits
 *
 * Who waits sets the low bit and sleeps on the word; a ring counts on and clears the bit in one step, and
 * makes the one system call only where the bit was set. A waiter that is killed leaves the bit behind, which
 * costs the next ring one call for nobody; one that is stopped holds up nobody. A process that is killed
 * rings nothing: whoever waits for its memory has to look now and then.
 *
 *   wanted   CLOCK_MONOTONIC until which somebody waits for memory. What may be of use to a waiter and
 * happens all the time (a release, the last thread out of the gate) rings only until then.
 */
#include "ledger_impl.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define WANTED_NS UINT64_C(1000000000) /* waiters look more often than that, and say it anew */

/* ---- futexes ---- */

/* Shared ones: the words lie in a file that several processes map. */

void kvc_futex_wake(_Atomic uint32_t *word, int waiters) {
  (void)syscall(SYS_futex, word, FUTEX_WAKE, waiters, NULL, NULL, 0);
}

void kvc_futex_wait(_Atomic uint32_t *word, uint32_t seen, int64_t ns) {
  if (ns <= 0) return;
  struct timespec ts = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
  if (syscall(SYS_futex, word, FUTEX_WAIT, seen, &ts, NULL, 0) == 0) return;
  if (errno == EAGAIN || errno == EINTR || errno == ETIMEDOUT) return;
  (void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL); /* forbidden here: look again and again */
}

/* ---- the bell ---- */

uint32_t kvc_ledger_bell(kvcached_ledger_t l) { return atomic_load(&l->map->bell) >> 1; }

void kvc_ledger_bell_ring(kvcached_ledger_t l) {
  uint32_t word = atomic_load(&l->map->bell);
  while (!atomic_compare_exchange_weak(&l->map->bell, &word, (word & ~UINT32_C(1)) + 2)) {
  }
  if (word & 1) kvc_futex_wake(&l->map->bell, INT_MAX);
}

uint32_t kvc_ledger_bell_wait(kvcached_ledger_t l, uint32_t seen, int64_t ns) {
  const int64_t deadline = kvc_now_ns() + ns;
  for (;;) {
    uint32_t word = atomic_load(&l->map->bell);
    if (word >> 1 != (seen & INT32_MAX)) return word >> 1;
    int64_t left = deadline - kvc_now_ns();
    if (left <= 0) return seen;
    if (!(word & 1) && !atomic_compare_exchange_strong(&l->map->bell, &word, word | 1)) continue;
    kvc_futex_wait(&l->map->bell, word | 1, left);
  }
}

int kvcached_ledger_wait(kvcached_ledger_t l, uint32_t *seen, uint32_t timeout_ms) {
  int err = kvc_check_ledger(l);
  if (err) return err;
  if (!seen) return kvc_fail(KVCACHED_E_INVAL, "seen is NULL");
  *seen = kvc_ledger_bell_wait(l, *seen, (int64_t)timeout_ms * 1000000);
  return KVCACHED_OK;
}

/* ---- memory that somebody waits for ---- */

void kvc_ledger_want(kvcached_ledger_t l, int slot, const kvc_want *want) {
  kvc_ledger_slot *s = &l->map->slot[slot];
  atomic_store(&s->wants_since_ns, want->since_ns);
  int changed = (atomic_exchange(&s->wants, want->bytes) == 0) != (want->bytes == 0);
  atomic_store(&s->parked, want->parked); /* who sees that sees what it wants */
  if (want->bytes > 0) atomic_store(&l->map->wanted, (uint64_t)kvc_now_ns() + WANTED_NS);
  if (changed) kvc_ledger_bell_ring(l);
}

void kvc_ledger_ring_if_wanted(kvcached_ledger_t l, uint64_t now_ns) {
  uint64_t until = atomic_load_explicit(&l->map->wanted, memory_order_relaxed);
  /* A time too far off comes of a damaged file. */
  if (until > now_ns && until - now_ns <= 2 * WANTED_NS) kvc_ledger_bell_ring(l);
}

int kvc_ledger_older_wants(kvcached_ledger_t l, int slot, uint64_t since_ns, uint64_t *bytes) {
  char own[KVCACHED_GROUP_MAX + 1];
  kvc_text_get(l->map->slot[slot].group, KVC_WORDS(l->map->slot[slot].group), own);
  *bytes = 0;
  for (int i = 0; i < KVC_LEDGER_SLOTS; i++) {
    const kvc_ledger_slot *s = &l->map->slot[i];
    uint64_t wants = atomic_load(&s->wants), since = atomic_load(&s->wants_since_ns);
    if (i == slot || wants == 0 || since > since_ns || (since == since_ns && i > slot)) continue;
    kvc_slot_view v;
    if (!kvc_slot_peek(l, i, &v) || strcmp(v.group, own) != 0) continue;
    int err = kvc_slot_confirm(l, i, &v);
    if (err) return err;
    if (v.holders & KVC_HOLD_USER) *bytes = kvc_sat_add(*bytes, wants);
  }
  return KVCACHED_OK;
}
