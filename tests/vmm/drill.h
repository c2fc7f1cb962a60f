/* Makes every function of the backend fail at every place of an operation (drill.c). */
#ifndef DRILL_H
#define DRILL_H

#include "support.h"

enum { KV_PAGES = 16, UNITS = 3 }; /* pages of the KV region, large ones of the WEIGHTS region */

/* The KV region has every kind of run: e = ensured, i = idle, . = unmapped. */
extern const char drill_layout[KV_PAGES + 1];

/* A context with a region of each kind, and what they hold. */
typedef struct scene {
  kvcached_ctx_t ctx;
  kvcached_region_t kv, weights, scratch;
  void *allocated;
  const char *ledger;
  size_t page, large;
  int kv_tag[KV_PAGES], weights_tag[UNITS]; /* what ensured pages hold; -1: not known */
  int scratch_tag;
} scene;

/* One operation. `set` brings the scene to where it can be done; `run` returns an error or KVCACHED_OK. */
typedef struct operation {
  const char *name;
  void (*set)(scene *s);
  int (*run)(scene *s);
  int lookahead;
  uint64_t host_limit;
  int silent; /* 1: tells of no failure; what it could not do is simply not done */
  void (*event)(int event, const struct kvcached_stats *now, void *user);
  int vague; /* 1: tells of a failure, not which */
  enum {
    NOTHING, /* what a failure may leave behind of it */
    LESS_IDLE,
    LESS_HOST,
    SOME_REGIONS /* those before the failure are done, each as a whole */
  } leaves;
} operation;

/* Fails an operation at each of its places, with each error that a backend may return, once and often. */
void drill(const operation *op);

#endif
