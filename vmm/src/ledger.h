/* What a context does with the ledger; the public functions are those of kvcached.h. */
#ifndef KVC_LEDGER_H
#define KVC_LEDGER_H

#include "error.h"

/* Which part of a slot a claim becomes. */
typedef enum kvc_claim_kind { KVC_CLAIM_PAGES, KVC_CLAIM_FIXED, KVC_CLAIM_LEASE } kvc_claim_kind;

/* a + b, or the largest number there is. */
static inline uint64_t kvc_sat_add(uint64_t a, uint64_t b) { return a > UINT64_MAX - b ? UINT64_MAX : a + b; }

/* Opens the ledger of a backend at path (NULL = its default for this user). */
int kvc_ledger_open(const char *path, const char *backend, kvcached_ledger_t *out);

/* Takes a free slot as its user. E_FULL. */
int kvc_ledger_take(kvcached_ledger_t ledger, const char *group, const char *name, int *slot);

/* Takes a leased slot as its user. group may be NULL; the slot's is left in group_out (KVCACHED_GROUP_MAX + 1
 * bytes). E_SLOT. */
int kvc_ledger_attach(kvcached_ledger_t ledger, int slot, const char *group, const char *name,
                      char *group_out);

/* Adds bytes to a slot this handle uses if the group's charges stay within limit. On E_LIMIT *excess is by
   how much they would have passed it. */
int kvc_ledger_claim(kvcached_ledger_t ledger, int slot, kvc_claim_kind kind, uint64_t bytes, uint64_t limit,
                     uint64_t *excess);
void kvc_ledger_unclaim(kvcached_ledger_t ledger, int slot, uint64_t bytes);

void kvc_ledger_set_reserved(kvcached_ledger_t ledger, int slot, uint64_t bytes);

/* Sum of the charges of the live slots of a slot's group. */
int kvc_ledger_group_charge(kvcached_ledger_t ledger, int slot, uint64_t *out);

#endif
