/* Regions: their life, and the public calls on their pages. */
#include "context.h"

#include <inttypes.h>
#include <stdlib.h>

int kvc_check_range(const struct kvcached_region *r, size_t off, size_t len) {
  if (!r) return kvc_fail(KVCACHED_E_INVAL, "region is NULL");
  int err = kvc_check_ctx(r->ctx);
  if (err) return err;
  if (off > r->space.size || len > r->space.size - off)
    return kvc_fail(KVCACHED_E_INVAL, "%zu bytes at %zu: the region has %zu", len, off, r->space.size);
  return KVCACHED_OK;
}

int kvc_check_ranges(const struct kvcached_region *r, const kvcached_range_t *ranges, size_t n) {
  int err = kvc_check_range(r, 0, 0);
  if (!err && n > 0 && !ranges) err = kvc_fail(KVCACHED_E_INVAL, "ranges is NULL, and n is %zu", n);
  for (size_t i = 0; i < n && !err; i++) err = kvc_check_range(r, ranges[i].off, ranges[i].len);
  return err;
}

int kvc_note_limit(struct kvcached_region *r, int err) {
  if (err == KVCACHED_E_LIMIT) {
    r->counters.limit_failures++;
    r->ctx->counters.limit_failures++;
  }
  return err;
}

/* ---- life ---- */

int kvc_reserve(struct kvcached_ctx *ctx, int kind, size_t size, size_t unit, struct kvcached_region **out) {
  size_t page = ctx->device->page_size;
  *out = NULL;
  if (size == 0) return kvc_fail(KVCACHED_E_INVAL, "a region of 0 bytes");
  if (size > SIZE_MAX - page)
    return kvc_fail(KVCACHED_E_NOMEM, "%zu bytes are more than there are addresses", size);
  size = (size + page - 1) / page * page;
  if (unit > size) unit = size;
  struct kvcached_region *r = calloc(1, sizeof(*r));
  if (!r) return kvc_fail(KVCACHED_E_NOMEM, "no memory for a region");
  r->ctx = ctx;
  r->kind = kind;
  r->unit = unit;
  /* The addresses first: a size that cannot be had is reported as that, rather than as the table for its
   * pages. */
  int err = kvc_call(ctx)->reserve(ctx->device, size, page, &r->space);
  if (err) {
    free(r);
    return err;
  }
  size_t n = size / unit + (size % unit != 0);
  if (kvc_pages_init(&r->pages, n, ctx->backend->pools) != 0) {
    ctx->backend->unreserve(ctx->device, &r->space);
    free(r);
    return kvc_fail(KVCACHED_E_NOMEM, "no memory for the states of %zu pages", n);
  }
  (void)pthread_mutex_lock(&ctx->mutex);
  kvc_reap(ctx);
  r->next = ctx->regions;
  ctx->regions = r;
  kvc_publish(ctx);
  (void)pthread_mutex_unlock(&ctx->mutex);
  *out = r;
  return KVCACHED_OK;
}

int kvcached_reserve(kvcached_ctx_t ctx, int kind, size_t size, kvcached_region_t *out) {
  if (!out) return kvc_fail(KVCACHED_E_INVAL, "out is NULL");
  *out = NULL;
  int err = kvc_check_ctx(ctx);
  if (err) return err;
  if (kind < KVCACHED_KV || kind > KVCACHED_SCRATCH)
    return kvc_fail(KVCACHED_E_INVAL, "kind %d: KVCACHED_KV, KVCACHED_WEIGHTS or KVCACHED_SCRATCH", kind);
  const kvc_device *d = ctx->device;
  return kvc_reserve(ctx, kind, size, kind == KVCACHED_KV ? d->page_size : d->large_page, out);
}

static void unlink_region(struct kvcached_region *r) {
  struct kvcached_region **p = &r->ctx->regions;
  while (*p && *p != r) p = &(*p)->next;
  if (*p) *p = r->next;
}

static void end_region(struct kvcached_region *r) {
  struct kvcached_ctx *ctx = r->ctx;
  unlink_region(r);
  kvc_forget_ahead(r);
  kvc_call(ctx)->unreserve(ctx->device, &r->space);
  kvc_pages_free(&r->pages);
  free(r);
}

/* Takes the memory of a run of pages; what cannot be taken is idle after. */
static void take_run(struct kvcached_region *r, size_t first, size_t n, int idle) {
  struct kvcached_ctx *ctx = r->ctx;
  uint64_t freed;
  if (idle && kvc_empty(r, first, n, KVC_UNMAPPED, kvc_pool_room(ctx), &freed) == KVCACHED_OK) {
    kvc_unclaim(ctx, freed);
    return;
  }
  /* Once more, page by page: one that the system cannot split off need not hold the others. */
  size_t left = 0;
  for (size_t i = first; i < first + n; i++) {
    if (idle && kvc_empty(r, i, 1, KVC_UNMAPPED, kvc_pool_room(ctx), &freed) == KVCACHED_OK) {
      kvc_unclaim(ctx, freed);
    } else {
      kvc_pages_set(&r->pages, i, 1, KVC_IDLE);
      kvc_pages_set_stuck(&r->pages, i, 1);
      left++;
    }
  }
  if (left > 0)
    kvc_log(ctx, KVCACHED_LOG_ERROR, "%zu pages of a region that ends stay for a later trim: %s", left,
            kvcached_last_error());
}

static int holds_nothing(const struct kvcached_region *r) { return r->pages.top == 0 && r->copy.n == 0; }

static void free_copy(struct kvcached_region *r) {
  uint64_t freed = 0;
  if (kvc_hostcopy_free(r, &freed))
    kvc_log(r->ctx, KVCACHED_LOG_ERROR, "%zu bytes of host memory of a region that ends stay: %s",
            r->copy.capacity, kvcached_last_error());
}

void kvc_region_free(struct kvcached_region *r, int idle) {
  struct kvcached_ctx *ctx = r->ctx;
  size_t n;
  for (size_t i = 0; i < r->pages.top; i += n) {
    n = kvc_pages_run_alike(&r->pages, i, r->pages.top);
    uint8_t state = r->pages.state[i];
    if (state == KVC_ASLEEP && !r->pages.stuck[i])
      kvc_pages_set(&r->pages, i, n, KVC_UNMAPPED);
    else if (state != KVC_UNMAPPED)
      take_run(r, i, n, idle);
  }
  free_copy(r);
  kvc_forget_ahead(r);
  r->allocated = 0;
  r->reload = NULL;
  if (holds_nothing(r))
    end_region(r);
  else
    r->dead = 1;
  kvc_count_asleep(ctx);
  kvc_publish(ctx);
}

void kvc_reap(struct kvcached_ctx *ctx) {
  for (struct kvcached_region *r = ctx->regions, *next; r; r = next) {
    next = r->next;
    if (!r->dead || r->pages.top > 0) continue;
    free_copy(r); /* its lists too */
    if (holds_nothing(r)) end_region(r);
  }
}

void kvc_region_abandon(struct kvcached_region *r) {
  kvc_log(r->ctx, KVCACHED_LOG_ERROR,
          "%" PRIu64
          " bytes of a region and %zu of host memory are left to the end "
          "of the process",
          kvc_mapped_bytes(r), r->copy.capacity);
  free(r->copy.chunk);
  free(r->copy.run);
  end_region(r);
}

void kvc_unreserve(struct kvcached_region *r) {
  struct kvcached_ctx *ctx = r->ctx;
  kvc_detail d = kvc_detail_keep();
  kvc_forget_ahead(r);
  kvc_wait_worker(r);
  /* Nobody can be told that it failed: so it is tried twice. */
  int idle = r->pages.top == 0 || kvc_quiesce(ctx) == KVCACHED_OK || kvc_quiesce(ctx) == KVCACHED_OK;
  if (!idle) kvc_log(ctx, KVCACHED_LOG_ERROR, "the device does not come to rest: %s", kvcached_last_error());
  kvc_region_free(r, idle);
  (void)kvc_detail_again(KVCACHED_OK, &d);
}

void kvcached_unreserve(kvcached_region_t r) {
  if (!r || kvc_check_ctx(r->ctx)) return;
  struct kvcached_ctx *ctx = r->ctx;
  (void)pthread_mutex_lock(&ctx->mutex);
  kvc_unreserve(r);
  (void)pthread_mutex_unlock(&ctx->mutex);
}

void *kvcached_region_base(kvcached_region_t r) { return r ? r->space.base : NULL; }

size_t kvcached_region_size(kvcached_region_t r) { return r ? r->space.size : 0; }

size_t kvcached_region_page_size(kvcached_region_t r) { return r ? r->unit : 0; }

/* ---- pages ---- */

int kvcached_ensure(kvcached_region_t r, size_t off, size_t len) {
  int err = kvc_check_range(r, off, len);
  if (err || len == 0) return err;
  const kvc_span pages = kvc_touched(r, off, len);
  struct kvcached_ctx *ctx = r->ctx;
  (void)pthread_mutex_lock(&ctx->mutex);
  err = kvc_note_limit(r, kvc_ensure(r, pages.first, pages.end));
  (void)pthread_mutex_unlock(&ctx->mutex);
  return err;
}

static int by_first(const void *a, const void *b) {
  size_t x = ((const kvc_span *)a)->first, y = ((const kvc_span *)b)->first;
  return (x > y) - (x < y);
}

/* The pages that ranges touch, as spans in order. Those that meet are one: its pages are one run. */
static size_t to_spans(const struct kvcached_region *r, const kvcached_range_t *ranges, size_t n,
                       kvc_span *out) {
  size_t count = 0, last = 0;
  for (size_t i = 0; i < n; i++) {
    if (ranges[i].len > 0) out[count++] = kvc_touched(r, ranges[i].off, ranges[i].len);
  }
  if (count == 0) return 0;
  qsort(out, count, sizeof(*out), by_first);
  for (size_t i = 1; i < count; i++) {
    if (out[i].first > out[last].end)
      out[++last] = out[i];
    else if (out[i].end > out[last].end)
      out[last].end = out[i].end;
  }
  return last + 1;
}

int kvcached_ensure_ranges(kvcached_region_t r, const kvcached_range_t *ranges, size_t n) {
  int err = kvc_check_ranges(r, ranges, n);
  if (err) return err;
  kvc_span few[64], *list = n <= sizeof(few) / sizeof(*few) ? few : calloc(n, sizeof(*list));
  if (!list) return kvc_fail(KVCACHED_E_NOMEM, "no memory for %zu ranges", n);
  kvc_spans spans = {list, to_spans(r, ranges, n, list)};
  if (spans.n > 0) {
    struct kvcached_ctx *ctx = r->ctx;
    (void)pthread_mutex_lock(&ctx->mutex);
    err = kvc_note_limit(r, kvc_ensure_spans(r, spans));
    (void)pthread_mutex_unlock(&ctx->mutex);
  }
  if (list != few) free(list);
  return err;
}

/* The released pages of one run of a state; 1 when that changed something. */
static int release_run(struct kvcached_region *r, size_t first, size_t n) {
  switch (r->pages.state[first]) {
    case KVC_ENSURED: kvc_pages_set(&r->pages, first, n, KVC_IDLE); return 1;
    case KVC_ASLEEP: {
      int stuck = r->pages.stuck[first];
      kvc_pages_set(&r->pages, first, n, stuck ? KVC_IDLE : KVC_UNMAPPED);
      if (stuck) kvc_pages_set_stuck(&r->pages, first, n);
      return 1;
    }
    default: return 0;
  }
}

int kvcached_release(kvcached_region_t r, size_t off, size_t len) {
  int err = kvc_check_range(r, off, len);
  if (err) return err;
  struct kvcached_ctx *ctx = r->ctx;
  size_t first = off / r->unit + (off % r->unit != 0), n, changed = 0;
  size_t end = off + len == r->space.size ? r->pages.n : (off + len) / r->unit;
  (void)pthread_mutex_lock(&ctx->mutex);
  if (r->copy.reading) kvc_wait_worker(r);
  int asleep = kvc_sleeps(r);
  for (size_t i = first; i < end; i += n) {
    n = kvc_pages_run_alike(&r->pages, i, end);
    changed += (size_t)release_run(r, i, n);
  }
  if (changed) {
    if (asleep) kvc_count_asleep(ctx);
    if (!kvc_sleeps(r)) {
      kvc_hostcopy_invalidate(r);
      r->copy.zero = 0; /* meant for pages that slept */
    }
    r->counters.releases++;
    ctx->counters.releases++;
    kvc_publish(ctx);
    if (ctx->ledger) kvc_ledger_ring_if_wanted(ctx->ledger, kvc_coarse_ns()); /* a trim would give it */
  }
  (void)pthread_mutex_unlock(&ctx->mutex);
  return KVCACHED_OK;
}

int kvcached_trim(kvcached_ctx_t ctx, size_t keep_bytes, size_t *freed) {
  if (freed) *freed = 0;
  int err = kvc_check_ctx(ctx);
  if (!err) err = kvc_gate_lock(&ctx->gate, ctx->options.room_wait_ms);
  if (err) return err;
  uint64_t got = 0;
  (void)pthread_mutex_lock(&ctx->mutex);
  kvc_wait_all(ctx);
  err = kvc_quiesce(ctx);
  if (!err) err = kvc_trim(ctx, keep_bytes, &got);
  (void)pthread_mutex_unlock(&ctx->mutex);
  kvc_gate_unlock(&ctx->gate);
  if (freed) *freed = (size_t)got;
  return err;
}

int kvcached_mapped_run(kvcached_region_t r, size_t off, size_t len, size_t *run, int *ensured) {
  if (!run || !ensured) return kvc_fail(KVCACHED_E_INVAL, "%s is NULL", run ? "ensured" : "run");
  *run = 0;
  *ensured = 0;
  int err = kvc_check_range(r, off, len);
  if (err || len == 0) return err;
  const kvc_span pages = kvc_touched(r, off, len);
  size_t i = pages.first;
  (void)pthread_mutex_lock(&r->ctx->mutex);
  const uint8_t *s = r->pages.state;
  int is = s[i] == KVC_ENSURED || s[i] == KVC_ASLEEP;
  while (i < pages.end && (s[i] == KVC_ENSURED || s[i] == KVC_ASLEEP) == is)
    i += kvc_pages_run(&r->pages, i, pages.end);
  (void)pthread_mutex_unlock(&r->ctx->mutex);
  *ensured = is;
  *run = i == pages.end ? len : i * r->unit - off;
  return KVCACHED_OK;
}

int kvcached_set_reload(kvcached_region_t r, kvcached_reload_fn reload, void *user) {
  int err = kvc_check_range(r, 0, 0);
  if (err) return err;
  if (r->kind != KVCACHED_WEIGHTS)
    return kvc_fail(KVCACHED_E_INVAL, "a region of kind %d: only one of KVCACHED_WEIGHTS can be reloaded",
                    r->kind);
  (void)pthread_mutex_lock(&r->ctx->mutex);
  r->reload = reload;
  r->reload_user = user;
  (void)pthread_mutex_unlock(&r->ctx->mutex);
  return KVCACHED_OK;
}
