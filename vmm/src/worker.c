/*
 * Look-ahead, and the helper thread that does it. The helper also makes what a later sleep needs. It works in
 * bounded pieces: with the mutex held it chooses one and claims for it, then lets go of the mutex, works, and
 * takes it again to publish. While somebody waits for it, it begins nothing.
 */
#include "context.h"

#include <inttypes.h>
#include <signal.h>

#define PIECE 8 /* pages at a time: about a third of a millisecond of driver calls on a GPU */

int kvc_thread_start(pthread_t *thread, void *(*body)(void *), void *arg, const char *name) {
  sigset_t all, before;
  (void)sigfillset(&all);
  /* A thread inherits the mask: it must not run a moment without it. */
  int e = pthread_sigmask(SIG_SETMASK, &all, &before);
  if (e) return kvc_fail_errno(KVCACHED_E_SYSTEM, e, "blocking signals to start the thread %s", name);
  e = pthread_create(thread, NULL, body, arg);
  (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (e) return kvc_fail_errno(KVCACHED_E_SYSTEM, e, "starting the thread %s", name);
  (void)pthread_setname_np(*thread, name);
  return KVCACHED_OK;
}

/* ---- one piece ---- */

static void forget(struct kvcached_region *r) { r->ahead_first = r->ahead_end = 0; }

/* The next piece of what was asked for: at most `most` pages, with their claim; 0 when there is none, or no
   room. */
static int choose(struct kvcached_region *r, size_t most, size_t *first, size_t *n, uint64_t *claimed) {
  struct kvcached_ctx *ctx = r->ctx;
  size_t end = r->ahead_end;
  *first = kvc_sleeps(r) ? end : kvc_pages_find(&r->pages, r->ahead_first, end, KVC_UNMAPPED);
  if (*first >= end) {
    forget(r);
    return 0;
  }
  *n = kvc_pages_run(&r->pages, *first, end);
  if (*n > most) *n = most;
  *claimed = kvc_missing(r, *first, *first + *n, KVC_UNMAPPED);
  kvc_shortage shortage;
  if (*claimed > 0 && kvc_claim(ctx, *claimed, 0, &shortage)) {
    kvc_log(ctx, KVCACHED_LOG_DEBUG, "no look-ahead: %s", kvcached_last_error());
    forget(r);
    return 0;
  }
  r->ahead_first = *first + *n;
  return 1;
}

static size_t piece_of(const struct kvcached_region *r) {
  return r->unit > r->ctx->device->page_size ? 1 : PIECE;
}

void kvc_prepare_inline(struct kvcached_region *r) {
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
      err = kvc_fill_missing(r, first, first + n, KVC_UNMAPPED, KVC_READY, 1, 0, &kept);
    }
    if (err) {
      kvc_log(ctx, KVCACHED_LOG_WARN, "no look-ahead: %s", kvcached_last_error());
      kvc_unclaim(ctx, claimed - kept);
      break;
    }
    left -= n;
  }
  forget(r); /* what is left waits for the next call */
  kvc_publish(ctx);
  (void)kvc_detail_again(KVCACHED_OK, &d);
}

/* The helper's: the same with the mutex let go of. */
static void look_ahead(struct kvcached_region *r) {
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
    forget(r);
  } else {
    kvc_pages_set(&r->pages, run.first, run.n, KVC_READY);
  }
  ctx->worker_region = NULL;
  (void)pthread_cond_broadcast(&ctx->busy_cond);
  kvc_publish(ctx);
}

/* ---- the thread ---- */

static struct kvcached_region *next_ahead(const struct kvcached_ctx *ctx) {
  struct kvcached_region *r = ctx->regions;
  while (r && r->ahead_first >= r->ahead_end) r = r->next;
  return r;
}

static void *worker_body(void *arg) {
  struct kvcached_ctx *ctx = arg;
  (void)pthread_mutex_lock(&ctx->mutex);
  while (!atomic_load(&ctx->stopping)) {
    struct kvcached_region *r = next_ahead(ctx);
    if (ctx->worker_waiters > 0 || (!r && !ctx->sleep_ahead))
      (void)pthread_cond_wait(&ctx->work_cond, &ctx->mutex); /* stopping is announced with the mutex held */
    else if (r)
      look_ahead(r);
    else if (!kvc_prepare_sleep_step(ctx))
      ctx->sleep_ahead = 0;
  }
  (void)pthread_mutex_unlock(&ctx->mutex);
  return NULL;
}

int kvc_worker_start(struct kvcached_ctx *ctx) {
  if (ctx->worker_runs) return KVCACHED_OK;
  if (atomic_load(&ctx->stopping)) return kvc_fail(KVCACHED_E_INVAL, "the context is being shut down");
  int err = kvc_thread_start(&ctx->worker, worker_body, ctx, "kvc-helper");
  if (!err) ctx->worker_runs = 1;
  return err;
}

/* ---- waiting for it ---- */

static void wait_for(struct kvcached_ctx *ctx, const struct kvcached_region *r) {
  if (!ctx->worker_region || (r && ctx->worker_region != r)) return;
  ctx->worker_waiters++;
  do (void)pthread_cond_wait(&ctx->busy_cond, &ctx->mutex);
  while (ctx->worker_region && (!r || ctx->worker_region == r));
  if (--ctx->worker_waiters == 0) (void)pthread_cond_broadcast(&ctx->work_cond);
}

void kvc_wait_worker(struct kvcached_region *r) { wait_for(r->ctx, r); }

void kvc_wait_all(struct kvcached_ctx *ctx) {
  for (struct kvcached_region *r = ctx->regions; r; r = r->next) forget(r);
  wait_for(ctx, NULL);
}

int kvc_wait_busy(struct kvcached_ctx *ctx) {
  if (!ctx->worker_region || ctx->worker_region->pages.count[KVC_BUSY] == 0) return 0;
  wait_for(ctx, NULL);
  return 1;
}
