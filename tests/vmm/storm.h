/* What the processes of a storm (test_storm.c) share: an account of memory that knows nothing of the ledger.
 */
#ifndef STORM_H
#define STORM_H

#include <stdatomic.h>
#include <stdint.h>

#include "kvcached.h"

enum { STORM_PEERS = 8, STORM_PAGES = 24 };
enum { EVEN, ODD, CARD_TOTAL, TOTALS }; /* peer i is of group i % 2 */

/* `total` is what peers hold together while they are inside their gates, raised after memory was had and
   lowered before it is let go: so it never passes what is really held, and what is held must never pass the
   limit. `mine` is one peer's part of them. */
typedef struct storm {
  _Atomic int64_t total[TOTALS];
  _Atomic int64_t mine[STORM_PEERS];
  _Atomic int changing[STORM_PEERS];   /* in the middle of changing both */
  _Atomic uint64_t limit[TOTALS];      /* raised before it is raised in the ledger, lowered after */
  _Atomic uint64_t limit_no;           /* odd while one is being changed */
  _Atomic uint32_t stops[STORM_PEERS]; /* how often a peer was stopped: its clock went on meanwhile */
  _Atomic int ends;                    /* all peers end */
  _Atomic uint32_t checked;            /* how often totals were looked at */
  _Atomic uint32_t over;               /* how often one passed its limit */
  _Atomic uint32_t slow_ms;            /* the longest call */
  _Atomic uint32_t steps, refused;
} storm;

static inline void storm_add(storm *s, int who, int64_t bytes) {
  atomic_fetch_add(&s->total[who % 2], bytes);
  atomic_fetch_add(&s->total[CARD_TOTAL], bytes);
}

/* One of these processes (storm.c): works at random, on a region of STORM_PAGES pages at least, until `ends`,
   and then prints "ok". Only what a limit or a busy gate explains may fail. `path`: the file of the account.
 */
void storm_peer(kvcached_ctx_t ctx, kvcached_region_t region, const char *path, int me, uint32_t seed);

#endif
