/* The ledger's file: its layout, its checks, and the record locks in it. */
#ifndef KVC_LEDGER_FILE_H
#define KVC_LEDGER_FILE_H

#include "error.h"

#include <stdatomic.h>
#include <sys/types.h>

#define KVC_LEDGER_SLOTS 128
#define KVC_LEDGER_MAGIC \
  UINT64_C(0x31524744454c564b) /* "KVLEDGR1" in memory order on little-endian machines */
#define KVC_LEDGER_VERSION 3u

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && sizeof(_Atomic uint64_t) == 8,
               "the ledger needs lock-free 64-bit atomics");
_Static_assert(ATOMIC_INT_LOCK_FREE == 2 && sizeof(_Atomic uint32_t) == 4, "futexes are 32-bit words");

/* The two accounts of a slot: device memory, and host memory for sleeping content. Each has an announcement
   of its own, so that a claim on one never waits for one on the other. */
enum { KVC_DEVICE = 0, KVC_HOST = 1, KVC_ACCOUNTS = 2 };

/* An announced claim. word: age << 2 | state, where a smaller age is older. target: what the slot will be
   charged on this account once the claim stands; it changes only while the state is NONE. */
typedef struct kvc_ledger_ask {
  _Atomic uint64_t word, target;
} kvc_ledger_ask;
enum { KVC_ASK_NONE = 0, KVC_ASK_ANNOUNCED = 1, KVC_ASK_COMMITTING = 2 };

/* How many answers to commands are kept: an asker finds its own although others were answered since. */
#define KVC_LEDGER_ANSWERS 16

/* One process's place. Written by whoever holds one of its locks, read by all. What other processes write
   too, by compare-and-swap alone: an announcement (ANNOUNCED -> NONE), `limit`, `mail`. Everything is atomic,
   so that a reader sees each field whole. `gen` is odd while a taker fills the slot in: it counts for nothing
   then. */
typedef struct kvc_ledger_slot {
  _Atomic uint64_t gen;   /* 0: never used */
  _Atomic uint64_t lease; /* bytes set aside by the lessor */
  _Atomic uint64_t fixed; /* bytes held outside the library */
  _Atomic uint64_t claim; /* bytes of device memory held, or about to be */
  _Atomic uint64_t host;  /* bytes of host memory held, or about to be */
  kvc_ledger_ask ask[KVC_ACCOUNTS];
  _Atomic uint64_t limit; /* of the group: revision << 32 | units of 4096 bytes; 0: never set */
  _Atomic uint64_t user_pid, lessor_pid;
  /* For others to look at. */
  _Atomic uint64_t reserved, kind_bytes[3], idle, pooled, asleep;
  _Atomic uint64_t last_use_ns, woke_ns, inside, queued;
  /* Commands: see ledger_command.c. */
  _Atomic uint64_t controlled;
  _Atomic uint64_t mail, answer[KVC_LEDGER_ANSWERS];
  _Atomic uint32_t doorbell, answered; /* futexes: of the answering side, of the asking side */
  _Atomic uint64_t group[(KVCACHED_GROUP_MAX + 1) / 8]; /* text, zero-filled */
  _Atomic uint64_t name[(KVCACHED_NAME_MAX + 1) / 8];
  /* What its parked calls lack in all and since when (0: nothing), and how many threads wait. */
  _Atomic uint64_t wants, wants_since_ns;
  _Atomic uint64_t context_bytes; /* measured, part of `fixed` */
  _Atomic uint64_t kind_reserved[3], kind_asleep[3];
  _Atomic uint64_t parked;
} kvc_ledger_slot;
_Static_assert(sizeof(kvc_ledger_slot) == 512, "the slot's size is part of the file format");

typedef struct kvc_ledger_map {
  uint64_t magic; /* written last: a file without it is not finished */
  uint32_t version, slots, slot_size, header_size;
  _Atomic uint64_t ticket;     /* the last age drawn */
  _Atomic uint64_t card_limit; /* as a slot's `limit` */
  _Atomic uint64_t wanted;     /* see ledger_bell.c */
  _Atomic uint32_t bell, unused;
  uint8_t spare[4096 - 56];
  kvc_ledger_slot slot[KVC_LEDGER_SLOTS];
} kvc_ledger_map;
_Static_assert(offsetof(kvc_ledger_map, slot) == 4096, "the header's size is part of the file format");

/* Bits of a slot's holds. */
enum { KVC_HOLD_LESSOR = 1, KVC_HOLD_USER = 2, KVC_HOLD_BOTH = 3 };

/* Opens the file at path, creating and filling it in when it is not there, checks it and maps it (not into
   children). E_LEDGER, E_NOMEM. The caller closes *fd and unmaps *map. */
int kvc_ledger_file_open(const char *path, int *fd, kvc_ledger_map **map);

/* Whether path still names the file that fd has open; otherwise a process started now would open another, and
   not find what was written in this one. E_LEDGER. */
int kvc_ledger_file_check_path(const char *path, int fd);

/* Takes or drops holds of a slot for this open file, in one step. Taking: 1 when taken, 0 when another open
   file has one of them, negative on error. Dropping: 0 or negative. */
int kvc_ledger_file_hold(int fd, int slot, int holds);
int kvc_ledger_file_drop(int fd, int slot, int holds);

/* Which holds other open files have on a slot (this one's own do not show): bits, or negative. */
int kvc_ledger_file_holders(int fd, int slot);

#endif
