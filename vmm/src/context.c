/* Contexts: options, life, and the account of what is claimed. */
#include "context.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void kvc_log(const struct kvcached_ctx *ctx, int level, const char *fmt, ...) {
  if (!ctx->log) return;
  char msg[512];
  va_list ap;
  va_start(ap, fmt);
  (void)vsnprintf(msg, sizeof(msg), fmt, ap);
  va_end(ap);
  ctx->log(level, msg, ctx->log_user);
}

int kvc_check_process(const struct kvcached_ctx *ctx) {
  return ctx->pid == getpid() ? KVCACHED_OK : kvc_fail_forked(ctx->pid);
}

int kvc_claim(struct kvcached_ctx *ctx, uint64_t bytes, uint64_t *excess) {
  *excess = 0;
  if (ctx->ledger) {
    int err = kvc_ledger_claim(ctx->ledger, ctx->slot, KVC_CLAIM_PAGES, bytes, ctx->limit, excess);
    if (err) return err;
  } else {
    uint64_t held = kvc_sat_add(ctx->fixed, ctx->claim), after = kvc_sat_add(held, bytes);
    if (after > ctx->limit) {
      *excess = after - ctx->limit;
      return kvc_fail(KVCACHED_E_LIMIT,
                      "%" PRIu64 " bytes asked for beside %" PRIu64 " charged; the limit is %" PRIu64
                      ", passed by %" PRIu64,
                      bytes, held, ctx->limit, *excess);
    }
  }
  ctx->claim += bytes;
  return KVCACHED_OK;
}

void kvc_unclaim(struct kvcached_ctx *ctx, uint64_t bytes) {
  if (bytes && ctx->ledger) kvc_ledger_unclaim(ctx->ledger, ctx->slot, bytes);
  ctx->claim -= bytes;
}

void kvcached_options_init(kvcached_options_t *o) {
  if (o)
    *o = (kvcached_options_t){
        .struct_size = sizeof(*o), .backend = KVCACHED_BACKEND_HOST, .limit = UINT64_MAX, .slot = -1};
}

/* A caller's options in this library's size: fields an older caller lacks have their defaults, fields of a
   newer one are refused when they ask for something. */
static int read_options(const kvcached_options_t *in, kvcached_options_t *o) {
  kvcached_options_init(o);
  size_t size = in->struct_size;
  if (size < sizeof(size) || size > 4096)
    return kvc_fail(KVCACHED_E_INVAL, "options.struct_size is %zu: use kvcached_options_init", size);
  for (size_t i = sizeof(*o); i < size; i++)
    if (((const unsigned char *)in)[i] != 0)
      return kvc_fail(KVCACHED_E_INVAL, "options has fields this library (%s) does not know",
                      KVCACHED_VERSION);
  memcpy(o, in, size < sizeof(*o) ? size : sizeof(*o));
  o->struct_size = sizeof(*o);
  if (o->slot < -1) return kvc_fail(KVCACHED_E_INVAL, "slot %d: a leased slot, or -1", o->slot);
  if (o->group && (!*o->group || strlen(o->group) > KVCACHED_GROUP_MAX))
    return kvc_fail(KVCACHED_E_INVAL, "group \"%s\": it has 1 to %d bytes", o->group, KVCACHED_GROUP_MAX);
  if (o->ledger_path && !*o->ledger_path && o->slot >= 0)
    return kvc_fail(KVCACHED_E_INVAL, "slot %d given, and no ledger to have it in", o->slot);
  return KVCACHED_OK;
}

static int join_ledger(struct kvcached_ctx *ctx, const kvcached_options_t *o,
                       char group[KVCACHED_GROUP_MAX + 1]) {
  int err = kvc_ledger_open(o->ledger_path, ctx->backend->name, &ctx->ledger);
  if (err) return err;
  if (o->slot >= 0) {
    ctx->slot = o->slot;
    return kvc_ledger_attach(ctx->ledger, o->slot, o->group, o->name, group);
  }
  if (o->group)
    (void)snprintf(group, KVCACHED_GROUP_MAX + 1, "%s", o->group);
  else
    (void)snprintf(group, KVCACHED_GROUP_MAX + 1, "pid-%ld", (long)ctx->pid);
  err = kvc_ledger_take(ctx->ledger, group, o->name, &ctx->slot);
  if (err || !o->fixed) return err;
  uint64_t excess;
  return kvc_ledger_claim(ctx->ledger, ctx->slot, KVC_CLAIM_FIXED, o->fixed, o->limit, &excess);
}

int kvcached_open(const kvcached_options_t *options, kvcached_ctx_t *out) {
  if (!out) return kvc_fail(KVCACHED_E_INVAL, "out is NULL");
  *out = NULL;
  if (!options) return kvc_fail(KVCACHED_E_INVAL, "options is NULL");
  kvcached_options_t o;
  int err = read_options(options, &o);
  if (err) return err;

  struct kvcached_ctx *ctx = calloc(1, sizeof(*ctx));
  if (!ctx) return kvc_fail(KVCACHED_E_NOMEM, "no memory for a context");
  char group[KVCACHED_GROUP_MAX + 1] = "";
  *ctx = (struct kvcached_ctx){
      .pid = getpid(), .limit = o.limit, .slot = -1, .fixed = o.fixed, .log = o.log, .log_user = o.log_user};
  ctx->backend = kvc_backend_get(o.backend);
  if (!ctx->backend) {
    err = kvc_fail(KVCACHED_E_UNSUPPORTED, "backend %d: this build has %d (host)", o.backend,
                   KVCACHED_BACKEND_HOST);
    goto fail;
  }
  err = ctx->backend->page_size(o.page_size, &ctx->page_size);
  if (err) goto fail;
  if (o.ledger_path && !*o.ledger_path) {
    if (o.fixed > o.limit)
      err = kvc_fail(KVCACHED_E_LIMIT, "%" PRIu64 " bytes held outside the library; the limit is %" PRIu64,
                     o.fixed, o.limit);
  } else {
    err = join_ledger(ctx, &o, group);
  }
  if (err) goto fail;
  int e = pthread_mutex_init(&ctx->mutex, NULL);
  if (e) {
    err = kvc_fail_errno(KVCACHED_E_SYSTEM, e, "making a mutex");
    goto fail;
  }
  if (ctx->ledger)
    kvc_log(ctx, KVCACHED_LOG_INFO, "%s memory, pages of %zu bytes, group %s, slot %d of %s",
            ctx->backend->name, ctx->page_size, group, ctx->slot, kvcached_ledger_path(ctx->ledger));
  else
    kvc_log(ctx, KVCACHED_LOG_INFO, "%s memory, pages of %zu bytes, no ledger", ctx->backend->name,
            ctx->page_size);
  *out = ctx;
  return KVCACHED_OK;

fail:
  kvcached_ledger_close(ctx->ledger);
  free(ctx);
  return err;
}

void kvcached_shutdown(kvcached_ctx_t ctx) {
  if (!ctx || kvc_check_process(ctx)) return;
  (void)pthread_mutex_lock(&ctx->mutex); /* lets a call under way on another thread end first */
  while (ctx->regions) kvc_region_free(ctx->regions);
  (void)pthread_mutex_unlock(&ctx->mutex);
  (void)pthread_mutex_destroy(&ctx->mutex);
  kvcached_ledger_close(ctx->ledger);
  free(ctx);
}

size_t kvcached_page_size(kvcached_ctx_t ctx) { return ctx ? ctx->page_size : 0; }

int kvc_stats_finish(struct kvcached_ctx *ctx, kvcached_stats_t *s, kvcached_stats_t *out) {
  size_t size = out->struct_size;
  s->page_size = ctx->page_size;
  s->limit = ctx->limit;
  s->group_charge = kvc_sat_add(ctx->fixed, ctx->claim);
  if (ctx->ledger) {
    int err = kvc_ledger_group_charge(ctx->ledger, ctx->slot, &s->group_charge);
    if (err) return err;
  }
  s->struct_size = size < sizeof(*s) ? size : sizeof(*s);
  memcpy(out, s, s->struct_size);
  return KVCACHED_OK;
}

int kvcached_stats(kvcached_ctx_t ctx, kvcached_stats_t *out) {
  if (!ctx || !out) return kvc_fail(KVCACHED_E_INVAL, "%s is NULL", ctx ? "out" : "ctx");
  if (out->struct_size < sizeof(out->struct_size))
    return kvc_fail(KVCACHED_E_INVAL, "out->struct_size is %zu", out->struct_size);
  int err = kvc_check_process(ctx);
  if (err) return err;
  (void)pthread_mutex_lock(&ctx->mutex);
  kvcached_stats_t s = {0};
  for (const struct kvcached_region *r = ctx->regions; r; r = r->next) kvc_region_add_stats(r, &s);
  s.ensures = ctx->counters.ensures; /* the context's own: those of regions that are gone stay counted */
  s.releases = ctx->counters.releases;
  s.trims = ctx->counters.trims;
  s.limit_failures = ctx->counters.limit_failures;
  err = kvc_stats_finish(ctx, &s, out);
  (void)pthread_mutex_unlock(&ctx->mutex);
  return err;
}
