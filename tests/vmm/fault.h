/*
 * The table between the library and its backend in the test build: it makes calls fail or dawdle on purpose,
 * counts and notes them, keeps the account of what is held, and holds the library to what backend.h asks of
 * it: a lane is used by one thread at a time. Any thread may call any function here.
 */
#ifndef FAULT_H
#define FAULT_H

#include <stddef.h>
#include <stdint.h>

typedef enum fault_kind {
  FAULT_OPEN,
  FAULT_RESERVE,
  FAULT_CREATE,
  FAULT_DESTROY,
  FAULT_MAP,
  FAULT_ACCESS,
  FAULT_UNMAP,
  FAULT_ZERO,
  FAULT_READ,
  FAULT_WRITE,
  FAULT_FINISH,
  FAULT_QUIESCE,
  FAULT_HOST_ALLOC,
  FAULT_HOST_FREE,
  FAULT_MEMORY,
  FAULT_KINDS,
  FAULT_ANY = FAULT_KINDS /* a schedule of its own, over calls of all kinds together */
} fault_kind;

/* "map", "host_alloc" ... */
const char *fault_name(fault_kind kind);

/* From now on the nth call (1 = the next) of a kind fails with err, once; nth 0: none does. A failing call
   does nothing, and its detail holds "injected". */
void fault_set(fault_kind kind, unsigned nth, int err);
/* From now on every nth call of a kind fails. */
void fault_every(fault_kind kind, unsigned nth, int err);
/* Every call of a kind first sleeps that long; 0: none does. */
void fault_delay(fault_kind kind, unsigned ms);
/* Ends all schedules and delays. */
void fault_clear(void);

/* Calls of a kind since the program began, failed ones included; and those that were made to fail. */
unsigned fault_calls(fault_kind kind);
unsigned fault_failures(fault_kind kind);

/* A call, and where in a region's addresses (NULL: it has no such place). */
typedef struct fault_call {
  fault_kind kind;
  const void *at;
  size_t len;
} fault_call;
/* From now on calls are noted here, those made to fail too, as long as there is room; NULL: no longer. */
void fault_log(fault_call *calls, unsigned room);
/* How many there were since, with those beyond the room. */
unsigned fault_logged(void);

/* What the library holds of the backend, by the calls it made. */
typedef struct fault_held {
  int64_t devices, spaces, reserved; /* reserved: bytes */
  int64_t handles, handle_bytes;     /* made and not ended; handles: of a backend that pools */
  int64_t mapped;                    /* bytes under addresses */
  int64_t host, host_bytes;          /* pieces of host memory, and their bytes */
} fault_held;
fault_held fault_now(void);

#endif
