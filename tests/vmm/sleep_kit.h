/* Regions of all kinds with known content, for the tests of sleep. */
#ifndef SLEEP_KIT_H
#define SLEEP_KIT_H

#include "support.h"

enum { KV = KVCACHED_KIND_BIT(KVCACHED_KV), WEIGHTS = KVCACHED_KIND_BIT(KVCACHED_WEIGHTS) };
enum { SCRATCH = KVCACHED_KIND_BIT(KVCACHED_SCRATCH) };

/* Ensures the first n pages of a region, with a tag of its own in each: tag, tag + 1 ... */
void fill(kvcached_region_t region, size_t n, int tag);
int filled(kvcached_region_t region, size_t n, int tag);

size_t asleep(kvcached_ctx_t ctx);

/* Whether a copy of all that a region holds is there; the helper may be making one. */
int has_copy(kvcached_region_t region);

void enter_and_leave(kvcached_ctx_t ctx);

/* Sleeps, which must work. Returns the bytes given back. */
size_t go_to_sleep(kvcached_ctx_t ctx, unsigned kinds);

/* A context with a region of each kind: twelve pages of KV but two idle ones among them, WEIGHTS of two large
   pages and a short one, one page of SCRATCH. */
typedef struct scene {
  kvcached_ctx_t ctx;
  kvcached_region_t kv, weights, scratch;
  const char *ledger;
  size_t page, large, in_use; /* bytes of a KV page and of a large one, and of what is in use */
} scene;
scene set_up(const kvcached_options_t *options);
scene set_up_in(const char *ledger_name);
int kv_is_there(const scene *s);
int weights_are_there(const scene *s);

#endif
