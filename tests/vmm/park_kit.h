/* Processes under one leased group, for the tests of waiting for room. */
#ifndef PARK_KIT_H
#define PARK_KIT_H

#include "ledger_kit.h"

#include <pthread.h>

enum { FULL = 20 }; /* pages that the group may have */

/* A lessor of group "g" with a limit of FULL pages, and children of it. */
typedef struct family {
  const char *path;
  kvcached_ledger_t l;
  size_t page;
  uint32_t seen; /* of the bell */
} family;
family family_start(const char *name);
void family_end(family *f);

typedef struct child {
  peer p;
  int slot;
} child;
/* Its calls wait at most wait_ms. */
child child_of(family *f, uint32_t wait_ms);
void child_end(family *f, child *c);

kvcached_slot_t slot_of(const family *f, child c);
/* Sends a line and waits until a call of it is parked, for that many pages. */
void child_parks(family *f, child c, const char *line, size_t pages);
/* What it answers to a line sent before. */
void child_answers(child c, const char *reply);
/* The slot does as it is told, and says so. */
void tell(family *f, child c, int command);

/* ---- one process ---- */

/* A context on a leased slot, and another of the group that has pages; both of this process. */
typedef struct house {
  const char *path;
  kvcached_ledger_t l;
  size_t page;
  int slot, other_slot;
  kvcached_ctx_t ctx, other;
  kvcached_region_t r, theirs;
} house;
/* The other has `full` pages of FULL. */
house house_build(const char *name, size_t full);
void house_end(house *h);
kvcached_ctx_t house_open(const house *h, int slot);
kvcached_slot_t shown(const house *h);

/* One call on a thread of its own. */
typedef struct call {
  house *h;
  int (*body)(house *h);
  int err;
  char detail[1024];
  pthread_t thread;
} call;
void call_start(call *c, house *h, int (*body)(house *h));
int call_result(call *c);

#endif
