/* The pool of handles, and those that nobody wants but the driver would not end. */
#include "context.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* Room for one entry more in a list of entries of `size` bytes; 0 when there is no memory. */
static int grow(void **list, size_t n, size_t *capacity, size_t size) {
  if (n < *capacity) return 1;
  size_t more = *capacity ? *capacity * 2 : 32;
  void *p = realloc(*list, more * size);
  if (!p) return 0;
  *list = p;
  *capacity = more;
  return 1;
}

int kvc_pool_put(kvc_pool *pool, kvc_handle handle) {
  void *list = pool->handle;
  int ok = grow(&list, pool->n, &pool->capacity, sizeof(*pool->handle));
  pool->handle = list;
  if (ok) pool->handle[pool->n++] = handle;
  return ok;
}

size_t kvc_pool_take(kvc_pool *pool, kvc_handle *out, size_t n) {
  size_t got = n < pool->n ? n : pool->n;
  if (got == 0) return 0;
  pool->n -= got;
  memcpy(out, pool->handle + pool->n, got * sizeof(*out));
  return got;
}

int kvc_pool_destroy(struct kvcached_ctx *ctx, size_t size, kvc_handle handle) {
  if (kvc_call(ctx)->destroy(ctx->device, size, handle) == KVCACHED_OK) return 1;
  kvc_pool *pool = &ctx->pool;
  kvc_log(ctx, KVCACHED_LOG_WARN, "%zu bytes stay claimed until they can be given back: %s", size,
          kvcached_last_error());
  void *list = pool->orphan;
  int ok = grow(&list, pool->orphans, &pool->orphan_capacity, sizeof(*pool->orphan));
  pool->orphan = list;
  if (ok) pool->orphan[pool->orphans++] = (kvc_orphan){.handle = handle, .size = size};
  pool->orphan_bytes += size;
  return 0;
}

int kvc_pool_trim(struct kvcached_ctx *ctx, size_t keep, uint64_t *freed) {
  kvc_pool *pool = &ctx->pool;
  size_t page = ctx->device->page_size;
  int err = KVCACHED_OK;
  *freed = 0;
  while (pool->orphans > 0 && !err) {
    kvc_orphan last = pool->orphan[pool->orphans - 1];
    err = kvc_call(ctx)->destroy(ctx->device, last.size, last.handle);
    if (err) break;
    pool->orphans--;
    pool->orphan_bytes -= last.size;
    *freed += last.size;
  }
  while (pool->n > keep && !err) {
    err = kvc_call(ctx)->destroy(ctx->device, page, pool->handle[pool->n - 1]);
    if (err) break;
    pool->n--;
    *freed += page;
  }
  kvc_unclaim(ctx, *freed);
  return err;
}

void kvc_pool_free(kvc_pool *pool) {
  free(pool->handle);
  free(pool->orphan);
  memset(pool, 0, sizeof(*pool));
}

uint64_t kvc_pool_room(const struct kvcached_ctx *ctx) {
  uint64_t held = (uint64_t)ctx->pool.n * ctx->device->page_size, bound = ctx->options.pool_limit;
  return ctx->backend->pools && held < bound ? bound - held : 0;
}

uint64_t kvc_pool_bytes(const struct kvcached_ctx *ctx) {
  return (uint64_t)ctx->pool.n * ctx->device->page_size + ctx->pool.orphan_bytes;
}
