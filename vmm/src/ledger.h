/* What a context does with the ledger; the public functions are those of kvcached.h. */
#ifndef KVC_LEDGER_H
#define KVC_LEDGER_H

#include "error.h"

/* Which part of a slot a claim becomes. HOST counts against the host limit, the others against the device's.
 */
typedef enum kvc_claim_kind {
  KVC_CLAIM_PAGES,
  KVC_CLAIM_FIXED,
  KVC_CLAIM_LEASE,
  KVC_CLAIM_HOST
} kvc_claim_kind;

/* By how many bytes a refused claim would have passed each limit; 0: not that one. */
typedef struct kvc_shortage {
  uint64_t group, card;
} kvc_shortage;

/* a + b, or the largest number there is. */
static inline uint64_t kvc_sat_add(uint64_t a, uint64_t b) { return a > UINT64_MAX - b ? UINT64_MAX : a + b; }

/* Opens the ledger at path. */
int kvc_ledger_open(const char *path, kvcached_ledger_t *out);

/* The context that uses a handle, from then until the handle is closed. */
struct kvcached_ctx;
void kvc_ledger_set_owner(kvcached_ledger_t ledger, struct kvcached_ctx *owner);
/* Those of this process that are `wanted`, which may not block: at most n into out. Returns how many. */
size_t kvc_ledger_owners(int (*wanted)(const struct kvcached_ctx *ctx), struct kvcached_ctx **out, size_t n);

/* Takes a free slot as its user. E_FULL. */
int kvc_ledger_take(kvcached_ledger_t ledger, const char *group, const char *name, int *slot);

/* Takes a leased slot as its user. group may be NULL; the slot's is left in group_out (KVCACHED_GROUP_MAX + 1
   bytes), and what the lease says of memory outside the library in *fixed. E_SLOT. */
int kvc_ledger_attach(kvcached_ledger_t ledger, int slot, const char *group, const char *name,
                      char *group_out, uint64_t *fixed);

/* Adds bytes to a slot this handle uses if the group's charges stay within limit (the group's in the ledger
   goes before it) and all charges within the card's. Waits up to wait_ms for older announcements (0: not at
   all). On E_LIMIT (HOST: E_HOST_LIMIT) *shortage says by how much; for HOST in .group. */
int kvc_ledger_claim(kvcached_ledger_t ledger, int slot, kvc_claim_kind kind, uint64_t bytes, uint64_t limit,
                     uint32_t wait_ms, kvc_shortage *shortage);
/* kind: PAGES, FIXED or HOST. */
void kvc_ledger_unclaim(kvcached_ledger_t ledger, int slot, kvc_claim_kind kind, uint64_t bytes);

/* What was set aside for the slot's user has served its purpose: it is charged for what it holds from now on.
 */
void kvc_ledger_end_lease(kvcached_ledger_t ledger, int slot);

/* Figures that others see of a slot; nothing is decided by them but who is asked first to make room. */
typedef struct kvc_figures {
  uint64_t reserved, kind_bytes[3], kind_reserved[3], kind_asleep[3], idle, pooled, asleep;
} kvc_figures;
void kvc_ledger_publish(kvcached_ledger_t ledger, int slot, const kvc_figures *figures);

/* Marks of use, cheap: a thread went into the gate or out (how many are inside now), the context woke,
 * requests wait. */
void kvc_ledger_mark_inside(kvcached_ledger_t ledger, int slot, uint32_t inside);
void kvc_ledger_mark_woke(kvcached_ledger_t ledger, int slot);
void kvc_ledger_mark_queued(kvcached_ledger_t ledger, int slot, uint32_t requests);
void kvc_ledger_mark_context(kvcached_ledger_t ledger, int slot, uint64_t bytes);
/* Adds to what a slot holds outside the library, within the limits or not. */
void kvc_ledger_add_fixed(kvcached_ledger_t ledger, int slot, uint64_t bytes);

/* Charges and limits as a slot sees them. limit: the caller's own, used while none was set for the group. */
typedef struct kvc_account {
  uint64_t group_limit, group_charge, card_limit, card_charge, host_charge;
  uint64_t lease_left; /* of the slot's own lease, neither claimed nor fixed yet */
  uint64_t held;       /* by the slot itself: fixed + claim */
  int leased;          /* the slot's lessor holds it */
} kvc_account;
int kvc_ledger_account(kvcached_ledger_t ledger, int slot, uint64_t limit, kvc_account *out);

/* Sets the limit of a slot's group at the next revision. */
int kvc_ledger_set_own_limit(kvcached_ledger_t ledger, int slot, uint64_t bytes, kvcached_limit_t *out);

/* ---- commands, on the answering side (control.c) ---- */

/* Says that somebody answers for this slot (on = 1), or no longer. */
void kvc_ledger_control(kvcached_ledger_t ledger, int slot, int on);
/* Waits for a command to this slot: 1 with *command set, 0 when woken by kvc_ledger_ring or after wait_ms. */
int kvc_ledger_next_command(kvcached_ledger_t ledger, int slot, uint32_t wait_ms, int *command);
/* Ends the command taken, with its result. */
void kvc_ledger_answer(kvcached_ledger_t ledger, int slot, int result, uint64_t freed);
/* Wakes the slot's own waiter. */
void kvc_ledger_ring(kvcached_ledger_t ledger, int slot);

/* ---- the bell, and who waits for memory (park.c) ---- */

/* Rings, and how often it was rung; see kvcached_ledger_wait. */
void kvc_ledger_bell_ring(kvcached_ledger_t ledger);
uint32_t kvc_ledger_bell(kvcached_ledger_t ledger);
/* Waits for the bell to have been rung since `seen`, at most for ns. What kvc_ledger_bell says then. */
uint32_t kvc_ledger_bell_wait(kvcached_ledger_t ledger, uint32_t seen, int64_t ns);

/* What a slot's parked calls lack (0: none are parked any more). Rings where that began or ended. */
typedef struct kvc_want {
  uint64_t bytes, since_ns;
  uint32_t parked;
} kvc_want;
void kvc_ledger_want(kvcached_ledger_t ledger, int slot, const kvc_want *want);
/* Rings if somebody waits for memory: for what happens all the time. now_ns: kvc_coarse_ns(). */
void kvc_ledger_ring_if_wanted(kvcached_ledger_t ledger, uint64_t now_ns);
/* What other slots of the group lack that began to wait earlier. */
int kvc_ledger_older_wants(kvcached_ledger_t ledger, int slot, uint64_t since_ns, uint64_t *bytes);

/* ---- making room (room.c) ---- */

/* Picks the slot of another group that should be asked next to make room: attached, controlled, nobody
   inside or parked, no requests queued, not woken within the last 2 s, not in `asked` (bits, KVCACHED slots /
   64 words), with something to give; least recently used first. want_sleep 0: it has idle or pooled memory;
   1: it has any memory. charged 1: a limit is short, so its charge has to fall with that; a trim within its
   lease does not lower it, a sleep ends the lease. -1: none. */
int kvc_ledger_pick_victim(kvcached_ledger_t ledger, int slot, int want_sleep, int charged,
                           const uint64_t *asked);

/* Milliseconds and nanoseconds of CLOCK_MONOTONIC. */
int64_t kvc_now_ns(void);
/* The same of a clock that costs less and may be some milliseconds behind. */
uint64_t kvc_coarse_ns(void);

#endif
