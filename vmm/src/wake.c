/*
 * Waking: memory under sleeping pages again, and their content. The copies of all regions of one wake are
 * queued before the first wait: while one batch is on the bus the next is made and mapped. The region with
 * the most to copy comes first, so that all other mapping is hidden behind it; what is only zeroed comes
 * last, and reload functions are called once everything has arrived.
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

/* Whether the content of its sleeping pages is in the host copy; without one, whether they read as zero or
   have to be reloaded. */
static int is_copied(const struct kvcached_region *r) { return r->copy.valid && r->kind != KVCACHED_SCRATCH; }
static int is_reloaded(const struct kvcached_region *r) {
  return r->kind == KVCACHED_WEIGHTS && !is_copied(r) && !r->copy.zero;
}

/* Memory under all sleeping pages of a region, and their content queued (or zeros). *queued: there is work on
   the caller's lane. Only copies go by batches; pages without them get one set-access a run. */
static int fill_region(struct kvcached_region *r, uint64_t *held, int *queued) {
  int copied = is_copied(r);
  if (is_reloaded(r) && !r->reload)
    return kvc_fail(KVCACHED_E_RELOAD,
                    "%" PRIu64
                    " bytes of weights sleep without a host copy, and their reload function was"
                    " taken back: set it again",
                    kvc_state_bytes(r, KVC_ASLEEP));
  size_t most = copied ? (BATCH / r->unit > 0 ? BATCH / r->unit : 1) : SIZE_MAX;
  for (size_t i = 0, n; i < r->pages.top; i += n) {
    n = kvc_pages_run(&r->pages, i, r->pages.top);
    if (r->pages.state[i] != KVC_ASLEEP) continue;
    if (n > most) n = most;
    uint64_t kept = 0, fresh = kvc_without(r, i, i + n, KVC_ASLEEP);
    int err = kvc_fill(r, i, i + n, KVC_ASLEEP, KVC_WAKING, !copied, queued, &kept);
    if (err) {
      *held -= kept;
      return err;
    }
    *held -= fresh;
    if (!copied) continue;
    *queued = 1; /* of several pieces the first may be under way when the next fails */
    err = kvc_hostcopy_write(r, KVC_LANE_CALLER, i, n);
    if (err) return err;
  }
  return KVCACHED_OK;
}

/* ---- several regions: those whose `waking` says so ---- */

enum {
  NOT_WOKEN = 0,
  TO_WAKE, /* to be filled */
  FILLED,  /* memory under all its pages, and their content on its way */
  WOKEN    /* for who asked for it to look at */
};

/* The one with the most to copy; what has no copy comes after all that have one. */
static struct kvcached_region *next_to_fill(const struct kvcached_ctx *ctx) {
  struct kvcached_region *next = NULL;
  uint64_t most = 0;
  for (struct kvcached_region *r = ctx->regions; r; r = r->next) {
    if (r->waking != TO_WAKE) continue;
    uint64_t bytes = is_copied(r) ? kvc_state_bytes(r, KVC_ASLEEP) : 0;
    if (next && bytes <= most) continue;
    next = r;
    most = bytes;
  }
  return next;
}

/* Until one fails; that one is TO_WAKE still, though a part of it is filled. */
static int fill_all(struct kvcached_ctx *ctx, uint64_t *held, int *queued) {
  for (struct kvcached_region *r; (r = next_to_fill(ctx)); r->waking = FILLED) {
    int err = fill_region(r, held, queued);
    if (err) return err;
  }
  return KVCACHED_OK;
}

static void awake(struct kvcached_region *r) {
  for (size_t i = 0, n; i < r->pages.top; i += n) {
    n = kvc_pages_run(&r->pages, i, r->pages.top);
    if (r->pages.state[i] == KVC_WAKING) kvc_pages_set(&r->pages, i, n, KVC_ENSURED);
  }
  r->waking = WOKEN;
}

/* Memory is there, zeroed, and nothing is under way any more: the functions may do what they like with it. On
   failure *idle says whether the device is. */
static int reload_all(struct kvcached_ctx *ctx, int *idle, uint64_t *held) {
  for (struct kvcached_region *r = ctx->regions; r; r = r->next) {
    if (r->waking != FILLED) continue;
    awake(r);
    int err = call_reload(r);
    if (!err) continue;
    /* All of its pages, those too that were awake: the function restores the whole region the next time. */
    kvc_detail d = kvc_detail_keep();
    *idle = kvc_quiesce(ctx) == KVCACHED_OK; /* it may have launched work */
    put_back(r, KVC_ENSURED, *idle, held);
    r->waking = NOT_WOKEN;
    return kvc_detail_again(err, &d);
  }
  return KVCACHED_OK;
}

/* Wakes all regions that are TO_WAKE, with one wait. Each is WOKEN in the end, or sleeps in full as before
   and is NOT_WOKEN; where a call for one fails, those that are complete stay awake. */
static int refill(struct kvcached_ctx *ctx, uint64_t *held) {
  int queued = 0, arrived = 1, idle = 1;
  int err = fill_all(ctx, held, &queued);
  if (queued) {
    /* Whatever happened: chunks and pages are not touched by anybody else while copies are under way. */
    kvc_detail d = kvc_detail_keep();
    int e = kvc_call(ctx)->finish(ctx->device, KVC_LANE_CALLER);
    arrived = !e;
    if (e) {
      if (!err) d = kvc_detail_keep();
      idle = kvc_quiesce(ctx) == KVCACHED_OK;
    }
    if (err || e) err = kvc_detail_again(err ? err : e, &d);
  }
  for (struct kvcached_region *r = ctx->regions; r && arrived; r = r->next)
    if (r->waking == FILLED && !is_reloaded(r)) awake(r);
  if (!err) err = reload_all(ctx, &idle, held);
  if (!err) return KVCACHED_OK;
  kvc_detail d = kvc_detail_keep();
  for (struct kvcached_region *r = ctx->regions; r; r = r->next) {
    if (r->waking != TO_WAKE && r->waking != FILLED) continue;
    put_back(r, KVC_WAKING, idle, held);
    r->waking = NOT_WOKEN;
  }
  return kvc_detail_again(err, &d);
}

int kvc_refill(struct kvcached_region *r, uint64_t *held) {
  r->waking = TO_WAKE;
  int err = refill(r->ctx, held);
  r->waking = NOT_WOKEN;
  return err;
}

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
  for (struct kvcached_region *r = ctx->regions; r; r = r->next)
    if (selected(r, kinds, only)) r->waking = TO_WAKE;
  err = refill(ctx, &held);
  for (struct kvcached_region *r = ctx->regions; r; r = r->next) {
    if (r->waking != WOKEN) continue;
    r->waking = NOT_WOKEN;
    r->counters.wakes++;
    ++*woken;
  }
  kvc_unclaim(ctx, held);
  kvc_count_asleep(ctx);
  if (err) kvc_publish(ctx); /* memory that could not be taken again is shown */
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
