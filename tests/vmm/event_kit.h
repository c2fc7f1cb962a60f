/* For the tests of events: a function that writes down what it hears, and checks what it was promised. */
#ifndef EVENT_KIT_H
#define EVENT_KIT_H

#include "support.h"

#include <stdatomic.h>

enum { HEARD_MAX = 256 };

typedef struct hearing {
  atomic_uint n; /* how many came; those beyond HEARD_MAX are only counted */
  int event[HEARD_MAX];
  kvcached_stats_t now[HEARD_MAX];
  unsigned plain;     /* counted without a lock: the context's own has to do */
  int refuse_calls;   /* calls the library from in there, which must refuse */
  kvcached_ctx_t ctx; /* once it is known */
  void (*also)(struct hearing *heard, int event);
} hearing;

/* Has a context tell it. */
void hear(hearing *heard, kvcached_options_t *options);

/* Waits for n events in all, which must be these letters, one for each since the last call: S = sleeping, s =
   slept, w = woke, t = trimmed. */
void expect_events(hearing *heard, const char *letters);

/* The figures of the last event of a kind. */
kvcached_stats_t last_heard(const hearing *heard, int event);

#endif
