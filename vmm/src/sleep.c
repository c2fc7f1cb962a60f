/*
 * Sleep, in two phases. First everything that has to outlive it gets a host copy: whatever fails there, no
 * page has been touched, and the host memory goes back. Then the memory is taken; a page that sleeps has its
 * content safe by then, so what fails there is undone by waking again what slept already, and where even that
 * fails the pages stay asleep and nothing is lost.
 *
 * The caller is alone in the gate and the device is idle, so content stands still from the copy to the end.
 */
#include "context.h"

#include <inttypes.h>

static int has_kind(const struct kvcached_region *r, unsigned kinds) {
  return (kinds & KVCACHED_KIND_BIT(r->kind)) != 0;
}

static int check_kinds(unsigned kinds) {
  if (kinds != 0 && !(kinds & ~KVCACHED_ALL_KINDS)) return KVCACHED_OK;
  return kvc_fail(KVCACHED_E_INVAL, "kinds 0x%x: bits KVCACHED_KIND_BIT of one kind at least", kinds);
}

/* Whether a region has content that would be lost. Where some of its pages sleep already, all of it is in the
   copy they sleep with, or restored by the reload function. */
static int needs_copy(const struct kvcached_region *r) {
  return r->kind != KVCACHED_SCRATCH && r->pages.count[KVC_ENSURED] > 0 && !r->copy.valid && !kvc_sleeps(r);
}

static int can_reload(const struct kvcached_region *r) { return r->kind == KVCACHED_WEIGHTS && r->reload; }

/* ---- the first phase: copies ---- */

/* Host memory for a region's copy, and the list of what goes there. */
static int provide(struct kvcached_region *r, unsigned kinds) {
  size_t need = kvc_hostcopy_need(r);
  int got = 1;
  while (got > 0) {
    got = kvc_hostcopy_grow(r, need);
    /* Copies of others go only for one that cannot do without. */
    if ((got == KVCACHED_E_HOST_LIMIT || got == KVCACHED_E_NOMEM) &&
        kvc_hostcopy_press(r->ctx, kinds, !can_reload(r), KVC_HOST_CHUNK))
      got = 1;
  }
  if (got < 0) return got;
  /* What the helper has copied of WEIGHTS still holds. */
  return r->kind == KVCACHED_WEIGHTS && r->copy.runs > 0 ? KVCACHED_OK : kvc_hostcopy_begin(r);
}

/* The chunks that a failed sleep added go back. */
static void shrink_to_mark(struct kvcached_region *r) {
  uint64_t freed = 0;
  if (r->copy.n > r->copy.mark && kvc_hostcopy_shrink(r, r->copy.mark, &freed))
    kvc_log(r->ctx, KVCACHED_LOG_WARN, "host memory for a sleep that failed stays: %s",
            kvcached_last_error());
}

static int provide_all(struct kvcached_ctx *ctx, unsigned kinds) {
  /* Those that can be reloaded come last: the budget is for the others first. */
  for (int reloadable = 0; reloadable < 2; reloadable++) {
    for (struct kvcached_region *r = ctx->regions; r; r = r->next) {
      if (!has_kind(r, kinds) || !needs_copy(r) || can_reload(r) != reloadable) continue;
      int err = provide(r, kinds);
      if (!err) continue;
      if (!reloadable) {
        kvc_detail d = kvc_detail_keep();
        return kvc_fail(err, "no host copy of %zu bytes of %s, so nothing sleeps: %.800s; raise host_limit%s",
                        kvc_hostcopy_need(r), r->kind == KVCACHED_KV ? "KV" : "weights", d.text,
                        r->kind == KVCACHED_KV ? "" : " or set a reload function");
      }
      kvc_log(ctx, KVCACHED_LOG_INFO, "no host copy of %zu bytes of weights, they will be reloaded: %s",
              kvc_hostcopy_need(r), kvcached_last_error());
      r->copy.uncopied = 1;
      kvc_hostcopy_invalidate(r);
      shrink_to_mark(r);
    }
  }
  return KVCACHED_OK;
}

static int copy_all(struct kvcached_ctx *ctx, unsigned kinds) {
  int err = KVCACHED_OK, queued = 0;
  for (struct kvcached_region *r = ctx->regions; r && !err; r = r->next) {
    if (!has_kind(r, kinds) || !needs_copy(r) || r->copy.uncopied) continue;
    queued = 1;
    err = kvc_hostcopy_read(r, KVC_LANE_CALLER, r->copy.done, r->copy.used);
  }
  if (!queued) return err;
  kvc_detail d = kvc_detail_keep();
  int e =
      kvc_call(ctx)->finish(ctx->device, KVC_LANE_CALLER); /* also after a failure: before chunks are freed */
  if (!err && e) d = kvc_detail_keep();
  if (e && kvc_quiesce(ctx)) /* copies may still arrive there: the chunks are not freed */
    for (struct kvcached_region *r = ctx->regions; r; r = r->next) r->copy.mark = r->copy.n;
  if (err || e) return kvc_detail_again(err ? err : e, &d);
  for (struct kvcached_region *r = ctx->regions; r; r = r->next) {
    if (!has_kind(r, kinds) || !needs_copy(r) || r->copy.uncopied) continue;
    r->copy.done = r->copy.used;
    r->copy.valid = 1;
  }
  return KVCACHED_OK;
}

static void undo_copies(struct kvcached_ctx *ctx, unsigned kinds) {
  for (struct kvcached_region *r = ctx->regions; r; r = r->next) {
    if (!has_kind(r, kinds) || kvc_sleeps(r)) continue;
    if (r->kind == KVCACHED_KV) kvc_hostcopy_invalidate(r);
    shrink_to_mark(r);
  }
}

/* ---- the second phase: memory ---- */

/* Takes all memory of a region: pages in use sleep, others have none. *freed: bytes whose claim is still
   held. */
static int take_memory(struct kvcached_region *r, uint64_t *freed) {
  for (size_t i = 0, n; i < r->pages.top; i += n) {
    n = kvc_pages_run_alike(&r->pages, i, r->pages.top);
    uint8_t state = r->pages.state[i];
    if (state == KVC_UNMAPPED || (state == KVC_ASLEEP && !r->pages.stuck[i])) continue;
    uint64_t got = 0;
    int err =
        kvc_empty(r, i, n, state == KVC_ENSURED || state == KVC_ASLEEP ? KVC_ASLEEP : KVC_UNMAPPED, 0, &got);
    if (err) return err;
    *freed += got;
  }
  return KVCACHED_OK;
}

static int take_all(struct kvcached_ctx *ctx, unsigned kinds, uint64_t *freed) {
  /* Dropped content last: it is the one thing that undoing cannot bring back. */
  for (int scratch = 0; scratch < 2; scratch++) {
    for (struct kvcached_region *r = ctx->regions; r; r = r->next) {
      if (!has_kind(r, kinds) || (r->kind == KVCACHED_SCRATCH) != scratch) continue;
      int err = take_memory(r, freed);
      if (err) return err;
    }
  }
  return KVCACHED_OK;
}

/* Wakes what has just been put to sleep, with the claims that are still held. */
static void undo_memory(struct kvcached_ctx *ctx, unsigned kinds, uint64_t *held) {
  for (struct kvcached_region *r = ctx->regions; r; r = r->next) {
    if (!has_kind(r, kinds) || !kvc_sleeps(r) || r->copy.mixed) continue;
    /* Handles that could not be destroyed have kept their part of the claim. */
    uint64_t need = kvc_without(r, 0, r->pages.top, KVC_ASLEEP), lack = need > *held ? need - *held : 0;
    kvc_shortage shortage;
    int err = lack ? kvc_claim(ctx, lack, 0, &shortage) : KVCACHED_OK;
    if (!err) {
      *held += lack;
      err = kvc_refill(r, held);
    }
    if (err)
      kvc_log(ctx, KVCACHED_LOG_ERROR, "after a sleep that failed %" PRIu64 " bytes stay asleep: %s",
              kvc_state_bytes(r, KVC_ASLEEP), kvcached_last_error());
  }
}

/* ---- both ---- */

static void begin(struct kvcached_ctx *ctx, unsigned kinds) {
  for (struct kvcached_region *r = ctx->regions; r; r = r->next) {
    r->copy.uncopied = 0;
    r->copy.mark = r->copy.n;
    r->copy.mixed = kvc_sleeps(r);
    /* Nothing is mapped ahead for a sleeper. */
    if (has_kind(r, kinds)) kvc_forget_ahead(r);
  }
}

/* Tells of what comes. Work that the event function has launched ends before memory goes. */
static int announce(struct kvcached_ctx *ctx) {
  if (!ctx->options.event) return KVCACHED_OK;
  kvc_event(ctx, KVCACHED_EVENT_SLEEPING);
  return kvc_quiesce(ctx);
}

int kvc_sleep(struct kvcached_ctx *ctx, unsigned kinds, uint64_t *freed) {
  int64_t start = kvc_now_ns();
  uint64_t held = 0, pooled = 0;
  *freed = 0;
  begin(ctx, kinds);
  int err = provide_all(ctx, kinds);
  if (!err) err = copy_all(ctx, kinds);
  int announced = !err;
  if (!err) err = announce(ctx);
  if (!err) {
    err = take_all(ctx, kinds, &held);
    if (err) {
      kvc_detail d = kvc_detail_keep();
      undo_memory(ctx, kinds, &held);
      (void)kvc_detail_again(err, &d);
    }
  }
  if (err) {
    kvc_detail d = kvc_detail_keep();
    undo_copies(ctx, kinds);
    (void)kvc_detail_again(err, &d);
  }
  kvc_unclaim(ctx, held);
  kvc_count_asleep(ctx);
  *freed = held;
  if (!err) {
    if (kvc_pool_trim(ctx, 0, &pooled))
      kvc_log(ctx, KVCACHED_LOG_WARN, "%" PRIu64 " bytes of the pool stay: %s", kvc_pool_bytes(ctx),
              kvcached_last_error());
    *freed += pooled;
    if (*freed > 0) {
      /* A lease is there to load by. Were it still charged, a sleeper would give back nothing below it. */
      if (ctx->ledger) kvc_ledger_end_lease(ctx->ledger, ctx->slot);
      ctx->counters.sleeps++;
      ctx->counters.last_sleep_ns = (uint64_t)(kvc_now_ns() - start);
      for (struct kvcached_region *r = ctx->regions; r; r = r->next) {
        if (!has_kind(r, kinds) || r->copy.mixed || !kvc_sleeps(r)) continue;
        r->counters.sleeps++;
        r->counters.last_sleep_ns = ctx->counters.last_sleep_ns;
      }
      kvc_log(ctx, KVCACHED_LOG_INFO, "asleep in %.1f ms: %" PRIu64 " bytes given back",
              (double)ctx->counters.last_sleep_ns / 1e6, *freed);
    }
  }
  kvc_reap(ctx);
  kvc_publish(ctx);
  if (announced) kvc_event(ctx, err ? KVCACHED_EVENT_WOKE : KVCACHED_EVENT_SLEPT);
  return err;
}

int kvc_sleep_alone(struct kvcached_ctx *ctx, unsigned kinds, uint64_t *freed) {
  *freed = 0;
  kvc_wait_all(ctx);
  uint64_t memory = kvc_pool_bytes(ctx);
  for (const struct kvcached_region *r = ctx->regions; r; r = r->next)
    if (has_kind(r, kinds)) memory += kvc_mapped_bytes(r);
  if (memory == 0) return KVCACHED_OK; /* all of it sleeps, or there is nothing */
  int err = kvc_call(ctx)->quiesce(ctx->device);
  return err ? err : kvc_sleep(ctx, kinds, freed);
}

int kvcached_sleep(kvcached_ctx_t ctx, unsigned kinds, uint32_t wait_ms, size_t *freed) {
  if (freed) *freed = 0;
  int err = kvc_check_ctx(ctx);
  if (!err) err = check_kinds(kinds);
  if (!err) err = kvc_gate_lock(&ctx->gate, wait_ms);
  if (err) return err;
  uint64_t got;
  (void)pthread_mutex_lock(&ctx->mutex);
  err = kvc_sleep_alone(ctx, kinds, &got);
  (void)pthread_mutex_unlock(&ctx->mutex);
  kvc_gate_unlock(&ctx->gate);
  if (freed) *freed = (size_t)got;
  return err;
}

/* ---- preparing it ---- */

int kvcached_prepare_sleep(kvcached_ctx_t ctx, unsigned kinds) {
  int err = kvc_check_ctx(ctx);
  if (!err) err = check_kinds(kinds);
  if (err) return err;
  (void)pthread_mutex_lock(&ctx->mutex);
  err = kvc_worker_start(ctx);
  if (!err) {
    for (struct kvcached_region *r = ctx->regions; r; r = r->next)
      if (has_kind(r, kinds)) r->copy.wanted = 1;
    ctx->sleep_ahead |= kinds;
    (void)pthread_cond_broadcast(&ctx->work_cond);
  }
  (void)pthread_mutex_unlock(&ctx->mutex);
  return err;
}

/* The region whose copy is to be prepared next, in the order in which sleep provides for them. WEIGHTS that
   were made or changed since they were asked for may not be complete, and are not copied. */
static struct kvcached_region *next_to_prepare(const struct kvcached_ctx *ctx) {
  for (int reloadable = 0; reloadable < 2; reloadable++)
    for (struct kvcached_region *r = ctx->regions; r; r = r->next)
      if (has_kind(r, ctx->sleep_ahead) && needs_copy(r) && can_reload(r) == reloadable &&
          (r->kind == KVCACHED_WEIGHTS ? r->copy.wanted : r->copy.capacity < kvc_hostcopy_need(r)))
        return r;
  return NULL;
}

/* One chunk's worth of WEIGHTS. The region stays while the mutex is let go of: whoever is to free, release or
   change it waits for the helper first. */
static int copy_piece(struct kvcached_region *r) {
  struct kvcached_ctx *ctx = r->ctx;
  kvc_hostcopy *c = &r->copy;
  int err = c->runs > 0 ? KVCACHED_OK : kvc_hostcopy_begin(r);
  if (err) return err;
  size_t from = c->done, end = c->used - from > KVC_HOST_CHUNK ? from + KVC_HOST_CHUNK : c->used;
  uint64_t generation = c->generation;
  ctx->worker_region = r;
  c->reading = 1;
  (void)pthread_mutex_unlock(&ctx->mutex);
  err = kvc_hostcopy_read(r, KVC_LANE_HELPER, from, end);
  kvc_detail d = kvc_detail_keep();
  int e = kvc_call(ctx)->finish(ctx->device, KVC_LANE_HELPER);
  if (!err && e) d = kvc_detail_keep();
  if (e) (void)kvc_quiesce(ctx); /* copies may still be under way */
  if (!err) err = e;
  if (err) (void)kvc_detail_again(err, &d);
  (void)pthread_mutex_lock(&ctx->mutex);
  c->reading = 0;
  ctx->worker_region = NULL;
  (void)pthread_cond_broadcast(&ctx->busy_cond);
  if (!err && c->generation == generation) {
    c->done = end;
    c->valid = end == c->used;
  }
  return err;
}

int kvc_prepare_sleep_step(struct kvcached_ctx *ctx) {
  struct kvcached_region *r = ctx->sleep_ahead ? next_to_prepare(ctx) : NULL;
  if (!r) {
    ctx->sleep_ahead = 0;
    return 0;
  }
  int kind = r->kind; /* the region may be gone after */
  int err = kvc_hostcopy_grow_unlocked(r, kvc_hostcopy_need(r));
  if (err == KVCACHED_OK && kind == KVCACHED_WEIGHTS) err = copy_piece(r);
  if (err < 0) {
    kvc_log(ctx, KVCACHED_LOG_WARN, "sleep is prepared no further: %s", kvcached_last_error());
    ctx->sleep_ahead &= ~KVCACHED_KIND_BIT(kind);
  }
  kvc_publish(ctx);
  return ctx->sleep_ahead != 0;
}
