/*
 * Room for more: memory of the context that nobody uses, and then that of other processes, which are asked
 * through the ledger and answer on their own time, within a bound. And for what is held outside the library.
 */
#include "context.h"

#include <inttypes.h>
#include <time.h>

/* ---- own memory ---- */

/* Gives back memory of pages in `state` until *freed is `bytes` or there is none. The highest addresses of
   the newest region go first. What fails is left out; the first error is returned. */
static int take_state(struct kvcached_ctx *ctx, uint8_t state, uint64_t bytes,
                      const struct kvcached_region *keep, kvc_spans spans, uint64_t *freed) {
  int err = KVCACHED_OK;
  for (struct kvcached_region *r = ctx->regions; r && *freed < bytes; r = r->next) {
    /* Pages that the helper reads may have been released meanwhile, but not taken. */
    if (r->copy.reading) continue;
    kvc_spans skip = r == keep ? spans : (kvc_spans){0};
    size_t stop = r->pages.n, at, n;
    int taken = 0;
    while (*freed < bytes && r->pages.count[state] > 0) {
      uint64_t pages = (bytes - *freed - 1) / r->unit + 1, got = 0;
      size_t most = pages < r->pages.n ? (size_t)pages : r->pages.n;
      n = kvc_pages_last(&r->pages, state, stop, most, skip, &at);
      if (n == 0) break;
      stop = at;
      int e = kvc_empty(r, at, n, KVC_UNMAPPED, 0, &got);
      if (e) {
        if (!err) err = e;
        continue;
      }
      taken = 1;
      kvc_unclaim(ctx, got);
      *freed += got;
    }
    if (taken) r->counters.trims++;
  }
  return err;
}

static uint64_t idle_bytes(const struct kvcached_ctx *ctx) {
  uint64_t bytes = 0;
  for (const struct kvcached_region *r = ctx->regions; r; r = r->next)
    bytes += kvc_state_bytes(r, KVC_READY) + kvc_state_bytes(r, KVC_IDLE);
  return bytes;
}

/* Pool first: it costs no unmap. */
static int take_pool(struct kvcached_ctx *ctx, uint64_t bytes, uint64_t *freed) {
  if (kvc_pool_bytes(ctx) == 0) return KVCACHED_OK;
  uint64_t pages = bytes > 0 ? (bytes - 1) / ctx->device->page_size + 1 : 0, got = 0;
  int err = kvc_pool_trim(ctx, pages < ctx->pool.n ? ctx->pool.n - (size_t)pages : 0, &got);
  *freed += got;
  return err;
}

uint64_t kvc_spare_bytes(const struct kvcached_ctx *ctx) { return kvc_pool_bytes(ctx) + idle_bytes(ctx); }

uint64_t kvc_give_up_idle(struct kvcached_ctx *ctx, uint64_t bytes, const struct kvcached_region *keep,
                          kvc_spans spans) {
  kvc_detail d = kvc_detail_keep();
  uint64_t freed = 0, orphaned = ctx->pool.orphan_bytes;
  int err = take_pool(ctx, bytes, &freed);
  if (freed < bytes && idle_bytes(ctx) > 0) {
    /* A kernel launched before its pages were released may still be reading them. */
    int e = kvc_call(ctx)->quiesce(ctx->device);
    if (!e) {
      e = take_state(ctx, KVC_READY, bytes, keep, spans, &freed);
      int e2 = take_state(ctx, KVC_IDLE, bytes, keep, spans, &freed);
      if (!e) e = e2;
    }
    if (!err) err = e;
  }
  if (err)
    kvc_log(ctx, KVCACHED_LOG_WARN, "not all idle memory could be given up: %s", kvcached_last_error());
  if (freed > 0) {
    kvc_log(ctx, KVCACHED_LOG_DEBUG, "%" PRIu64 " idle bytes given up for others", freed);
    kvc_reap(ctx);
    kvc_publish(ctx);
    kvc_event(ctx, KVCACHED_EVENT_TRIMMED);
  } else if (ctx->pool.orphan_bytes != orphaned) {
    kvc_publish(ctx); /* what was idle is unmapped, though the driver keeps it */
  }
  (void)kvc_detail_again(err, &d);
  return freed;
}

int kvc_trim(struct kvcached_ctx *ctx, uint64_t keep, uint64_t *freed) {
  *freed = 0;
  uint64_t all = kvc_spare_bytes(ctx);
  if (all <= keep) return KVCACHED_OK;
  uint64_t bytes = all - keep, orphaned = ctx->pool.orphan_bytes;
  int err = take_pool(ctx, bytes, freed);
  int e = take_state(ctx, KVC_READY, bytes, NULL, (kvc_spans){0}, freed);
  if (!err) err = e;
  e = take_state(ctx, KVC_IDLE, bytes, NULL, (kvc_spans){0}, freed);
  if (!err) err = e;
  if (*freed > 0) {
    ctx->counters.trims++;
    kvc_reap(ctx);
    kvc_publish(ctx);
    kvc_event(ctx, KVCACHED_EVENT_TRIMMED);
  } else if (ctx->pool.orphan_bytes != orphaned) {
    kvc_publish(ctx);
  }
  return err;
}

/* ---- memory of others ---- */

/* Milliseconds left, rounded up; 0: the time is up. */
static uint32_t left_ms(const kvc_room *room) {
  int64_t left = room->deadline_ns - kvc_now_ns();
  return left > 0 ? (uint32_t)((left + 999999) / 1000000) : 0;
}

/* Asks the next process that a command may make give something; 1 when it did. */
static int ask(struct kvcached_ctx *ctx, kvc_room *room, int sleep) {
  uint32_t left;
  while ((left = left_ms(room)) > 0) {
    int slot = kvc_ledger_pick_victim(ctx->ledger, ctx->slot, sleep, room->charged, room->asked[sleep]);
    if (slot < 0) return 0;
    room->asked[sleep][slot / 64] |= UINT64_C(1) << (slot % 64);
    /* A process that hangs has only half of what is left, so that the next ones are asked too. */
    uint32_t share = left > 100 ? left / 2 : left;
    uint64_t freed = 0;
    int err = kvcached_ledger_command(ctx->ledger, slot, sleep ? KVCACHED_CMD_SLEEP : KVCACHED_CMD_TRIM,
                                      share, &freed);
    if (err == KVCACHED_OK && freed > 0) return 1;
    if (err == KVCACHED_E_TIMEOUT) room->late = 1;
  }
  return 0;
}

/* Waits a moment for one that was asked and did not answer in time. */
static int wait_for_late(kvc_room *room) {
  uint32_t left = left_ms(room);
  if (!room->late || left == 0) return 0;
  struct timespec moment = {.tv_nsec = (long)(left < 20 ? left : 20) * 1000000};
  (void)nanosleep(&moment, NULL);
  return 1;
}

int kvc_make_room(struct kvcached_ctx *ctx, kvc_room *room) {
  if (!ctx->ledger) return 0;
  if (room->deadline_ns == 0) room->deadline_ns = kvc_now_ns() + (int64_t)ctx->options.room_wait_ms * 1000000;
  kvc_detail d = kvc_detail_keep();
  (void)pthread_mutex_unlock(&ctx->mutex);
  int room_made = ask(ctx, room, 0) || ask(ctx, room, 1) || wait_for_late(room);
  (void)pthread_mutex_lock(&ctx->mutex);
  (void)kvc_detail_again(KVCACHED_OK, &d);
  return room_made;
}

/* ---- memory outside the library ---- */

static int claim_fixed(struct kvcached_ctx *ctx, uint64_t more, uint32_t wait_ms, kvc_shortage *shortage) {
  *shortage = (kvc_shortage){0};
  if (ctx->ledger)
    return kvc_ledger_claim(ctx->ledger, ctx->slot, KVC_CLAIM_FIXED, more, ctx->limit, wait_ms, shortage);
  uint64_t held = kvc_sat_add(ctx->fixed, ctx->claim), after = kvc_sat_add(held, more);
  if (after <= ctx->limit) return KVCACHED_OK;
  shortage->group = after - ctx->limit;
  return kvc_fail(KVCACHED_E_LIMIT,
                  "%" PRIu64 " bytes more held outside the library, beside %" PRIu64
                  " charged; the limit is %" PRIu64 ", passed by %" PRIu64,
                  more, held, ctx->limit, shortage->group);
}

/* After E_LIMIT: 1 when it is worth another try. */
static int room_for_fixed(struct kvcached_ctx *ctx, kvc_room *room, const kvc_shortage *shortage) {
  if (kvc_wait_busy(ctx)) return 1; /* they are ready now: room that may be had */
  uint64_t spare = kvc_spare_bytes(ctx);
  uint64_t most = shortage->group > shortage->card ? shortage->group : shortage->card;
  /* Nobody else's memory helps the group; and nothing is taken that would not be enough. */
  if (shortage->group > spare) return 0;
  if (spare > 0 && (most <= spare || shortage->card > 0) &&
      kvc_give_up_idle(ctx, most < spare ? most : spare, NULL, (kvc_spans){0}) > 0)
    return 1;
  if (shortage->card == 0) return 0;
  room->charged = 1;
  return kvc_make_room(ctx, room);
}

static kvc_room begin(const struct kvcached_ctx *ctx) {
  return (kvc_room){.deadline_ns = kvc_now_ns() + (int64_t)ctx->options.room_wait_ms * 1000000};
}

static int raise_fixed(struct kvcached_ctx *ctx, uint64_t bytes) {
  kvc_room room = begin(ctx);
  kvc_parking parking = {0};
  kvc_shortage shortage;
  int err;
  for (;;) {
    /* Inside the gate, where it waited: all is awake after. */
    err = parking.kinds && atomic_load(&ctx->asleep) > 0 ? kvc_wake_for(ctx, &parking) : KVCACHED_OK;
    /* Another thread may have set it while the mutex was let go of. */
    if (err || bytes <= ctx->fixed) break;
    parking.more = bytes - ctx->fixed;
    err = claim_fixed(ctx, parking.more, left_ms(&room), &shortage);
    if (!err) ctx->fixed = bytes;
    if (err != KVCACHED_E_LIMIT) break;
    if (room_for_fixed(ctx, &room, &shortage)) continue;
    if (!kvc_park(ctx, &parking, err)) break;
    room = begin(ctx);
  }
  return kvc_park_end(ctx, &parking, err);
}

static void lower_fixed(struct kvcached_ctx *ctx, uint64_t bytes) {
  if (bytes >= ctx->fixed) return;
  if (ctx->ledger) {
    kvc_ledger_unclaim(ctx->ledger, ctx->slot, KVC_CLAIM_FIXED, ctx->fixed - bytes);
    kvc_ledger_bell_ring(ctx->ledger);
  }
  ctx->fixed = bytes;
}

int kvcached_set_fixed(kvcached_ctx_t ctx, uint64_t bytes) {
  int err = kvc_check_ctx(ctx);
  if (err) return err;
  (void)pthread_mutex_lock(&ctx->mutex);
  err = raise_fixed(ctx, bytes);
  if (err == KVCACHED_E_LIMIT) ctx->counters.limit_failures++;
  if (!err) {
    ctx->said = bytes;
    lower_fixed(ctx, bytes > ctx->measured ? bytes : ctx->measured);
  }
  (void)pthread_mutex_unlock(&ctx->mutex);
  return err;
}

void kvc_set_measured(struct kvcached_ctx *ctx, uint64_t bytes) {
  ctx->measured = bytes;
  if (!ctx->ledger) return;
  kvc_ledger_mark_context(ctx->ledger, ctx->slot, bytes);
  if (ctx->options.slot < 0) return;
  uint64_t fixed = bytes > ctx->said ? bytes : ctx->said;
  /* It is there, whatever the limit says. */
  if (fixed > ctx->fixed) {
    kvc_ledger_add_fixed(ctx->ledger, ctx->slot, fixed - ctx->fixed);
    ctx->fixed = fixed;
  }
  lower_fixed(ctx, fixed);
}
