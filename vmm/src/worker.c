/*
 * The helper thread. It does the look-ahead, makes what a later sleep needs, and trims a context that nobody
 * uses. It works in bounded pieces: with the mutex held it chooses one and claims for it, then lets go of the
 * mutex, works, and takes it again to publish. While somebody waits for it, it begins nothing.
 */
#include "context.h"

#include <inttypes.h>
#include <signal.h>
#include <time.h>

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

static struct kvcached_region *next_ahead(const struct kvcached_ctx *ctx) {
  struct kvcached_region *r = ctx->regions;
  while (r && !kvc_is_ahead(r)) r = r->next;
  return r;
}

/* ---- idle time ---- */

#define PAUSE_NS INT64_C(10000000) /* the least time to the next look at a gate that is in use */

void kvc_note_change(struct kvcached_ctx *ctx) {
  if (ctx->options.idle_trim_ms == 0) return;
  ctx->changes++;
  ctx->changed_ns = kvc_now_ns();
  if (ctx->worker_rests && kvc_spare_bytes(ctx) > 0) (void)pthread_cond_signal(&ctx->work_cond);
}

/* Waits for work until a time; stopping is announced with the mutex held, so it is not missed. */
static void wait_until(struct kvcached_ctx *ctx, int64_t ns) {
  struct timespec t = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
  (void)pthread_cond_timedwait(&ctx->work_cond, &ctx->mutex, &t);
}

/* When the context will have been idle for long enough, as far as is known now; -1: there is nothing to give,
   or nothing that the last attempt could take, and a change will be told. */
static int64_t due_ns(struct kvcached_ctx *ctx) {
  int64_t span = (int64_t)ctx->options.idle_trim_ms * 1000000;
  if (span == 0 || ctx->changes == ctx->trim_tried || kvc_spare_bytes(ctx) == 0) return -1;
  if (kvc_gate_inside(&ctx->gate) > 0) return kvc_now_ns() + (span > PAUSE_NS ? span : PAUSE_NS);
  int64_t left = (int64_t)atomic_load_explicit(&ctx->last_inside_ns, memory_order_relaxed);
  return (left > ctx->changed_ns ? left : ctx->changed_ns) + span;
}

static void trim_idle(struct kvcached_ctx *ctx) {
  (void)pthread_mutex_unlock(&ctx->mutex); /* the gate comes first */
  int err = kvc_gate_lock(&ctx->gate, 0);
  (void)pthread_mutex_lock(&ctx->mutex);
  if (err) {
    if (!atomic_load(&ctx->stopping)) wait_until(ctx, kvc_now_ns() + PAUSE_NS);
    return;
  }
  int64_t due = due_ns(ctx);
  if (due >= 0 && due <= kvc_now_ns() && !next_ahead(ctx) && !ctx->sleep_ahead) {
    uint64_t freed = 0;
    err = kvc_quiesce(ctx);
    if (!err) err = kvc_trim(ctx, 0, &freed);
    ctx->trim_tried = ctx->changes;
    kvc_log(ctx, err ? KVCACHED_LOG_WARN : KVCACHED_LOG_DEBUG,
            "unused for %" PRIu32 " ms: %" PRIu64 " idle bytes given back%s%s", ctx->options.idle_trim_ms,
            freed, err ? ", not all: " : "", err ? kvcached_last_error() : "");
  }
  kvc_gate_unlock(&ctx->gate);
}

/* With nothing to do: waits for work, or trims when that is due. */
static void rest(struct kvcached_ctx *ctx) {
  int64_t due = due_ns(ctx);
  if (due < 0) {
    ctx->worker_rests = 1;
    (void)pthread_cond_wait(&ctx->work_cond, &ctx->mutex);
    ctx->worker_rests = 0;
  } else if (due > kvc_now_ns()) {
    wait_until(ctx, due);
  } else {
    trim_idle(ctx);
  }
}

/* ---- what a later sleep needs ---- */

#define QUIET_NS INT64_C(100000000) /* how long nobody was inside before a piece of it is done */

/* When the next piece may be done. Pinning 64 MiB holds the driver for 40 ms, and whoever launches work waits
   for it: not while somebody is at work. */
static int64_t quiet_ns(struct kvcached_ctx *ctx) {
  if (kvc_gate_inside(&ctx->gate) > 0) return kvc_now_ns() + QUIET_NS;
  int64_t left = (int64_t)atomic_load_explicit(&ctx->last_inside_ns, memory_order_relaxed);
  return left == 0 ? 0 : left + QUIET_NS;
}

static void prepare_sleep(struct kvcached_ctx *ctx) {
  int64_t from = quiet_ns(ctx);
  if (from > kvc_now_ns())
    wait_until(ctx, from);
  else if (!kvc_prepare_sleep_step(ctx))
    ctx->sleep_ahead = 0;
}

/* ---- the thread ---- */

static void *worker_body(void *arg) {
  struct kvcached_ctx *ctx = arg;
  kvc_never_park();
  (void)pthread_mutex_lock(&ctx->mutex);
  while (!atomic_load(&ctx->stopping)) {
    struct kvcached_region *r = next_ahead(ctx);
    if (ctx->worker_waiters > 0)
      (void)pthread_cond_wait(&ctx->work_cond, &ctx->mutex);
    else if (r)
      kvc_look_ahead(r);
    else if (!ctx->sleep_ahead)
      rest(ctx);
    else
      prepare_sleep(ctx);
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
  for (struct kvcached_region *r = ctx->regions; r; r = r->next) kvc_forget_ahead(r);
  wait_for(ctx, NULL);
}

int kvc_wait_busy(struct kvcached_ctx *ctx) {
  if (!ctx->worker_region || ctx->worker_region->pages.count[KVC_BUSY] == 0) return 0;
  wait_for(ctx, NULL);
  return 1;
}
