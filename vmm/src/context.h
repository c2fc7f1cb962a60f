/* Contexts and regions, shared by context.c (life, accounts) and region.c (pages). */
#ifndef KVC_CONTEXT_H
#define KVC_CONTEXT_H

#include "backend.h"
#include "ledger.h"
#include "pages.h"

#include <pthread.h>
#include <sys/types.h>

typedef struct kvc_counters {
  uint64_t ensures, releases, trims, limit_failures;
} kvc_counters;

struct kvcached_region {
  struct kvcached_ctx *ctx;
  struct kvcached_region *next; /* older */
  kvc_space space;
  kvc_pages pages;
  kvc_counters counters;
};

struct kvcached_ctx {
  pid_t pid; /* of the process that opened it */
  pthread_mutex_t mutex;
  const kvc_backend *backend;
  size_t page_size;
  uint64_t limit;
  kvcached_ledger_t ledger; /* NULL = none */
  int slot;
  uint64_t fixed; /* charged beside the pages when there is no ledger */
  uint64_t claim; /* bytes claimed: always those mapped, but inside ensure, where it runs ahead */
  uint64_t reserved;
  struct kvcached_region *regions; /* newest first */
  kvc_counters counters;
  void (*log)(int level, const char *msg, void *user);
  void *log_user;
};

void kvc_log(const struct kvcached_ctx *ctx, int level, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* E_FORKED when this process is not the context's own. */
int kvc_check_process(const struct kvcached_ctx *ctx);

/* Adds bytes to the context's claim, within the limit; on E_LIMIT *excess is by how much they pass it. The
 * context's mutex is held. */
int kvc_claim(struct kvcached_ctx *ctx, uint64_t bytes, uint64_t *excess);
void kvc_unclaim(struct kvcached_ctx *ctx, uint64_t bytes);

/* Frees a region, its pages and their claim. The context's mutex is held. */
void kvc_region_free(struct kvcached_region *region);

/* Adds a region's figures to *sum; the context's mutex is held. */
void kvc_region_add_stats(const struct kvcached_region *region, kvcached_stats_t *sum);

/* Fills in what is the context's and copies as much to *out as its struct_size says. */
int kvc_stats_finish(struct kvcached_ctx *ctx, kvcached_stats_t *stats, kvcached_stats_t *out);

#endif
