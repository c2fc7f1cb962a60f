/* Contexts: options, life, and the account of what is claimed. */
#include "context.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void kvc_log(const struct kvcached_ctx *ctx, int level, const char *fmt, ...) {
  if (!ctx->log) return;
  char msg[1280]; /* an error's detail (1 KiB) and what was about */
  va_list ap;
  va_start(ap, fmt);
  (void)vsnprintf(msg, sizeof(msg), fmt, ap);
  va_end(ap);
  ctx->log(level, msg, ctx->log_user);
}

static _Thread_local int in_event;

void kvc_enter_event(void) { in_event++; }
void kvc_leave_event(void) { in_event--; }

int kvc_check_ctx(const struct kvcached_ctx *ctx) {
  if (!ctx) return kvc_fail(KVCACHED_E_INVAL, "ctx is NULL");
  if (in_event) return kvc_fail(KVCACHED_E_INVAL, "called from an event function, which must not");
  return ctx->pid == kvc_pid() ? KVCACHED_OK : kvc_fail_forked(ctx->pid);
}

int kvc_quiesce(struct kvcached_ctx *ctx) { return kvc_call(ctx)->quiesce(ctx->device); }

/* ---- claims ---- */

int kvc_claim(struct kvcached_ctx *ctx, uint64_t bytes, uint32_t wait_ms, kvc_shortage *shortage) {
  *shortage = (kvc_shortage){0};
  if (ctx->ledger) {
    int err = kvc_ledger_claim(ctx->ledger, ctx->slot, KVC_CLAIM_PAGES, bytes, ctx->limit, wait_ms, shortage);
    if (err) return err;
  } else {
    uint64_t held = kvc_sat_add(ctx->fixed, ctx->claim), after = kvc_sat_add(held, bytes);
    if (after > ctx->limit) {
      shortage->group = after - ctx->limit;
      return kvc_fail(KVCACHED_E_LIMIT,
                      "%" PRIu64 " bytes asked for beside %" PRIu64 " charged; the limit is %" PRIu64
                      ", passed by %" PRIu64 ": release memory, or raise it with kvcached_set_limit",
                      bytes, held, ctx->limit, shortage->group);
    }
  }
  ctx->claim += bytes;
  return KVCACHED_OK;
}

void kvc_unclaim(struct kvcached_ctx *ctx, uint64_t bytes) {
  if (bytes && ctx->ledger) {
    kvc_ledger_unclaim(ctx->ledger, ctx->slot, KVC_CLAIM_PAGES, bytes);
    ctx->fell = 1;
  }
  ctx->claim -= bytes;
}

int kvc_claim_host(struct kvcached_ctx *ctx, uint64_t bytes, uint32_t wait_ms) {
  uint64_t limit = ctx->options.host_limit;
  if (ctx->ledger) {
    kvc_shortage shortage = {0};
    int err = kvc_ledger_claim(ctx->ledger, ctx->slot, KVC_CLAIM_HOST, bytes, limit, wait_ms, &shortage);
    if (err) return err;
  } else if (kvc_sat_add(ctx->host_claim, bytes) > limit) {
    return kvc_fail(KVCACHED_E_HOST_LIMIT,
                    "%" PRIu64 " bytes of host memory asked for beside %" PRIu64 "; host_limit is %" PRIu64,
                    bytes, ctx->host_claim, limit);
  }
  ctx->host_claim += bytes;
  return KVCACHED_OK;
}

void kvc_unclaim_host(struct kvcached_ctx *ctx, uint64_t bytes) {
  if (bytes && ctx->ledger) kvc_ledger_unclaim(ctx->ledger, ctx->slot, KVC_CLAIM_HOST, bytes);
  ctx->host_claim -= bytes;
}

void kvc_ring_fallen(struct kvcached_ctx *ctx) {
  if (ctx->fell) kvc_ledger_bell_ring(ctx->ledger);
  ctx->fell = 0;
}

/* ---- options ---- */

void kvcached_options_init(kvcached_options_t *o) {
  if (!o) return;
  memset(o, 0, sizeof(*o)); /* padding too: it may be a field of a later library */
  o->struct_size = sizeof(*o);
  o->backend = KVCACHED_BACKEND_HOST;
  o->limit = UINT64_MAX;
  o->slot = -1;
  o->pool_limit = (uint64_t)64 << 20;
  o->lookahead = KVCACHED_LOOKAHEAD_AUTO;
  o->host_limit = UINT64_MAX;
  o->room_wait_ms = 1000;
}

static int check_options(const kvcached_options_t *o) {
  if (o->slot < -1) return kvc_fail(KVCACHED_E_INVAL, "slot %d: a leased slot, or -1", o->slot);
  if (o->group && (!*o->group || strlen(o->group) > KVCACHED_GROUP_MAX))
    return kvc_fail(KVCACHED_E_INVAL, "group \"%s\": it has 1 to %d bytes", o->group, KVCACHED_GROUP_MAX);
  if (o->ledger_path && !*o->ledger_path && o->slot >= 0)
    return kvc_fail(KVCACHED_E_INVAL, "slot %d given, and no ledger to have it in", o->slot);
  if (o->backend == KVCACHED_BACKEND_CUDA && !o->pci_bus_id && o->device < 0)
    return kvc_fail(KVCACHED_E_INVAL, "device %d: ordinals begin at 0", o->device);
  if (o->pci_bus_id && !*o->pci_bus_id)
    return kvc_fail(KVCACHED_E_INVAL, "pci_bus_id is empty: \"0000:1b:00.0\", or NULL for an ordinal");
  if (o->lookahead < KVCACHED_LOOKAHEAD_AUTO || o->lookahead > KVCACHED_LOOKAHEAD_OFF)
    return kvc_fail(KVCACHED_E_INVAL, "lookahead %d: %d to %d", o->lookahead, KVCACHED_LOOKAHEAD_AUTO,
                    KVCACHED_LOOKAHEAD_OFF);
  if (o->flags & ~(uint32_t)KVCACHED_NO_CONTROL)
    return kvc_fail(KVCACHED_E_INVAL, "flags 0x%" PRIx32 ": this library (%s) knows 0x%x", o->flags,
                    KVCACHED_VERSION, (unsigned)KVCACHED_NO_CONTROL);
  return KVCACHED_OK;
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
  return check_options(o);
}

/* ---- life ---- */

static int open_device(struct kvcached_ctx *ctx) {
  const kvcached_options_t *o = &ctx->options;
  ctx->backend = kvc_backend_get(o->backend);
  if (!ctx->backend)
    return kvc_fail(KVCACHED_E_UNSUPPORTED, "backend %d: this build has %d (host) and %d (cuda)", o->backend,
                    KVCACHED_BACKEND_HOST, KVCACHED_BACKEND_CUDA);
  kvc_device_options asked = {.ordinal = o->device,
                              .pci_bus_id = o->pci_bus_id,
                              .page_size = o->page_size,
                              .large_page = o->large_page};
  int err = ctx->backend->open(&asked, &ctx->device);
  if (err) return err;
  const kvc_device *d = ctx->device;
  if (d->large_page < d->page_size || d->large_page % d->page_size != 0)
    return kvc_fail(KVCACHED_E_INVAL, "large_page %zu: a multiple of page_size, which is %zu", d->large_page,
                    d->page_size);
  if (o->lookahead == KVCACHED_LOOKAHEAD_AUTO)
    ctx->options.lookahead = d->edits_anytime ? KVCACHED_LOOKAHEAD_THREAD : KVCACHED_LOOKAHEAD_INLINE;
  return KVCACHED_OK;
}

static int join_ledger(struct kvcached_ctx *ctx, char group[KVCACHED_GROUP_MAX + 1]) {
  const kvcached_options_t *o = &ctx->options;
  char standard[KVCACHED_PATH_MAX];
  const char *path = o->ledger_path;
  int err;
  if (!path) {
    err = kvcached_ledger_default_path(ctx->device->id, standard, sizeof(standard));
    if (err) return err;
    path = standard;
  }
  err = kvc_ledger_open(path, &ctx->ledger);
  if (err) return err;
  if (o->slot >= 0) {
    ctx->slot = o->slot;
    return kvc_ledger_attach(ctx->ledger, o->slot, o->group, o->name, group, &ctx->fixed);
  }
  if (o->group)
    (void)snprintf(group, KVCACHED_GROUP_MAX + 1, "%s", o->group);
  else
    (void)snprintf(group, KVCACHED_GROUP_MAX + 1, "pid-%ld", (long)ctx->pid);
  err = kvc_ledger_take(ctx->ledger, group, o->name, &ctx->slot);
  if (err || !o->fixed) return err;
  kvc_shortage shortage;
  return kvc_ledger_claim(ctx->ledger, ctx->slot, KVC_CLAIM_FIXED, o->fixed, o->limit, o->room_wait_ms,
                          &shortage);
}

/* Memory of a GPU that no slot accounts for: another user's, another program's, or that of a container with a
   /dev/shm of its own. The last is a mistake that nothing else would show. */
static void log_strangers(struct kvcached_ctx *ctx) {
  uint64_t available, total;
  kvc_account a = {0};
  if (ctx->options.backend != KVCACHED_BACKEND_CUDA ||
      ctx->backend->memory(ctx->device, &available, &total) ||
      kvc_ledger_account(ctx->ledger, ctx->slot, ctx->limit, &a) || available > total)
    return;
  uint64_t used = total - available, unknown = used > a.card_charge ? used - a.card_charge : 0;
  if (unknown > total / 20 && unknown > (uint64_t)1 << 30)
    kvc_log(ctx, KVCACHED_LOG_WARN,
            "%" PRIu64
            " bytes of %s are in use by what no slot of %s accounts for: programs without this "
            "library, other users, or containers that do not share /dev/shm with this process",
            unknown, ctx->device->name, kvcached_ledger_path(ctx->ledger));
}

static int make_locks(struct kvcached_ctx *ctx) {
  int err = kvc_gate_init(&ctx->gate);
  if (err) return err;
  int e = pthread_mutex_init(&ctx->mutex, NULL);
  if (e) goto no_mutex;
  e = pthread_cond_init(&ctx->busy_cond, NULL);
  if (e) goto no_busy;
  e = kvc_cond_init(&ctx->work_cond);
  if (!e) return KVCACHED_OK;
  (void)pthread_cond_destroy(&ctx->busy_cond);
no_busy:
  (void)pthread_mutex_destroy(&ctx->mutex);
no_mutex:
  kvc_gate_destroy(&ctx->gate);
  return kvc_fail_errno(KVCACHED_E_SYSTEM, e, "making a lock");
}

static void end_locks(struct kvcached_ctx *ctx) {
  (void)pthread_cond_destroy(&ctx->work_cond);
  (void)pthread_cond_destroy(&ctx->busy_cond);
  (void)pthread_mutex_destroy(&ctx->mutex);
  kvc_gate_destroy(&ctx->gate);
}

static int open_all(struct kvcached_ctx *ctx) {
  const kvcached_options_t *o = &ctx->options;
  int err = open_device(ctx);
  if (err) return err;
  char group[KVCACHED_GROUP_MAX + 1] = "";
  if (o->ledger_path && !*o->ledger_path) {
    if (o->fixed > o->limit)
      return kvc_fail(KVCACHED_E_LIMIT, "%" PRIu64 " bytes held outside the library; the limit is %" PRIu64,
                      o->fixed, o->limit);
    kvc_log(ctx, KVCACHED_LOG_INFO, "%s: pages of %zu and %zu bytes, no ledger", ctx->device->name,
            ctx->device->page_size, ctx->device->large_page);
    kvc_measure(ctx);
    return KVCACHED_OK;
  }
  err = join_ledger(ctx, group);
  if (err) return err;
  kvc_log(ctx, KVCACHED_LOG_INFO, "%s: pages of %zu and %zu bytes, group %s, slot %d of %s",
          ctx->device->name, ctx->device->page_size, ctx->device->large_page, group, ctx->slot,
          kvcached_ledger_path(ctx->ledger));
  kvc_ledger_set_owner(ctx->ledger, ctx);
  log_strangers(ctx);
  kvc_measure(ctx);
  return o->flags & KVCACHED_NO_CONTROL ? KVCACHED_OK : kvc_control_start(ctx);
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
  kvc_detail before = kvc_detail_keep(); /* what can be done without leaves one too */
  ctx->pid = kvc_pid();
  ctx->options = o;
  ctx->limit = o.limit;
  ctx->slot = -1;
  ctx->fixed = o.fixed;
  ctx->log = o.log;
  ctx->log_user = o.log_user;
  err = make_locks(ctx);
  if (err) {
    free(ctx);
    return err;
  }
  err = open_all(ctx);
  if (!err && o.idle_trim_ms > 0) {
    (void)pthread_mutex_lock(&ctx->mutex); /* commands are answered already */
    err = kvc_worker_start(ctx);
    (void)pthread_mutex_unlock(&ctx->mutex);
  }
  if (err) {
    kvc_detail d = kvc_detail_keep();
    kvc_stop_threads(ctx);
    kvcached_ledger_close(ctx->ledger);
    if (ctx->device) ctx->backend->close(ctx->device);
    end_locks(ctx);
    free(ctx);
    return kvc_detail_again(err, &d);
  }
  ctx->options.name = ctx->options.group = ctx->options.ledger_path = ctx->options.pci_bus_id = NULL;
  *out = ctx;
  return kvc_detail_again(KVCACHED_OK, &before);
}

kvcached_ctx_t kvcached_init(int device_id) {
  kvcached_options_t o;
  kvcached_options_init(&o);
  if (device_id != KVCACHED_DEVICE_HOST) {
    o.backend = KVCACHED_BACKEND_CUDA;
    o.device = device_id;
  }
  kvcached_ctx_t ctx = NULL;
  return kvcached_open(&o, &ctx) == KVCACHED_OK ? ctx : NULL;
}

void kvcached_shutdown(kvcached_ctx_t ctx) {
  if (!ctx || kvc_check_ctx(ctx)) return;
  kvc_stop_threads(ctx);
  (void)pthread_mutex_lock(&ctx->mutex); /* lets a call under way on another thread end first */
  while (ctx->parked > 0) (void)pthread_cond_wait(&ctx->busy_cond, &ctx->mutex);
  if (kvc_quiesce(ctx) && kvc_quiesce(ctx))
    kvc_log(ctx, KVCACHED_LOG_ERROR, "the device does not come to rest: %s", kvcached_last_error());
  for (struct kvcached_region *r = ctx->regions, *next; r; r = next) {
    next = r->next;
    kvc_region_free(r, 1); /* a device that cannot be waited for is lost, and its memory with it */
  }
  while (ctx->regions) kvc_region_abandon(ctx->regions);
  uint64_t freed;
  if (kvc_pool_trim(ctx, 0, &freed))
    kvc_log(ctx, KVCACHED_LOG_ERROR, "%" PRIu64 " bytes are left to the end of the process: %s",
            kvc_pool_bytes(ctx), kvcached_last_error());
  kvc_pool_free(&ctx->pool);
  (void)pthread_mutex_unlock(&ctx->mutex);
  /* The slot last: until here others count what this context held. */
  ctx->backend->close(ctx->device);
  kvcached_ledger_close(ctx->ledger);
  end_locks(ctx);
  free(ctx);
}

size_t kvcached_page_size(kvcached_ctx_t ctx) { return ctx ? ctx->device->page_size : 0; }
