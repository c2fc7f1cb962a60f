/* What a context says of itself: to its caller, to the ledger; and its limit. */
#include "context.h"

#include <inttypes.h>
#include <string.h>

/* Sleeping pages that could not be unmapped: they count as what they hold, not as what they lack. Rare, so
   they are looked for only when there are any. */
static uint64_t restless_bytes(const struct kvcached_region *r) {
  uint64_t bytes = 0;
  for (size_t i = 0; r->pages.n_stuck > 0 && i < r->pages.top; i++)
    if (r->pages.stuck[i] && r->pages.state[i] == KVC_ASLEEP) bytes += kvc_bytes(r, i, 1);
  return bytes;
}

uint64_t kvc_mapped_bytes(const struct kvcached_region *r) {
  uint64_t bytes = restless_bytes(r);
  for (uint8_t s = 0; s < KVC_STATES; s++)
    if (s != KVC_UNMAPPED && s != KVC_ASLEEP) bytes += kvc_state_bytes(r, s);
  return bytes;
}

static uint64_t asleep_bytes(const struct kvcached_region *r) {
  return kvc_state_bytes(r, KVC_ASLEEP) - restless_bytes(r);
}

void kvc_publish(struct kvcached_ctx *ctx) {
  kvc_note_change(ctx);
  if (!ctx->ledger) return;
  kvc_figures f = {0};
  for (const struct kvcached_region *r = ctx->regions; r; r = r->next) {
    f.reserved += r->space.size;
    f.kind_reserved[r->kind] += r->space.size;
    f.kind_bytes[r->kind] += kvc_mapped_bytes(r);
    f.kind_asleep[r->kind] += asleep_bytes(r);
    f.idle += kvc_state_bytes(r, KVC_IDLE) + kvc_state_bytes(r, KVC_READY);
    f.asleep += asleep_bytes(r);
  }
  f.pooled = kvc_pool_bytes(ctx);
  kvc_ledger_publish(ctx->ledger, ctx->slot, &f);
  if (ctx->parkings) kvc_publish_wants(ctx); /* a sleep ends the lease */
  kvc_ring_fallen(ctx);
}

/* ---- stats ---- */

static void add_region(const struct kvcached_region *r, kvcached_stats_t *sum) {
  /* What the helper is still making is mapped, and becomes ready with the next step. */
  uint64_t mapped = kvc_mapped_bytes(r), ready = kvc_state_bytes(r, KVC_READY);
  sum->reserved += r->space.size;
  sum->mapped += mapped;
  sum->idle += kvc_state_bytes(r, KVC_IDLE) + ready;
  sum->kind_mapped[r->kind] += mapped;
  sum->ready += ready;
  sum->asleep += asleep_bytes(r);
  sum->kind_asleep[r->kind] += asleep_bytes(r);
  sum->host_bytes += r->copy.capacity;
  sum->host_pinned += r->copy.pinned;
}

static void add_counters(const kvc_counters *c, kvcached_stats_t *s) {
  s->ensures = c->ensures;
  s->releases = c->releases;
  s->trims = c->trims;
  s->limit_failures = c->limit_failures;
  s->sleeps = c->sleeps;
  s->wakes = c->wakes;
  s->last_sleep_ns = c->last_sleep_ns;
  s->last_wake_ns = c->last_wake_ns;
  s->parks = c->parks;
}

static int account(struct kvcached_ctx *ctx, kvc_account *a) {
  *a = (kvc_account){0};
  if (ctx->ledger) return kvc_ledger_account(ctx->ledger, ctx->slot, ctx->limit, a);
  a->group_limit = ctx->limit;
  a->group_charge = a->card_charge = kvc_sat_add(ctx->fixed, ctx->claim);
  a->card_limit = UINT64_MAX;
  return KVCACHED_OK;
}

static void finish(struct kvcached_ctx *ctx, kvcached_stats_t *s, const kvc_account *a) {
  s->limit = a->group_limit;
  s->group_charge = a->group_charge;
  s->card_limit = a->card_limit;
  s->card_charge = a->card_charge;
  s->pooled = kvc_pool_bytes(ctx);
  s->fixed = ctx->fixed;
  s->host_limit = ctx->options.host_limit;
  s->device_calls = atomic_load_explicit(&ctx->device_calls, memory_order_relaxed);
  s->last_inside_ns = atomic_load_explicit(&ctx->last_inside_ns, memory_order_relaxed);
  s->context_bytes = ctx->measured;
  s->wants = ctx->wants;
}

static int finish_into(struct kvcached_ctx *ctx, kvcached_stats_t *s, kvcached_stats_t *out) {
  size_t size = out->struct_size;
  kvc_account a;
  int err = account(ctx, &a);
  if (err) return err;
  finish(ctx, s, &a);
  s->struct_size = size < sizeof(*s) ? size : sizeof(*s);
  memcpy(out, s, s->struct_size);
  return KVCACHED_OK;
}

static kvcached_stats_t totals(const struct kvcached_ctx *ctx) {
  kvcached_stats_t s = {0};
  for (const struct kvcached_region *r = ctx->regions; r; r = r->next) add_region(r, &s);
  add_counters(&ctx->counters, &s); /* its own: those of regions that are gone stay counted */
  s.page_size = ctx->device->page_size;
  return s;
}

void kvc_event(struct kvcached_ctx *ctx, int event) {
  if (!ctx->options.event) return;
  kvc_detail d = kvc_detail_keep();
  kvcached_stats_t s = totals(ctx);
  kvc_account a;
  if (account(ctx, &a)) a.group_limit = a.card_limit = UINT64_MAX; /* it is told all the same */
  finish(ctx, &s, &a);
  s.struct_size = sizeof(s);
  kvc_enter_event();
  ctx->options.event(event, &s, ctx->options.event_user);
  kvc_leave_event();
  (void)kvc_detail_again(KVCACHED_OK, &d);
}

static int check_out(const void *handle, const char *name, const kvcached_stats_t *out) {
  if (!handle || !out) return kvc_fail(KVCACHED_E_INVAL, "%s is NULL", handle ? "out" : name);
  if (out->struct_size < sizeof(out->struct_size))
    return kvc_fail(KVCACHED_E_INVAL, "out->struct_size is %zu", out->struct_size);
  return KVCACHED_OK;
}

int kvcached_stats(kvcached_ctx_t ctx, kvcached_stats_t *out) {
  int err = check_out(ctx, "ctx", out);
  if (!err) err = kvc_check_ctx(ctx);
  if (err) return err;
  (void)pthread_mutex_lock(&ctx->mutex);
  kvcached_stats_t s = totals(ctx);
  err = finish_into(ctx, &s, out);
  (void)pthread_mutex_unlock(&ctx->mutex);
  return err;
}

int kvcached_region_stats(kvcached_region_t r, kvcached_stats_t *out) {
  int err = check_out(r, "region", out);
  if (!err) err = kvc_check_ctx(r->ctx);
  if (err) return err;
  (void)pthread_mutex_lock(&r->ctx->mutex);
  kvcached_stats_t s = {0};
  add_region(r, &s);
  add_counters(&r->counters, &s);
  s.page_size = r->unit;
  err = finish_into(r->ctx, &s, out);
  (void)pthread_mutex_unlock(&r->ctx->mutex);
  return err;
}

/* ---- memory and limits ---- */

int kvcached_device_memory(kvcached_ctx_t ctx, uint64_t *free_bytes, uint64_t *total_bytes) {
  int err = kvc_check_ctx(ctx);
  if (err) return err;
  if (!free_bytes || !total_bytes)
    return kvc_fail(KVCACHED_E_INVAL, "%s is NULL", free_bytes ? "total_bytes" : "free_bytes");
  return ctx->backend->memory(ctx->device, free_bytes, total_bytes);
}

static uint64_t minus(uint64_t a, uint64_t b) { return a > b ? a - b : 0; }

size_t kvcached_available(kvcached_ctx_t ctx) {
  uint64_t available, total;
  kvc_account a;
  if (kvc_check_ctx(ctx) || ctx->backend->memory(ctx->device, &available, &total)) return 0;
  (void)pthread_mutex_lock(&ctx->mutex);
  int err = account(ctx, &a);
  (void)pthread_mutex_unlock(&ctx->mutex);
  if (err) return 0;
  uint64_t least = minus(available, ctx->options.headroom);
  /* What is left of the own lease is charged already. */
  uint64_t group = minus(kvc_sat_add(a.group_limit, a.lease_left), a.group_charge);
  uint64_t card = minus(kvc_sat_add(a.card_limit, a.lease_left), a.card_charge);
  if (group < least) least = group;
  if (card < least) least = card;
  return least > SIZE_MAX ? SIZE_MAX : (size_t)least;
}

static int apply_limit(struct kvcached_ctx *ctx, size_t limit) {
  uint64_t bytes = limit == SIZE_MAX ? UINT64_MAX : limit;
  if (!ctx->ledger) {
    ctx->limit = bytes;
    return KVCACHED_OK;
  }
  kvcached_limit_t set = {.struct_size = sizeof(set)};
  int err = kvc_ledger_set_own_limit(ctx->ledger, ctx->slot, bytes, &set);
  if (err || set.result == KVCACHED_LIMIT_APPLIED || set.result == KVCACHED_LIMIT_DEFERRED) return err;
  return kvc_fail(KVCACHED_E_BUSY, "revision %" PRIu32 " with %" PRIu64 " bytes is in force and goes first",
                  set.revision, set.limit);
}

/* Own idle and pooled memory that could go, as far as the group is charged above its limit. */
static uint64_t above_limit(struct kvcached_ctx *ctx) {
  kvc_account a;
  if (account(ctx, &a)) return 0;
  uint64_t above = minus(a.group_charge, a.group_limit), spare = kvc_spare_bytes(ctx);
  return above < spare ? above : spare;
}

static void drain(struct kvcached_ctx *ctx) {
  uint64_t above = above_limit(ctx);
  if (above == 0) return;
  uint64_t freed = kvc_give_up_idle(ctx, above, NULL, (kvc_spans){0});
  kvc_log(ctx, KVCACHED_LOG_INFO, "%" PRIu64 " of %" PRIu64 " idle bytes above the new limit given back",
          freed, above);
}

void kvcached_set_limit(kvcached_ctx_t ctx, size_t limit) {
  if (kvc_check_ctx(ctx)) return;
  (void)pthread_mutex_lock(&ctx->mutex);
  int err = apply_limit(ctx, limit);
  if (err) kvc_log(ctx, KVCACHED_LOG_ERROR, "the limit was not set to %zu: %s", limit, kvcached_last_error());
  (void)kvc_wait_busy(ctx); /* what the helper is making is idle after */
  int more = !err && above_limit(ctx) > 0;
  (void)pthread_mutex_unlock(&ctx->mutex);
  if (!more) return;
  /* Alone in the gate where that can be had. Where not, idle pages go all the same: device work on them ended
     before they were released, and the device is idle while they do. */
  int alone =
      !kvc_gate_is_inside(&ctx->gate) && kvc_gate_lock(&ctx->gate, ctx->options.room_wait_ms) == KVCACHED_OK;
  (void)pthread_mutex_lock(&ctx->mutex);
  drain(ctx);
  (void)pthread_mutex_unlock(&ctx->mutex);
  if (alone) kvc_gate_unlock(&ctx->gate);
}
