/* Physical pages without an address, kept for reuse: KV pages of backends whose handles are memory by
   themselves. Their content is whatever was in them. The context's mutex guards it. */
#ifndef KVC_POOL_H
#define KVC_POOL_H

#include "backend.h"

struct kvcached_ctx;

/* A handle of any size that could not be destroyed when it should have been. */
typedef struct kvc_orphan {
  kvc_handle handle;
  size_t size;
} kvc_orphan;

typedef struct kvc_pool {
  kvc_handle *handle; /* a stack: the last one in is the first one out */
  size_t n, capacity;
  kvc_orphan *orphan; /* destroyed whenever the pool is trimmed */
  size_t orphans, orphan_capacity;
  uint64_t orphan_bytes; /* those included that there was no memory to note: they stay claimed for good */
} kvc_pool;

/* Puts a handle of one KV page in; 0 when there is no memory for the entry (the caller destroys it then). */
int kvc_pool_put(kvc_pool *pool, kvc_handle handle);
/* Takes up to n out, those put in last, and returns how many. They keep the order they were put in: memory
   that lay in a row does so again. */
size_t kvc_pool_take(kvc_pool *pool, kvc_handle *out, size_t n);
/* Ends a handle whose claim the caller holds: 1 when it was destroyed, 0 when it became an orphan, which
   keeps the claim. */
int kvc_pool_destroy(struct kvcached_ctx *ctx, size_t size, kvc_handle handle);
/* Destroys orphans, and handles until at most keep of them remain, and drops their claim. *freed: bytes. On
   failure the rest stays. */
int kvc_pool_trim(struct kvcached_ctx *ctx, size_t keep, uint64_t *freed);
/* Frees the lists. */
void kvc_pool_free(kvc_pool *pool);

#endif
