/* Content: copies to and from host memory, clearing; and allocations, which are regions in use as a whole. */
#include "context.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* Where the pages [first, ...) of a range end that begins at off, and how much of them is in the range. */
static size_t part(const struct kvcached_region *r, size_t first, size_t n, size_t off, size_t end,
                   size_t *at) {
  size_t begin = kvc_off(r, first), stop = begin + kvc_bytes(r, first, n);
  *at = begin > off ? begin : off;
  return (stop < end ? stop : end) - *at;
}

/* Ends what was queued, whatever came before: the caller's memory is not to be touched after. *settled: it
   has ended. */
static int finish(struct kvcached_ctx *ctx, int err, int *settled) {
  *settled = 1;
  if (!err) {
    err = kvc_call(ctx)->finish(ctx->device, KVC_LANE_CALLER);
    if (!err) return KVCACHED_OK;
  }
  *settled = kvc_settle(ctx, KVC_LANE_CALLER);
  return err;
}

/* ---- reading ---- */

int kvcached_read(kvcached_region_t r, size_t off, void *dst, size_t len) {
  int err = kvc_check_range(r, off, len);
  if (err || len == 0) return err;
  if (!dst) return kvc_fail(KVCACHED_E_INVAL, "dst is NULL, for %zu bytes", len);
  struct kvcached_ctx *ctx = r->ctx;
  const kvc_span pages = kvc_touched(r, off, len);
  size_t n, at;
  int queued = 0, settled;
  (void)pthread_mutex_lock(&ctx->mutex);
  while (!err && kvc_sleeps(r)) err = kvc_note_limit(r, kvc_wake_region(r));
  for (size_t i = pages.first; i < pages.end && !err; i += n) {
    n = kvc_pages_run(&r->pages, i, pages.end);
    size_t bytes = part(r, i, n, off, off + len, &at);
    char *to = (char *)dst + (at - off);
    if (r->pages.state[i] != KVC_ENSURED) {
      memset(to, 0, bytes);
    } else {
      err = kvc_call(ctx)->read(ctx->device, KVC_LANE_CALLER, &r->space, at, to, bytes);
      queued = 1;
    }
  }
  if (queued) err = finish(ctx, err, &settled);
  (void)pthread_mutex_unlock(&ctx->mutex);
  return err;
}

/* ---- writing ---- */

static int write_now(struct kvcached_region *r, size_t off, const void *src, size_t len, int *settled) {
  struct kvcached_ctx *ctx = r->ctx;
  return finish(ctx, kvc_call(ctx)->write(ctx->device, KVC_LANE_CALLER, &r->space, off, src, len), settled);
}

/* By a reload function, on the thread that wakes the region and has the mutex. */
static int write_reloading(struct kvcached_region *r, size_t off, const void *src, size_t len) {
  const kvc_span pages = kvc_touched(r, off, len);
  if (r->pages.state[pages.first] != KVC_ENSURED ||
      kvc_pages_run(&r->pages, pages.first, pages.end) != pages.end - pages.first)
    return kvc_fail(KVCACHED_E_INVAL,
                    "a reload function wrote %zu bytes at %zu, where not all pages were in use before", len,
                    off);
  int settled;
  return write_now(r, off, src, len, &settled);
}

/* After a write that failed: pages that it was the first to ensure are so no longer. The pool gets back what
   it had, `pooled` bytes. Where the write may still be under way they stay, idle. */
static void unensure(struct kvcached_region *r, kvc_span pages, const uint8_t *before, uint64_t pooled,
                     int settled) {
  struct kvcached_ctx *ctx = r->ctx;
  kvc_detail d = kvc_detail_keep();
  size_t n, changed = 0;
  for (size_t i = pages.first; i < pages.end; i += n) {
    uint8_t was = before[i - pages.first];
    for (n = 1; i + n < pages.end && before[i + n - pages.first] == was;) n++;
    if (was == KVC_ENSURED) continue;
    changed += n;
    uint64_t freed, now = kvc_pool_bytes(ctx), to_pool = pooled > now ? pooled - now : 0;
    if (was == KVC_UNMAPPED && settled && kvc_empty(r, i, n, KVC_UNMAPPED, to_pool, &freed) == KVCACHED_OK)
      kvc_unclaim(ctx, freed);
    else if (r->pages.state[i] == KVC_ENSURED)  /* and not stuck */
      kvc_pages_set(&r->pages, i, n, KVC_IDLE); /* there is something in them now */
  }
  if (changed) {
    r->counters.ensures--;
    ctx->counters.ensures--;
    kvc_publish(ctx);
  }
  (void)kvc_detail_again(KVCACHED_OK, &d);
}

int kvcached_write(kvcached_region_t r, size_t off, const void *src, size_t len) {
  int err = kvc_check_range(r, off, len);
  if (err || len == 0) return err;
  if (!src) return kvc_fail(KVCACHED_E_INVAL, "src is NULL, for %zu bytes", len);
  if (kvc_reloading(r)) return write_reloading(r, off, src, len);
  struct kvcached_ctx *ctx = r->ctx;
  const kvc_span pages = kvc_touched(r, off, len);
  const size_t count = pages.end - pages.first;
  uint8_t few[64], *before = count <= sizeof(few) ? few : malloc(count);
  if (!before) return kvc_fail(KVCACHED_E_NOMEM, "no memory for the states of %zu pages", count);
  (void)pthread_mutex_lock(&ctx->mutex);
  uint64_t pooled = kvc_pool_bytes(ctx);
  /* Waiting for the helper lets go of the mutex: what was ensured may sleep again, or be released. */
  while (!(err = kvc_note_limit(r, kvc_ensure_noting(r, pages.first, pages.end, before))) && r->copy.reading)
    kvc_wait_worker(r);
  if (!err) {
    kvc_hostcopy_invalidate(r);
    int settled;
    err = write_now(r, off, src, len, &settled);
    if (err) unensure(r, pages, before, pooled, settled);
  }
  (void)pthread_mutex_unlock(&ctx->mutex);
  if (before != few) free(before);
  return err;
}

/* ---- clearing ---- */

static int clear_awake(struct kvcached_region *r, size_t off, size_t len) {
  struct kvcached_ctx *ctx = r->ctx;
  const kvc_span pages = kvc_touched(r, off, len);
  size_t n, at;
  int err = KVCACHED_OK, queued = 0, settled;
  for (size_t i = pages.first; i < pages.end && !err; i += n) {
    n = kvc_pages_run(&r->pages, i, pages.end);
    if (r->pages.state[i] != KVC_ENSURED) continue;
    size_t bytes = part(r, i, n, off, off + len, &at);
    err = kvc_call(ctx)->zero(ctx->device, KVC_LANE_CALLER, &r->space, at, bytes);
    queued = 1;
  }
  if (!queued) return err;
  kvc_hostcopy_invalidate(r);
  return finish(ctx, err, &settled);
}

int kvcached_clear(kvcached_region_t r, size_t off, size_t len) {
  int err = kvc_check_range(r, off, len);
  if (err || len == 0) return err;
  struct kvcached_ctx *ctx = r->ctx;
  (void)pthread_mutex_lock(&ctx->mutex);
  if (kvc_sleeps(r) && len == r->space.size && r->pages.count[KVC_ENSURED] == 0) {
    kvc_hostcopy_forget(r);
    kvc_publish(ctx);
  } else {
    for (;;) {
      if (kvc_sleeps(r))
        err = kvc_note_limit(r, kvc_wake_region(r));
      else if (r->copy.reading)
        kvc_wait_worker(r);
      else
        break;
      if (err) break;
    }
    if (!err) err = clear_awake(r, off, len);
  }
  (void)pthread_mutex_unlock(&ctx->mutex);
  return err;
}

/* ---- allocations ---- */

void *kvcached_alloc(kvcached_ctx_t ctx, size_t size) {
  struct kvcached_region *r;
  if (kvc_check_ctx(ctx) || kvc_reserve(ctx, KVCACHED_KV, size, ctx->device->large_page, &r)) return NULL;
  (void)pthread_mutex_lock(&ctx->mutex);
  int err = kvc_note_limit(r, kvc_ensure(r, 0, r->pages.n));
  void *base = NULL;
  if (err) {
    kvc_unreserve(r);
  } else {
    r->allocated = 1;
    base = r->space.base;
  }
  (void)pthread_mutex_unlock(&ctx->mutex);
  return base;
}

void kvcached_free(kvcached_ctx_t ctx, void *ptr) {
  if (!ptr || kvc_check_ctx(ctx)) return;
  (void)pthread_mutex_lock(&ctx->mutex);
  struct kvcached_region *r = ctx->regions;
  while (r && !(r->allocated && r->space.base == ptr)) r = r->next;
  if (r) {
    r->allocated = 0; /* nobody else frees it while the helper is waited for */
    kvc_unreserve(r);
  } else {
    kvc_log(ctx, KVCACHED_LOG_ERROR, "kvcached_free: %p is not an allocation of this context", ptr);
  }
  (void)pthread_mutex_unlock(&ctx->mutex);
}
