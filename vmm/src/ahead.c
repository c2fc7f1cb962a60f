/*
 * Look-ahead: pages that prepare asked for are mapped and zeroed before anybody needs them. It works in
 * bounded pieces, on the calling thread or on the helper, which lets go of the mutex while it makes one.
 */
#include "context.h"

#include <inttypes.h>
#include <stdlib.h>

#define PIECE 8 /* pages at a time: about a third of a millisecond of driver calls on a GPU */

/* ---- what was asked for ---- */

void kvc_forget_ahead(struct kvcached_region *r) {
  free(r->ahead.rest);
  r->ahead = (kvc_ahead){0};
}

/* The next span, once this one is worked off. */
static void next_span(kvc_ahead *a) {
  while (a->first >= a->end && a->at < a->n) {
    a->first = a->rest[a->at].first;
    a->end = a->rest[a->at].end;
    a->at++;
  }
}

/* The next piece: at most `most` pages, with their claim; 0 when there is none, or no room, and then nothing
   is asked for any more. */
static int choose(struct kvcached_region *r, size_t most, size_t *first, size_t *n, uint64_t *claimed) {
  struct kvcached_ctx *ctx = r->ctx;
  kvc_ahead *a = &r->ahead;
  kvc_shortage shortage;
  for (;; next_span(a)) {
    if (!kvc_is_ahead(r) || kvc_sleeps(r)) {
      kvc_forget_ahead(r);
      return 0;
    }
    *first = a->first = kvc_pages_find(&r->pages, a->first, a->end, KVC_UNMAPPED);
    if (*first < a->end) break;
  }
  *n = kvc_pages_run(&r->pages, *first, a->end);
  if (*n > most) *n = most;
  const kvc_span span = {*first, *first + *n};
  *claimed = kvc_missing(r, (kvc_spans){&span, 1}, KVC_UNMAPPED);
  if (*claimed > 0 && kvc_claim(ctx, *claimed, 0, &shortage)) {
    kvc_log(ctx, KVCACHED_LOG_DEBUG, "no look-ahead: %s", kvcached_last_error());
    kvc_forget_ahead(r);
    return 0;
  }
  a->first = *first + *n;
  next_span(a);
  return 1;
}

/* ---- one piece ---- */

static size_t piece_of(const struct kvcached_region *r) {
  return r->unit > r->ctx->device->page_size ? 1 : PIECE;
}

/* By the calling thread (lane CALLER); the mutex is held throughout. */
static void prepare_inline(struct kvcached_region *r) {
  struct kvcached_ctx *ctx = r->ctx;
  kvc_detail d = kvc_detail_keep();
  size_t left = piece_of(r), first, n;
  uint64_t claimed, kept;
  int quiet = ctx->device->edits_anytime;
  while (left > 0 && choose(r, left, &first, &n, &claimed)) {
    int err = quiet ? KVCACHED_OK : kvc_quiesce(ctx);
    kept = 0;
    if (!err) {
      quiet = 1;
      const kvc_span span = {first, first + n};
      err = kvc_fill_missing(r, (kvc_spans){&span, 1}, KVC_UNMAPPED, KVC_READY, 1, 0, &kept);
    }
    if (err) {
      kvc_log(ctx, KVCACHED_LOG_WARN, "no look-ahead: %s", kvcached_last_error());
      kvc_unclaim(ctx, claimed - kept);
      break;
    }
    left -= n;
  }
  kvc_forget_ahead(r); /* what is left waits for the next call */
  kvc_publish(ctx);
  (void)kvc_detail_again(KVCACHED_OK, &d);
}

void kvc_look_ahead(struct kvcached_region *r) {
  struct kvcached_ctx *ctx = r->ctx;
  kvc_run run = {.r = r, .lane = KVC_LANE_HELPER, .zero = 1};
  uint64_t claimed;
  if (!choose(r, piece_of(r), &run.first, &run.n, &claimed)) return;
  kvc_run_begin(&run);
  kvc_pages_set(&r->pages, run.first, run.n, KVC_BUSY);
  ctx->worker_region = r;
  (void)pthread_mutex_unlock(&ctx->mutex);
  int err = kvc_run_make(&run);
  if (!err) err = kvc_run_finish(&run);
  (void)pthread_mutex_lock(&ctx->mutex);
  if (err) {
    kvc_log(ctx, KVCACHED_LOG_WARN, "no look-ahead: %s", kvcached_last_error());
    uint64_t held = 0, lent = (uint64_t)run.given * r->unit;
    kvc_run_undo(&run, KVC_UNMAPPED, &held);
    kvc_unclaim(ctx, claimed + lent - held);
    kvc_forget_ahead(r);
  } else {
    kvc_pages_set(&r->pages, run.first, run.n, KVC_READY);
  }
  ctx->worker_region = NULL;
  (void)pthread_cond_broadcast(&ctx->busy_cond);
  kvc_publish(ctx);
}

/* ---- the public face ---- */

/* The pages that a range touches and that are to be mapped; 0: none. */
static int span_of(const struct kvcached_region *r, const kvcached_range_t *range, kvc_span *span) {
  if (range->len == 0) return 0;
  *span = kvc_touched(r, range->off, range->len);
  span->first = kvc_pages_find(&r->pages, span->first, span->end, KVC_UNMAPPED);
  return span->first < span->end;
}

/* Replaces what the region was asked for. The first span needs no memory of its own. */
static int ask(struct kvcached_region *r, const kvcached_range_t *ranges, size_t n) {
  kvc_ahead ahead = {0};
  kvc_span span;
  size_t wanted = 0;
  for (size_t i = 0; i < n && !kvc_sleeps(r); i++) wanted += (size_t)span_of(r, &ranges[i], &span);
  if (wanted > 1) {
    ahead.rest = wanted > SIZE_MAX / sizeof(span) ? NULL : malloc(wanted * sizeof(span));
    if (!ahead.rest) return kvc_fail(KVCACHED_E_NOMEM, "no memory for a request of %zu ranges", wanted);
  }
  for (size_t i = 0; wanted > 0 && i < n; i++) {
    if (!span_of(r, &ranges[i], &span)) continue;
    if (ahead.end > 0) {
      ahead.rest[ahead.n++] = span;
    } else {
      ahead.first = span.first;
      ahead.end = span.end;
    }
  }
  kvc_forget_ahead(r);
  r->ahead = ahead;
  return KVCACHED_OK;
}

int kvcached_prepare_ranges(kvcached_region_t r, const kvcached_range_t *ranges, size_t n) {
  int err = kvc_check_ranges(r, ranges, n);
  if (err) return err;
  struct kvcached_ctx *ctx = r->ctx;
  if (ctx->options.lookahead == KVCACHED_LOOKAHEAD_OFF) return KVCACHED_OK;
  (void)pthread_mutex_lock(&ctx->mutex);
  err = ask(r, ranges, n);
  if (!err && kvc_is_ahead(r)) {
    if (ctx->options.lookahead == KVCACHED_LOOKAHEAD_INLINE) {
      prepare_inline(r);
    } else if (kvc_worker_start(ctx)) {
      /* Nothing is lost by it: the ensure to come does the work. */
      kvc_log(ctx, KVCACHED_LOG_WARN, "no look-ahead: %s", kvcached_last_error());
      kvc_forget_ahead(r);
    } else {
      (void)pthread_cond_signal(&ctx->work_cond);
    }
  }
  (void)pthread_mutex_unlock(&ctx->mutex);
  return err;
}

int kvcached_prepare(kvcached_region_t r, size_t off, size_t len) {
  const kvcached_range_t range = {off, len};
  return kvcached_prepare_ranges(r, &range, 1);
}
