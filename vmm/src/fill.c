/*
 * Memory under runs of pages: made, and taken again when something on the way fails.
 *
 * Where handles are memory by themselves each page has its own, so that it can be given back by itself;
 * access and unmapping go by runs. Where they are tokens a run has one, which ends with its pages.
 */
#include "context.h"

#include <stdio.h>

kvc_detail kvc_detail_keep(void) {
  kvc_detail d;
  (void)snprintf(d.text, sizeof(d.text), "%s", kvcached_last_error());
  return d;
}

int kvc_detail_again(int err, const kvc_detail *d) { return kvc_fail(err, "%s", d->text); }

int kvc_settle(struct kvcached_ctx *ctx, kvc_lane lane) {
  kvc_detail d = kvc_detail_keep();
  int settled = kvc_call(ctx)->finish(ctx->device, lane) == KVCACHED_OK || kvc_quiesce(ctx) == KVCACHED_OK;
  if (!settled)
    kvc_log(ctx, KVCACHED_LOG_ERROR, "the library's own work cannot be waited for: %s",
            kvcached_last_error());
  (void)kvc_detail_again(KVCACHED_OK, &d);
  return settled;
}

/* Whether the region's pages are of the pool's size. */
static int can_pool(const struct kvcached_region *r) {
  return r->pages.handle && r->unit == r->ctx->device->page_size;
}

/* ---- one run ---- */

void kvc_run_begin(kvc_run *run) {
  struct kvcached_region *r = run->r;
  run->given = run->made = run->mapped = 0;
  run->queued = 0;
  if (!can_pool(r)) return;
  run->given = kvc_pool_take(&r->ctx->pool, &r->pages.handle[run->first], run->n);
  run->made = run->given;
}

/* One token for the whole run. */
static int make_token(kvc_run *run) {
  struct kvcached_region *r = run->r;
  struct kvcached_ctx *ctx = r->ctx;
  size_t off = kvc_off(r, run->first), len = kvc_bytes(r, run->first, run->n);
  kvc_handle token;
  int err = kvc_call(ctx)->create(ctx->device, len, &token);
  if (err) return err;
  err = kvc_call(ctx)->map(ctx->device, &r->space, off, len, token);
  if (err) {
    kvc_detail d = kvc_detail_keep();
    (void)kvc_call(ctx)->destroy(ctx->device, len, token); /* no memory in it: nothing to lose */
    return kvc_detail_again(err, &d);
  }
  run->mapped = run->n;
  return KVCACHED_OK;
}

static int make_handles(kvc_run *run) {
  struct kvcached_region *r = run->r;
  struct kvcached_ctx *ctx = r->ctx;
  for (; run->made < run->n; run->made++) {
    size_t page = run->first + run->made;
    int err = kvc_call(ctx)->create(ctx->device, kvc_bytes(r, page, 1), &r->pages.handle[page]);
    if (err) return err;
  }
  for (; run->mapped < run->n; run->mapped++) {
    size_t page = run->first + run->mapped;
    int err = kvc_call(ctx)->map(ctx->device, &r->space, kvc_off(r, page), kvc_bytes(r, page, 1),
                                 r->pages.handle[page]);
    if (err) return err;
  }
  return KVCACHED_OK;
}

/* Access to a mapped run, and zeros in it unless it has them already. */
static int open_run(kvc_run *run, int recycled) {
  struct kvcached_region *r = run->r;
  struct kvcached_ctx *ctx = r->ctx;
  size_t off = kvc_off(r, run->first), len = kvc_bytes(r, run->first, run->n);
  int err = kvc_call(ctx)->access(ctx->device, &r->space, off, len);
  if (err || !run->zero || (ctx->backend->fresh_is_zero && !recycled)) return err;
  err = kvc_call(ctx)->zero(ctx->device, run->lane, &r->space, off, len);
  if (!err) run->queued = 1;
  return err;
}

int kvc_run_make(kvc_run *run) {
  int err = run->r->pages.handle ? make_handles(run) : make_token(run);
  return err ? err : open_run(run, run->given > 0);
}

int kvc_run_finish(kvc_run *run) {
  struct kvcached_ctx *ctx = run->r->ctx;
  if (!run->queued) return KVCACHED_OK;
  int err = kvc_call(ctx)->finish(ctx->device, run->lane);
  if (!err) run->queued = 0;
  return err;
}

void kvc_run_undo(kvc_run *run, uint8_t from, uint64_t *held) {
  struct kvcached_region *r = run->r;
  struct kvcached_ctx *ctx = r->ctx;
  kvc_detail d = kvc_detail_keep();
  size_t stuck = 0;
  if (run->queued) run->running = !kvc_settle(ctx, run->lane);
  if (run->mapped > 0 &&
      (run->running || kvc_call(ctx)->unmap(ctx->device, &r->space, kvc_off(r, run->first),
                                            kvc_bytes(r, run->first, run->mapped)) != KVCACHED_OK)) {
    stuck = run->mapped;
    kvc_log(ctx, KVCACHED_LOG_WARN, "%zu pages stay mapped for now: %s", stuck, kvcached_last_error());
    *held += kvc_bytes(r, run->first, stuck);
    kvc_pages_set(&r->pages, run->first, stuck, from == KVC_ASLEEP ? KVC_ASLEEP : KVC_IDLE);
    kvc_pages_set_stuck(&r->pages, run->first, stuck);
  }
  kvc_pages_set(&r->pages, run->first + stuck, run->n - stuck, from);
  /* One handle is as good as another: as many go back to the pool as came out of it. */
  size_t back = run->given;
  for (size_t i = stuck; i < run->made; i++) {
    size_t page = run->first + i, size = kvc_bytes(r, page, 1);
    if (back > 0 && kvc_pool_put(&ctx->pool, r->pages.handle[page])) {
      back--;
      *held += size;
    } else if (!kvc_pool_destroy(ctx, size, r->pages.handle[page])) {
      *held += size;
    }
  }
  (void)kvc_detail_again(KVCACHED_OK, &d);
}

/* ---- all runs of a range ---- */

/* Of the `from` pages of some spans: bytes in all and of stuck ones, and how many handles the pool has for
 * them.
 */
typedef struct kvc_need {
  uint64_t all, stuck, pooled;
} kvc_need;

static kvc_need need_of(const struct kvcached_region *r, kvc_spans spans, uint8_t from) {
  kvc_need need = {0};
  size_t fresh = 0, n;
  for (const kvc_span *s = spans.at; s < spans.at + spans.n; s++) {
    for (size_t i = s->first; i < s->end; i += n) {
      n = kvc_pages_run_alike(&r->pages, i, s->end);
      if (r->pages.state[i] != from) continue;
      need.all += kvc_bytes(r, i, n);
      if (r->pages.stuck[i])
        need.stuck += kvc_bytes(r, i, n);
      else
        fresh += n;
    }
  }
  size_t have = can_pool(r) ? r->ctx->pool.n : 0;
  need.pooled = (uint64_t)(fresh < have ? fresh : have) * r->unit; /* can_pool: no page is short */
  return need;
}

uint64_t kvc_without(const struct kvcached_region *r, size_t first, size_t end, uint8_t from) {
  const kvc_span span = {first, end};
  kvc_need need = need_of(r, (kvc_spans){&span, 1}, from);
  return need.all - need.stuck;
}

uint64_t kvc_missing(const struct kvcached_region *r, kvc_spans spans, uint8_t from) {
  kvc_need need = need_of(r, spans, from);
  return need.all - need.stuck - need.pooled;
}

/* Undoes the runs of [first, end): all of them are complete, but stuck ones, which are not this call's.
 *given: bytes of handles from the pool in them, to be given back; which run has them does not matter. */
static void undo_runs(struct kvcached_region *r, size_t first, size_t end, uint8_t from, uint64_t *given,
                      int running, uint64_t *held) {
  size_t n;
  for (size_t i = first; i < end; i += n) {
    n = kvc_pages_run_alike(&r->pages, i, end);
    if (r->pages.state[i] != from || r->pages.stuck[i]) continue;
    kvc_run run = {.r = r, .first = i, .n = n, .mapped = n, .running = running};
    run.made = r->pages.handle ? n : 0;
    size_t back = (size_t)(*given / r->unit);
    run.given = back < n ? back : n;
    *given -= (uint64_t)run.given * r->unit;
    kvc_run_undo(&run, from, held);
  }
}

/* Makes the runs of one span, not yet zeroed. On failure run->first is where it stopped. *given: bytes from
   the pool. */
static int make_runs(kvc_run *run, const kvc_span *span, uint8_t from, uint64_t *given) {
  struct kvcached_region *r = run->r;
  size_t n;
  int err = KVCACHED_OK;
  for (size_t i = span->first; i < span->end; i += n) {
    n = kvc_pages_run_alike(&r->pages, i, span->end);
    if (r->pages.state[i] != from) continue;
    *run = (kvc_run){.r = r, .first = i, .n = n, .lane = KVC_LANE_CALLER};
    if (r->pages.stuck[i]) {
      err = open_run(run, 1);
    } else {
      kvc_run_begin(run);
      err = kvc_run_make(run);
    }
    if (err) return err;
    *given += (uint64_t)run->given * r->unit;
  }
  return KVCACHED_OK;
}

/* Queues zeros for the runs of one span, where they have none already: once all mappings have been made, so
   that none of these waits behind work of the device. */
static int zero_runs(struct kvcached_region *r, const kvc_span *span, uint8_t from, int *queued) {
  struct kvcached_ctx *ctx = r->ctx;
  size_t n;
  for (size_t i = span->first; i < span->end; i += n) {
    n = kvc_pages_run_alike(&r->pages, i, span->end);
    int fresh = !r->pages.handle && !r->pages.stuck[i]; /* a handle may come from the pool */
    if (r->pages.state[i] != from || (fresh && ctx->backend->fresh_is_zero)) continue;
    int err = kvc_call(ctx)->zero(ctx->device, KVC_LANE_CALLER, &r->space, kvc_off(r, i), kvc_bytes(r, i, n));
    if (err) return err;
    *queued = 1;
  }
  return KVCACHED_OK;
}

/* *queued: there is work on the lane that concerns the pages. If `finish` it is waited for, else only after a
   failure. */
static int fill(struct kvcached_region *r, kvc_spans spans, uint8_t from, uint8_t to, int zero, int *queued,
                int finish, const kvc_need *need, uint64_t claimed, uint64_t *kept) {
  struct kvcached_ctx *ctx = r->ctx;
  uint64_t given = 0; /* bytes from the pool */
  int err = KVCACHED_OK;
  const kvc_span *s = spans.at, *end = spans.at + spans.n;
  kvc_run run = {.r = r};
  *kept = 0;
  for (; s < end; s++) {
    err = make_runs(&run, s, from, &given);
    if (err) break;
  }
  for (const kvc_span *z = spans.at; z < end && zero && !err; z++) err = zero_runs(r, z, from, queued);
  if (!err && *queued && finish) {
    err = kvc_call(ctx)->finish(ctx->device, KVC_LANE_CALLER);
    if (!err) *queued = 0;
  }
  if (err) {
    kvc_detail d = kvc_detail_keep();
    uint64_t held = 0, borrowed = given;
    run.running = *queued && !kvc_settle(ctx, KVC_LANE_CALLER);
    run.queued = 0;
    if (s < end) { /* in the middle of it */
      size_t stopped = run.first;
      if (!r->pages.stuck[stopped]) {
        borrowed += (uint64_t)run.given * r->unit;
        kvc_run_undo(&run, from, &held);
      }
      undo_runs(r, s->first, stopped, from, &given, run.running, &held);
    }
    for (; s > spans.at; s--) undo_runs(r, s[-1].first, s[-1].end, from, &given, run.running, &held);
    *kept = held - borrowed; /* what was lent by the pool is claimed already */
    return kvc_detail_again(err, &d);
  }
  for (s = spans.at; s < end; s++) {
    for (size_t i = s->first, n; i < s->end; i += n) {
      n = kvc_pages_run(&r->pages, i, s->end);
      if (r->pages.state[i] == from) kvc_pages_set(&r->pages, i, n, to);
    }
  }
  kvc_unclaim(ctx, claimed + need->stuck + need->pooled - need->all);
  return KVCACHED_OK;
}

int kvc_fill(struct kvcached_region *r, size_t first, size_t end, uint8_t from, uint8_t to, int zero,
             int *queued, uint64_t *kept) {
  const kvc_span span = {first, end};
  kvc_need need = need_of(r, (kvc_spans){&span, 1}, from);
  int zeros = 0; /* what the lane had before is no matter of this call: none of it touches these pages */
  int err = fill(r, (kvc_spans){&span, 1}, from, to, zero, &zeros, 0, &need, need.all - need.stuck, kept);
  if (!err && zeros) *queued = 1;
  return err;
}

int kvc_fill_missing(struct kvcached_region *r, kvc_spans spans, uint8_t from, uint8_t to, int zero,
                     int queued, uint64_t *kept) {
  kvc_need need = need_of(r, spans, from);
  return fill(r, spans, from, to, zero, &queued, 1, &need, need.all - need.stuck - need.pooled, kept);
}

/* ---- taking memory ---- */

/* A run that could not be unmapped may lack access. It gets it back, or no page of it counts as usable. */
static void keep_run(struct kvcached_region *r, size_t first, size_t n, uint8_t to) {
  struct kvcached_ctx *ctx = r->ctx;
  kvc_detail d = kvc_detail_keep();
  if (kvc_call(ctx)->access(ctx->device, &r->space, kvc_off(r, first), kvc_bytes(r, first, n))) {
    kvc_log(ctx, KVCACHED_LOG_WARN, "%zu pages can be neither taken nor used for now: %s", n,
            kvcached_last_error());
    kvc_pages_set(&r->pages, first, n, to == KVC_ASLEEP ? KVC_ASLEEP : KVC_IDLE);
    kvc_pages_set_stuck(&r->pages, first, n);
  }
  (void)kvc_detail_again(KVCACHED_OK, &d);
}

int kvc_empty(struct kvcached_region *r, size_t first, size_t n, uint8_t to, uint64_t to_pool,
              uint64_t *freed) {
  struct kvcached_ctx *ctx = r->ctx;
  size_t len = kvc_bytes(r, first, n);
  *freed = 0;
  int err = kvc_call(ctx)->unmap(ctx->device, &r->space, kvc_off(r, first), len);
  if (err) {
    keep_run(r, first, n, to);
    return err;
  }
  kvc_pages_set(&r->pages, first, n, to);
  if (!r->pages.handle) {
    *freed = len;
    return KVCACHED_OK;
  }
  if (!can_pool(r)) to_pool = 0;
  for (size_t i = first; i < first + n; i++) {
    size_t size = kvc_bytes(r, i, 1);
    if (to_pool >= size && kvc_pool_put(&ctx->pool, r->pages.handle[i]))
      to_pool -= size;
    else if (kvc_pool_destroy(ctx, size, r->pages.handle[i]))
      *freed += size;
  }
  return KVCACHED_OK;
}
