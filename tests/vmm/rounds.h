/* One of several processes that take turns under a limit (test_park_storm.c). */
#ifndef ROUNDS_H
#define ROUNDS_H

#include "kvcached.h"

#include <stdint.h>

enum { ROUNDS_PAGES = 10 }; /* the most that one has in use */

/* Works `n` rounds: enters the gate, twice in some, looks at what it left there the last time, grows by some
   pages and fills them, drops some, and leaves. No call may fail. Then prints "ok". */
void rounds_peer(kvcached_ctx_t ctx, kvcached_region_t region, unsigned n, uint32_t seed);

#endif
