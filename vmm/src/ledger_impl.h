/* Shared by ledger.c and ledger_claim.c alone. */
#ifndef KVC_LEDGER_IMPL_H
#define KVC_LEDGER_IMPL_H

#include "backend.h"
#include "ledger.h"
#include "ledger_file.h"

#include <pthread.h>

struct kvcached_ledger {
  pid_t pid; /* of the process that opened it */
  int fd;
  char *path;
  kvc_ledger_map *map;
  pthread_mutex_t mutex;
  uint8_t held[KVC_LEDGER_SLOTS]; /* this handle's own holds: the kernel does not report them back */
  struct kvcached_ledger *next;
};

/* A slot as read once; all zero when it is not live. */
typedef struct kvc_slot_view {
  int holders;
  uint64_t lease, fixed, claim, pending, ticket;
  char group[KVCACHED_GROUP_MAX + 1];
} kvc_slot_view;

/* What a slot is charged, were `more` bytes claimed on top. */
static inline uint64_t kvc_slot_charge(const kvc_slot_view *v, uint64_t more) {
  uint64_t held = kvc_sat_add(kvc_sat_add(v->fixed, v->claim), more);
  return v->lease > held ? v->lease : held;
}

/* The holds anybody has on a slot: bits, or negative. */
int kvc_slot_holders(struct kvcached_ledger *l, int slot);

int kvc_slot_read(struct kvcached_ledger *l, int slot, kvc_slot_view *v);

/* kvc_ledger_claim with the handle's mutex held. */
int kvc_claim_locked(struct kvcached_ledger *l, int slot, kvc_claim_kind kind, uint64_t bytes, uint64_t limit,
                     uint64_t *excess);

#endif
