/*
 * Making pages usable: what is asleep wakes, what is idle or ready is used, the rest gets memory for which
 * room is made. Everything is worked out anew whenever the mutex was let go of in between.
 */
#include "context.h"

#include <inttypes.h>
#include <string.h>

/* What one call has done so far. */
typedef struct ensuring {
  struct kvcached_region *r;
  kvc_spans spans;
  uint8_t *before; /* of the first span, which is the only one then; or NULL */
  kvc_room room;
  kvc_parking parking;
  int quiet; /* the device has been idle since the mutex was taken */
} ensuring;

static int be_quiet(ensuring *e) {
  if (e->quiet) return KVCACHED_OK;
  int err = kvc_quiesce(e->r->ctx);
  if (!err) e->quiet = 1;
  return err;
}

/* How long a claim may wait for older ones: all waits of a call together are bounded. */
static uint32_t wait_left(ensuring *e) {
  int64_t now = kvc_now_ns(), bound = (int64_t)e->r->ctx->options.room_wait_ms * 1000000;
  if (e->room.deadline_ns == 0) e->room.deadline_ns = now + bound;
  int64_t left = e->room.deadline_ns - now;
  return left > 0 ? (uint32_t)(left / 1000000) : 0;
}

/* ---- room in the own context ---- */

static uint64_t span_bytes(const struct kvcached_region *r, kvc_spans spans, uint8_t state) {
  uint64_t bytes = 0;
  for (size_t k = 0; k < spans.n; k++) {
    size_t end = spans.at[k].end;
    for (size_t i = kvc_pages_find(&r->pages, spans.at[k].first, end, state), n; i < end;
         i = kvc_pages_find(&r->pages, i + n, end, state)) {
      n = kvc_pages_run(&r->pages, i, end);
      bytes += kvc_bytes(r, i, n);
    }
  }
  return bytes;
}

uint64_t kvc_own_use(const struct kvcached_region *r, kvc_spans spans) {
  uint64_t wanted = span_bytes(r, spans, KVC_IDLE) + span_bytes(r, spans, KVC_READY);
  return wanted + span_bytes(r, spans, KVC_UNMAPPED) - kvc_missing(r, spans, KVC_UNMAPPED);
}

/* Memory that could be given up: idle and ready pages but those of the spans, and what of the pool these have
   no use for. */
static uint64_t spare_bytes(const ensuring *e) {
  return kvc_spare_bytes(e->r->ctx) - kvc_own_use(e->r, e->spans);
}

/* Moves idle pages from elsewhere into the pool, out of which the range then takes them: nothing is destroyed
   only to be made again. Returns bytes. */
static uint64_t move_idle(ensuring *e, uint64_t bytes) {
  struct kvcached_region *r = e->r;
  struct kvcached_ctx *ctx = r->ctx;
  size_t page = ctx->device->page_size;
  uint64_t moved = 0;
  static const uint8_t states[] = {KVC_READY, KVC_IDLE};
  if (!r->pages.handle || r->unit != page) return 0;
  for (int s = 0; s < 2; s++) {
    for (struct kvcached_region *q = ctx->regions; q && moved < bytes; q = q->next) {
      if (q->copy.reading) continue; /* the helper reads pages that may have been released meanwhile */
      size_t end = q->unit == page ? q->pages.top : 0, at, n;
      kvc_spans skip = q == r ? e->spans : (kvc_spans){0};
      uint64_t before = moved;
      while (moved < bytes && q->pages.count[states[s]] > 0) {
        size_t max = (size_t)((bytes - moved + page - 1) / page);
        uint64_t freed;
        n = kvc_pages_last(&q->pages, states[s], end, max, skip, &at);
        if (n == 0 || kvc_empty(q, at, n, KVC_UNMAPPED, (uint64_t)n * page, &freed)) break;
        kvc_unclaim(ctx, freed); /* those there was no entry for */
        moved += (uint64_t)n * page;
        end = at;
      }
      if (moved > before) q->counters.trims++;
    }
  }
  return moved;
}

/* Own memory for `bytes` that are missing, of which the range could use `usable` itself. 1: try again. */
static int own_room(ensuring *e, uint64_t bytes, uint64_t usable) {
  struct kvcached_ctx *ctx = e->r->ctx;
  uint64_t got = 0;
  kvc_detail d = kvc_detail_keep();
  if (be_quiet(e)) {
    kvc_log(ctx, KVCACHED_LOG_ERROR, "no idle memory can be taken: %s", kvcached_last_error());
  } else if (bytes <= usable) {
    got = move_idle(e, bytes);
  }
  if (e->quiet && got == 0) got = kvc_give_up_idle(ctx, bytes, e->r, e->spans);
  (void)kvc_detail_again(KVCACHED_OK, &d);
  if (got == 0) return 0;
  kvc_log(ctx, KVCACHED_LOG_DEBUG, "%s; %" PRIu64 " bytes of idle memory used", d.text, got);
  return 1;
}

/* After E_LIMIT or E_NOMEM: 1 when it is worth another try. */
static int find_room(ensuring *e, int err, const kvc_shortage *shortage) {
  struct kvcached_region *r = e->r;
  uint64_t spare = spare_bytes(e), missing = kvc_missing(r, e->spans, KVC_UNMAPPED);
  int others;
  if (kvc_wait_busy(r->ctx)) { /* they are ready now: room that may be had */
    e->quiet = 0;
    return 1;
  }
  if (err == KVCACHED_E_LIMIT) {
    uint64_t most = shortage->group > shortage->card ? shortage->group : shortage->card;
    /* Nobody else's memory helps the group; and nothing is taken that would not be enough. */
    if (shortage->group > spare) return 0;
    others = shortage->card > 0;
    if (spare > 0 && (most <= spare || others)) {
      if (own_room(e, most < spare ? most : spare, missing)) return 1;
    }
  } else {
    others = 1; /* the device itself is full */
    if (spare > 0 && own_room(e, missing < spare ? missing : spare, missing)) return 1;
  }
  if (!others) return 0;
  e->quiet = 0; /* while the mutex is let go of, others launch work */
  e->room.charged = err == KVCACHED_E_LIMIT;
  return kvc_make_room(r->ctx, &e->room);
}

/* ---- the pages themselves ---- */

/* Idle pages that were stuck may lack access. */
static int open_stuck(struct kvcached_region *r, const kvc_span *span) {
  struct kvcached_ctx *ctx = r->ctx;
  size_t n;
  for (size_t i = span->first; i < span->end && r->pages.n_stuck > 0; i += n) {
    n = kvc_pages_run_alike(&r->pages, i, span->end);
    if (r->pages.state[i] != KVC_IDLE || !r->pages.stuck[i]) continue;
    int err = kvc_call(ctx)->access(ctx->device, &r->space, kvc_off(r, i), kvc_bytes(r, i, n));
    if (err) return err;
    kvc_pages_set(&r->pages, i, n, KVC_IDLE); /* no longer stuck */
  }
  return KVCACHED_OK;
}

/* Queues zeros for the idle pages. */
static int zero_idle(struct kvcached_region *r, const kvc_span *span, int *queued) {
  struct kvcached_ctx *ctx = r->ctx;
  size_t n;
  for (size_t i = kvc_pages_find(&r->pages, span->first, span->end, KVC_IDLE); i < span->end;
       i = kvc_pages_find(&r->pages, i + n, span->end, KVC_IDLE)) {
    n = kvc_pages_run(&r->pages, i, span->end);
    int err = kvc_call(ctx)->zero(ctx->device, KVC_LANE_CALLER, &r->space, kvc_off(r, i), kvc_bytes(r, i, n));
    if (err) return err;
    *queued = 1;
  }
  return KVCACHED_OK;
}

/* One try, nothing let go of. */
static int ensure_once(ensuring *e, kvc_shortage *shortage) {
  struct kvcached_region *r = e->r;
  struct kvcached_ctx *ctx = r->ctx;
  const kvc_span *spans = e->spans.at;
  if (e->before) memcpy(e->before, r->pages.state + spans->first, spans->end - spans->first);
  size_t unmapped = 0, idle = 0, count[KVC_STATES];
  for (size_t k = 0; k < e->spans.n; k++) {
    kvc_pages_count(&r->pages, spans[k].first, spans[k].end, count);
    unmapped += count[KVC_UNMAPPED];
    idle += count[KVC_IDLE];
  }
  uint64_t claimed = kvc_missing(r, e->spans, KVC_UNMAPPED), kept = 0;
  int err = KVCACHED_OK, queued = 0;
  if (unmapped > 0 && !ctx->device->edits_anytime) err = be_quiet(e);
  if (!err && claimed > 0) err = kvc_claim(ctx, claimed, wait_left(e), shortage);
  if (err) return err;
  if (idle > 0) {
    for (size_t k = 0; k < e->spans.n && !err; k++) {
      err = open_stuck(r, &spans[k]);
      if (!err) err = zero_idle(r, &spans[k], &queued);
    }
    if (!err && unmapped == 0) {
      err = kvc_call(ctx)->finish(ctx->device, KVC_LANE_CALLER);
      if (!err) queued = 0;
    }
    if (err) goto fail;
  }
  if (unmapped > 0) {
    err = kvc_fill_missing(r, e->spans, KVC_UNMAPPED, KVC_ENSURED, 1, queued, &kept);
    queued = 0; /* it waits for what was queued, also where it fails */
    if (err) goto fail;
  }
  kvc_hostcopy_invalidate(r);
  for (size_t k = 0; k < e->spans.n; k++)
    kvc_pages_set(&r->pages, spans[k].first, spans[k].end - spans[k].first, KVC_ENSURED);
  r->counters.ensures++;
  ctx->counters.ensures++;
  return KVCACHED_OK;

fail:
  if (queued) (void)kvc_settle(ctx, KVC_LANE_CALLER); /* nothing is unmapped here */
  kvc_unclaim(ctx, claimed - kept);
  return err;
}

/* Pressure may have moved more into the pool than it is meant to keep, when the call failed after all. */
static void bound_pool(struct kvcached_ctx *ctx) {
  size_t most = (size_t)(ctx->options.pool_limit / ctx->device->page_size);
  uint64_t freed;
  if (ctx->pool.n <= most) return;
  kvc_detail d = kvc_detail_keep();
  if (kvc_pool_trim(ctx, most, &freed))
    kvc_log(ctx, KVCACHED_LOG_WARN, "the pool stays above its bound: %s", kvcached_last_error());
  (void)kvc_detail_again(KVCACHED_OK, &d);
  if (freed > 0) kvc_event(ctx, KVCACHED_EVENT_TRIMMED);
}

static int all_ensured(const ensuring *e) {
  const kvc_pages *pages = &e->r->pages;
  for (const kvc_span *s = e->spans.at; s < e->spans.at + e->spans.n; s++)
    if (pages->state[s->first] != KVC_ENSURED || kvc_pages_run(pages, s->first, s->end) != s->end - s->first)
      return 0;
  return 1;
}

static int any_busy(const ensuring *e) {
  for (const kvc_span *s = e->spans.at; s < e->spans.at + e->spans.n; s++)
    if (kvc_pages_find(&e->r->pages, s->first, s->end, KVC_BUSY) < s->end) return 1;
  return 0;
}

/* Whether something has to be woken first. Inside the gate everything is awake but after a wait for room. */
static int must_wake(const ensuring *e) {
  const struct kvcached_ctx *ctx = e->r->ctx;
  return kvc_sleeps(e->r) || (e->parking.kinds && atomic_load(&ctx->asleep) > 0);
}

static int ensure_all(ensuring *e) {
  struct kvcached_region *r = e->r;
  struct kvcached_ctx *ctx = r->ctx;
  for (;;) {
    if (must_wake(e)) {
      int err = kvc_wake_for(ctx, &e->parking);
      if (err) return err;
      e->quiet = 0;
      continue;
    }
    if (all_ensured(e)) {
      if (e->before) memset(e->before, KVC_ENSURED, e->spans.at->end - e->spans.at->first);
      return KVCACHED_OK;
    }
    if (ctx->worker_region == r && (r->copy.reading || any_busy(e))) {
      kvc_wait_worker(r);
      e->quiet = 0;
      continue;
    }
    kvc_shortage shortage = {0};
    int err = ensure_once(e, &shortage);
    if ((err == KVCACHED_E_LIMIT || err == KVCACHED_E_NOMEM) && find_room(e, err, &shortage)) continue;
    bound_pool(ctx);
    kvc_publish(ctx);
    if (!err || !kvc_park(ctx, &e->parking, err)) return err;
    e->room = (kvc_room){0};
    e->quiet = 0;
  }
}

static int ensure(ensuring *e) {
  e->parking = (kvc_parking){.region = e->r, .spans = e->spans, .only = e->r};
  int err = ensure_all(e);
  return kvc_park_end(e->r->ctx, &e->parking, err);
}

int kvc_ensure_spans(struct kvcached_region *r, kvc_spans spans) {
  return ensure(&(ensuring){.r = r, .spans = spans});
}

int kvc_ensure(struct kvcached_region *r, size_t first, size_t end) {
  return kvc_ensure_noting(r, first, end, NULL);
}

int kvc_ensure_noting(struct kvcached_region *r, size_t first, size_t end, uint8_t *before) {
  const kvc_span span = {first, end};
  return ensure(&(ensuring){.r = r, .spans = {&span, first < end}, .before = before});
}
