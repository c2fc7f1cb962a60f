/* Shared by the sources of the ledger alone. */
#ifndef KVC_LEDGER_IMPL_H
#define KVC_LEDGER_IMPL_H

#include "ledger.h"
#include "ledger_file.h"

#include <pthread.h>

struct kvcached_ledger {
  pid_t pid; /* of the process that opened it */
  int fd;
  char *path;
  kvc_ledger_map *map;
  pthread_mutex_t mutex;                  /* of taking and dropping holds */
  _Atomic uint8_t held[KVC_LEDGER_SLOTS]; /* this handle's own holds: the kernel does not report them back */
  _Atomic uint32_t rung;                  /* kvc_ledger_ring was called and not noticed yet */
  _Atomic uint64_t taken;                 /* the mailbox's word of the command being carried out */
  struct kvcached_ctx *owner;             /* NULL: opened to look, lease or command */
  struct kvcached_ledger *next;
};

#define KVC_WORDS(array) (sizeof(array) / sizeof((array)[0]))

/* ---- slots: ledger.c ---- */

/* A slot as read once; all zero when it is not live. */
typedef struct kvc_slot_view {
  int holders;
  uint64_t gen, lease, fixed, claim, host, limit;
  uint64_t word[KVC_ACCOUNTS], target[KVC_ACCOUNTS];
  char group[KVCACHED_GROUP_MAX + 1];
} kvc_slot_view;

/* What a slot is charged, were `more` bytes claimed on top. */
static inline uint64_t kvc_slot_charge(const kvc_slot_view *v, uint64_t more) {
  uint64_t held = kvc_sat_add(kvc_sat_add(v->fixed, v->claim), more);
  return v->lease > held ? v->lease : held;
}

/* Text of a slot, with an end whatever the file holds. out: 8 * words bytes. */
void kvc_text_get(const _Atomic uint64_t *words, size_t n, char *out);

/* Reads a slot's fields without asking whether it is live; 0 where it was never used or is being filled in.
   What it says may count only after kvc_slot_confirm, which asks. */
int kvc_slot_peek(struct kvcached_ledger *l, int slot, kvc_slot_view *v);
int kvc_slot_confirm(struct kvcached_ledger *l, int slot, kvc_slot_view *v);
/* Both. */
int kvc_slot_read(struct kvcached_ledger *l, int slot, kvc_slot_view *v);

/* E_INVAL, E_FORKED: of a handle given by a caller. E_SLOT: no such number. E_INVAL: not a group id. */
int kvc_check_ledger(const struct kvcached_ledger *l);
int kvc_check_slot(const struct kvcached_ledger *l, int slot);
int kvc_check_group(const char *group);

/* ---- sums: ledger_claim.c ---- */

/* charged: what stands. older, younger: what is announced beside it, by age. slots: how many of them. */
typedef struct kvc_sum {
  uint64_t charged, older, younger;
  int slots;
} kvc_sum;

typedef struct kvc_sums {
  kvc_sum group, card;
  uint64_t word; /* the group's limit in force */
} kvc_sums;

/* Sums an account over the live slots, but `except` (-1: none): of a group (NULL: of none), and of all if
   `card`. ticket: the age that tells older from younger. */
int kvc_sum_slots(struct kvcached_ledger *l, int account, const char *group, int except, uint64_t ticket,
                  int card, kvc_sums *out);

/* Withdraws announcements on behalf of the slots that made them, but `except`: of a group (NULL: of all), of
   an age above `ticket` (0: of all). Their claimers notice, and announce again. */
void kvc_withdraw_others(struct kvcached_ledger *l, int account, const char *group, int except,
                         uint64_t ticket);

/* ---- limit words: ledger_limit.c ---- */

/* Bytes of a limit word; own: what holds where none was set. */
uint64_t kvc_limit_bytes(uint64_t word, uint64_t own);
/* Whether a goes before b: the higher revision, of two equal ones the smaller limit. */
int kvc_limit_beats(uint64_t a, uint64_t b);
/* Gives a slot the word unless it has a better one. */
void kvc_limit_raise(kvc_ledger_slot *s, uint64_t word);
/* Gives a slot that has just become live its group's limit. */
int kvc_limit_join(struct kvcached_ledger *l, int slot, const char *group);

/* ---- futexes: ledger_bell.c ---- */

void kvc_futex_wake(_Atomic uint32_t *word, int waiters);
/* Until the word no longer shows `seen`, or for ns; may end early. */
void kvc_futex_wait(_Atomic uint32_t *word, uint32_t seen, int64_t ns);

/* ---- commands: ledger_command.c ---- */

/* Empties a slot's mailbox, for its new user; commands to the last one are noticed to be lost. */
void kvc_mail_reset(kvc_ledger_slot *s);
/* Leaves a command without waiting. E_SLOT, E_BUSY. */
int kvc_command_leave(struct kvcached_ledger *l, int slot, int command);

/* Notes that a slot's process uses its memory now. */
void kvc_slot_mark_used(kvc_ledger_slot *s);

#endif
