/*
 * Waking: memory under sleeping pages again, and their content. Copies of one batch run on the bus while the
 * next batch is made and mapped, and only the end of a region is waited for.
 *
 * While a page has memory and lacks its content it is WAKING. That lasts no longer than the mutex is held, so
 * nobody sees it; a wake that fails makes the page ASLEEP again, and the content is still where it was.
 */
#include "context.h"

#include <inttypes.h>

/* Bytes mapped at a time: little enough that the bus starts early, much enough that it never runs dry. */
#define BATCH ((size_t)64 << 20)

/* ---- reload functions ---- */

/* One wakes with the mutex held, and calls kvcached_write from in there. */
static _Thread_local struct kvcached_region *reloading_region;

int kvc_reloading(const struct kvcached_region *r) { return r && reloading_region == r; }

int kvc_in_reload(void) { return reloading_region != NULL; }

static int call_reload(struct kvcached_region *r) {
  struct kvcached_region *outer =
      reloading_region; /* of another context, whose reload function woke this one */
  reloading_region = r;
  int rc = r->reload(r, r->reload_user);
  reloading_region = outer;
  if (rc == 0) return KVCACHED_OK;
  return kvc_fail(KVCACHED_E_RELOAD,
                  "the reload function returned %d for a region of %zu bytes, %" PRIu64
                  " of them in use: it stays asleep, waking it again calls the function again",
                  rc, r->space.size, kvc_state_bytes(r, KVC_ENSURED));
}

/* ---- one region ---- */

void kvc_count_asleep(struct kvcached_ctx *ctx) {
  size_t n = 0;
  for (struct kvcached_region *r = ctx->regions; r; r = r->next) {
    n += r->pages.count[KVC_ASLEEP];
    if (kvc_sleeps(r)) continue;
    /* However it came to be awake: how it was to wake says nothing of its next sleep, and what KV pages hold
       may change from now on. */
    r->copy.zero = 0;
    if (r->kind == KVCACHED_KV && r->copy.valid) kvc_hostcopy_invalidate(r);
  }
  atomic_store(&ctx->asleep, n);
  if (n == 0) ctx->told = 0;
}

/* Pages of a state go back to sleep; the bytes they give back are added to *held. Unless the device is idle
   their memory is not taken: what may still run there would fault. */
static void put_back(struct kvcached_region *r, uint8_t state, int idle, uint64_t *held) {
  for (size_t i = 0, n; i < r->pages.top; i += n) {
    n = kvc_pages_run(&r->pages, i, r->pages.top);
    if (r->pages.state[i] != state) continue;
    uint64_t freed;
    if (idle && kvc_empty(r, i, n, KVC_ASLEEP, 0, &freed) == KVCACHED_OK) {
      *held += freed;
      continue;
    }
    /* They sleep all the same: their memory is kept, and used when they wake. */
    kvc_log(r->ctx, KVCACHED_LOG_WARN, "%zu pages keep their memory for now: %s", n, kvcached_last_error());
    kvc_pages_set(&r->pages, i, n, KVC_ASLEEP);
    kvc_pages_set_stuck(&r->pages, i, n);
  }
}

/* Memory under all sleeping pages, and their content queued (or zeros in them). */
static int fill_batches(struct kvcached_region *r, int copied, uint64_t *held) {
  size_t most = BATCH / r->unit > 0 ? BATCH / r->unit : 1;
  for (size_t i = 0, n; i < r->pages.top; i += n) {
    n = kvc_pages_run(&r->pages, i, r->pages.top);
    if (r->pages.state[i] != KVC_ASLEEP) continue;
    if (n > most) n = most;
    uint64_t kept = 0, fresh = kvc_without(r, i, i + n, KVC_ASLEEP);
    int err = kvc_fill(r, i, i + n, KVC_ASLEEP, KVC_WAKING, !copied, &kept);
    if (err) {
      *held -= kept;
      return err;
    }
    *held -= fresh;
    if (copied) err = kvc_hostcopy_write(r, KVC_LANE_CALLER, i, n);
    if (err) return err;
  }
  return KVCACHED_OK;
}

int kvc_refill(struct kvcached_region *r, uint64_t *held) {
  struct kvcached_ctx *ctx = r->ctx;
  int copied = r->copy.valid && r->kind != KVCACHED_SCRATCH;
  int reload = r->kind == KVCACHED_WEIGHTS && !copied && !r->copy.zero;
  if (reload && !r->reload)
    return kvc_fail(KVCACHED_E_RELOAD,
                    "%" PRIu64
                    " bytes of weights sleep without a host copy, and their reload function was"
                    " taken back: set it again",
                    kvc_state_bytes(r, KVC_ASLEEP));
  int err = fill_batches(r, copied, held), idle = 1;
  if (copied) {
    /* Whatever happened: chunks and pages are not touched by anybody else while copies are under way. */
    kvc_detail d = kvc_detail_keep();
    int e = kvc_call(ctx)->finish(ctx->device, KVC_LANE_CALLER);
    if (e) idle = kvc_quiesce(ctx) == KVCACHED_OK;
    if (err)
      (void)kvc_detail_again(err, &d);
    else
      err = e;
  }
  if (err) {
    kvc_detail d = kvc_detail_keep();
    put_back(r, KVC_WAKING, idle, held);
    return kvc_detail_again(err, &d);
  }
  for (size_t i = 0, n; i < r->pages.top; i += n) {
    n = kvc_pages_run(&r->pages, i, r->pages.top);
    if (r->pages.state[i] == KVC_WAKING) kvc_pages_set(&r->pages, i, n, KVC_ENSURED);
  }
  if (reload) {
    err = call_reload(r);
    if (err) {
      /* All of them, those too that were awake: the function restores the whole region the next time. */
      kvc_detail d = kvc_detail_keep();
      put_back(r, KVC_ENSURED, kvc_quiesce(ctx) == KVCACHED_OK, held); /* it may have launched work */
      return kvc_detail_again(err, &d);
    }
  }
  return KVCACHED_OK;
}

/* ---- several regions ---- */

static int selected(const struct kvcached_region *r, unsigned kinds, const struct kvcached_region *only) {
  return (only ? r == only : (kinds & KVCACHED_KIND_BIT(r->kind)) != 0) && kvc_sleeps(r);
}

/* Tries once, with one claim for all. *woken counts regions. */
static int wake_once(struct kvcached_ctx *ctx, unsigned kinds, const struct kvcached_region *only,
                     kvc_shortage *shortage, size_t *woken) {
  uint64_t held = 0;
  *shortage = (kvc_shortage){0};
  for (const struct kvcached_region *r = ctx->regions; r; r = r->next)
    if (selected(r, kinds, only)) held += kvc_without(r, 0, r->pages.top, KVC_ASLEEP);
  int err = held > 0 ? kvc_claim(ctx, held, ctx->options.room_wait_ms, shortage) : KVCACHED_OK;
  if (err) return err;
  for (struct kvcached_region *r = ctx->regions; r && !err; r = r->next) {
    if (!selected(r, kinds, only)) continue;
    err = kvc_refill(r, &held);
    if (err) break;
    r->counters.wakes++;
    ++*woken;
  }
  kvc_unclaim(ctx, held);
  kvc_count_asleep(ctx);
  return err;
}

/* After E_LIMIT or E_NOMEM: 1 when it is worth another try. Of its own group only the context itself gives
   something up. Other groups are asked where the card is short; while they are, regions may be woken,
   released and freed by others: from the start then. */
static int find_room(struct kvcached_ctx *ctx, int err, const kvc_shortage *shortage, kvc_room *room) {
  uint64_t want = shortage->group > shortage->card ? shortage->group : shortage->card;
  if (kvc_wait_busy(ctx)) return 1;
  if (kvc_give_up_idle(ctx, err == KVCACHED_E_LIMIT ? want : UINT64_MAX, NULL, (kvc_spans){0}) > 0) return 1;
  if (err == KVCACHED_E_LIMIT && (shortage->group > 0 || shortage->card == 0)) return 0;
  room->charged = err == KVCACHED_E_LIMIT;
  return kvc_make_room(ctx, room);
}

int kvc_wake_for(struct kvcached_ctx *ctx, kvc_parking *p) {
  int64_t begin = kvc_now_ns();
  kvc_room room = {0};
  kvc_shortage shortage;
  size_t woken = 0;
  int err;
  for (;;) {
    int told = kvc_must_sleep_on(ctx) && atomic_load(&ctx->asleep) > 0;
    if (told) {
      err = kvc_fail(KVCACHED_E_LIMIT, "its lessor had it sleep while it waited for room, and not wake yet");
    } else {
      err = wake_once(ctx, p->kinds, p->only, &shortage, &woken);
      if (err != KVCACHED_E_LIMIT && err != KVCACHED_E_NOMEM) break;
      if (find_room(ctx, err, &shortage, &room)) continue;
    }
    if (woken > 0) kvc_publish(ctx);
    if (!kvc_park(ctx, p, err) && !(told && !ctx->told)) break;
    room = (kvc_room){0};
    begin = kvc_now_ns(); /* how long waking takes, not the wait for it */
  }
  if (woken > 0) {
    ctx->counters.wakes++;
    ctx->counters.last_wake_ns = (uint64_t)(kvc_now_ns() - begin);
    if (p->only) p->only->counters.last_wake_ns = ctx->counters.last_wake_ns;
    if (ctx->ledger) kvc_ledger_mark_woke(ctx->ledger, ctx->slot);
    kvc_publish(ctx);
    kvc_log(ctx, KVCACHED_LOG_INFO, "%zu regions woken in %.1f ms", woken,
            (double)ctx->counters.last_wake_ns / 1e6);
    kvc_event(ctx, KVCACHED_EVENT_WOKE);
  }
  kvc_ring_fallen(ctx);
  return err;
}

static int wake(struct kvcached_ctx *ctx, kvc_parking p) {
  int err = kvc_wake_for(ctx, &p);
  return kvc_park_end(ctx, &p, err);
}

int kvc_wake_region(struct kvcached_region *r) {
  return kvc_sleeps(r) ? wake(r->ctx, (kvc_parking){.only = r, .wakes = 1}) : KVCACHED_OK;
}

int kvc_wake(struct kvcached_ctx *ctx, unsigned kinds) {
  return wake(ctx, (kvc_parking){.kinds = kinds, .wakes = 1});
}

int kvcached_wake(kvcached_ctx_t ctx, unsigned kinds) {
  int err = kvc_check_ctx(ctx);
  if (err) return err;
  if (kinds == 0 || (kinds & ~KVCACHED_ALL_KINDS))
    return kvc_fail(KVCACHED_E_INVAL, "kinds 0x%x: bits KVCACHED_KIND_BIT of the kinds to wake", kinds);
  if (atomic_load(&ctx->asleep) == 0) return KVCACHED_OK;
  (void)pthread_mutex_lock(&ctx->mutex);
  err = kvc_wake(ctx, kinds);
  if (err == KVCACHED_E_LIMIT) ctx->counters.limit_failures++;
  (void)pthread_mutex_unlock(&ctx->mutex);
  return err;
}
