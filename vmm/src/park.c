/*
 * Parking: a call that was refused waits for its lessor to make room, outside the gate, so that the lessor
 * may even have this context sleep meanwhile (kvcached.h says it from the caller's side).
 *
 * A call that parks has undone everything before, and works everything out anew after. What it lacks stays
 * published until it has succeeded or failed, so that trying again rings no bell; and it tries only where the
 * sums say that there is room, so that a thread that waits does not go in and out of the gate. Of several
 * that wait in a group the one that came first goes first: a younger one leaves room for what older ones
 * lack, but not for longer than a moment, since an older one may be stopped, or lack more than can be had for
 * now.
 */
#include "context.h"

#include <inttypes.h>
#include <time.h>

#define LOOK_NS INT64_C(100000000)  /* between looks; the bell makes it look at once */
#define GRACE_NS INT64_C(200000000) /* how long a younger one leaves what it could have */

static _Thread_local int never;

void kvc_never_park(void) { never = 1; }

int kvc_must_sleep_on(const struct kvcached_ctx *ctx) { return ctx->told && !never && !kvc_in_reload(); }

/* ---- what is lacking ---- */

typedef struct lack {
  uint64_t missing, wake; /* bytes that are to be had: new, and of sleeping pages */
  uint64_t kept;          /* of the context's spare memory, what the call uses itself */
} lack;

static uint64_t sleeping_bytes(const struct kvcached_ctx *ctx, const kvc_parking *p) {
  uint64_t bytes = 0;
  for (const struct kvcached_region *r = ctx->regions; r; r = r->next)
    if (p->only ? r == p->only : (p->kinds & KVCACHED_KIND_BIT(r->kind)) != 0)
      bytes += kvc_without(r, 0, r->pages.top, KVC_ASLEEP);
  return bytes;
}

/* Several calls of one context lack what each is missing, but wake the same pages. */
static void add(const struct kvcached_ctx *ctx, const kvc_parking *p, lack *sum) {
  uint64_t wake = sleeping_bytes(ctx, p);
  if (wake > sum->wake) sum->wake = wake;
  sum->missing = kvc_sat_add(sum->missing, p->more);
  if (p->spans.n == 0) return;
  sum->missing = kvc_sat_add(sum->missing, kvc_missing(p->region, p->spans, KVC_UNMAPPED));
  sum->kept += kvc_own_use(p->region, p->spans);
}

/* Bytes by which what the context holds has to grow, once it has used what it could give up. */
static uint64_t growth(const struct kvcached_ctx *ctx, const lack *l) {
  uint64_t spare = kvc_spare_bytes(ctx), bytes = kvc_sat_add(l->missing, l->wake);
  spare = spare > l->kept ? spare - l->kept : 0;
  return bytes > spare ? bytes - spare : 0;
}

static uint64_t minus(uint64_t a, uint64_t b) { return a > b ? a - b : 0; }

void kvc_publish_wants(struct kvcached_ctx *ctx) {
  kvc_want want = {.parked = ctx->parked + ctx->away};
  kvc_account a;
  lack all = {0};
  for (const kvc_parking *p = ctx->parkings; p; p = p->next) {
    add(ctx, p, &all);
    if (want.since_ns == 0 || (uint64_t)p->since_ns < want.since_ns) want.since_ns = (uint64_t)p->since_ns;
  }
  if (ctx->parkings) {
    kvc_detail d = kvc_detail_keep();
    uint64_t left = kvc_ledger_account(ctx->ledger, ctx->slot, ctx->limit, &a) ? 0 : a.lease_left;
    (void)kvc_detail_again(KVCACHED_OK, &d);
    want.bytes = minus(growth(ctx, &all), left);
    /* Something was refused, whatever the sums of several calls say. */
    if (want.bytes == 0) want.bytes = ctx->device->page_size;
  }
  ctx->wants = want.bytes;
  kvc_ledger_want(ctx->ledger, ctx->slot, &want);
}

/* ---- whether to go on waiting ---- */

typedef enum verdict { WAIT, TRY, GIVE_UP } verdict;

/* Whether the device has this much, with what its driver may keep back. */
static int device_has(struct kvcached_ctx *ctx, uint64_t bytes, int strict) {
  uint64_t available, total;
  if (ctx->backend->memory(ctx->device, &available, &total)) return 1;
  return available >= kvc_sat_add(bytes, strict ? total / 64 : 0);
}

/* Whether older calls of the group leave room for this one, or have left it unused for a moment. */
static int is_its_turn(struct kvcached_ctx *ctx, kvc_parking *p, uint64_t lacks, uint64_t room) {
  uint64_t older;
  if (kvc_ledger_older_wants(ctx->ledger, ctx->slot, (uint64_t)p->since_ns, &older)) return 1;
  if (kvc_sat_add(lacks, older) <= room) return 1;
  int64_t now = kvc_now_ns();
  if (p->fitted_ns == 0) p->fitted_ns = now;
  return now - p->fitted_ns >= GRACE_NS;
}

/* The mutex is held. */
static verdict look(struct kvcached_ctx *ctx, kvc_parking *p, const char **why) {
  kvc_account a;
  lack own = {0};
  if (kvc_check_ctx(ctx)) return *why = "this process was forked from the context's", GIVE_UP;
  if (atomic_load(&ctx->stopping)) return *why = "the context is being shut down", GIVE_UP;
  if (atomic_load(&ctx->refusals) != p->refusals) return *why = "its lessor refused", GIVE_UP;
  if (kvc_ledger_account(ctx->ledger, ctx->slot, ctx->limit, &a))
    return *why = "the ledger cannot be read", GIVE_UP;
  if (!a.leased) {
    ctx->told = 0; /* there is nobody left to have it wake */
    return *why = "its lessor has ended", GIVE_UP;
  }
  add(ctx, p, &own);
  uint64_t grows = growth(ctx, &own), lacks = minus(grows, a.lease_left);
  uint64_t limit = a.group_limit < a.card_limit ? a.group_limit : a.card_limit;
  if (kvc_sat_add(a.held, grows) > limit)
    return *why = "what it has and lacks is more than the limit alone", GIVE_UP;
  if (kvc_now_ns() >= p->until_ns) return *why = "nobody made room in time", GIVE_UP;
  if (ctx->told) return WAIT;
  uint64_t room = minus(a.group_limit, a.group_charge), card = minus(a.card_limit, a.card_charge);
  if (card < room) room = card;
  if (lacks > room || (p->device && !device_has(ctx, grows, 0))) {
    p->fitted_ns = 0;
    return WAIT;
  }
  return is_its_turn(ctx, p, lacks, room) ? TRY : WAIT;
}

/* ---- other gates ---- */

/* One call of a program may be inside the gates of several devices. Waiting in one of them it leaves the
   others too: or what it holds there could not be had, and who has it to give up waits for this one. */

enum { OTHERS = 16 };

typedef struct outing {
  struct kvcached_ctx *ctx;
  uint64_t depth;
} outing;

static _Thread_local int coming_back;

static int can_park(const struct kvcached_ctx *ctx) {
  return ctx->options.group_wait_ms > 0 && ctx->options.slot >= 0 && ctx->ledger;
}

static void count_away(struct kvcached_ctx *ctx, int more) {
  (void)pthread_mutex_lock(&ctx->mutex);
  ctx->away += (uint32_t)more;
  kvc_publish_wants(ctx);
  (void)pthread_mutex_unlock(&ctx->mutex);
}

static int is_entered(const struct kvcached_ctx *ctx) {
  return can_park(ctx) && kvc_gate_is_inside(&ctx->gate);
}

/* The calling thread has left the gate of the context that it waits in. */
static size_t leave_others(outing out[OTHERS]) {
  struct kvcached_ctx *entered[OTHERS];
  size_t n = kvc_ledger_owners(is_entered, entered, OTHERS);
  for (size_t i = 0; i < n; i++) {
    uint32_t inside = 0;
    out[i].ctx = entered[i];
    count_away(entered[i], 1);
    kvc_gate_step_out(&entered[i]->gate, &out[i].depth, &inside);
    kvc_mark_inside(entered[i], inside);
  }
  return n;
}

/* Inside them again, and all awake. Waking may wait for room, out of all gates again: who comes back from the
   first wait sees to it that all are awake at the end. */
static int return_to_others(const outing *out, size_t n) {
  uint32_t inside;
  for (size_t i = 0; i < n; i++) {
    kvc_gate_step_in(&out[i].ctx->gate, out[i].depth, &inside);
    kvc_mark_inside(out[i].ctx, inside);
    count_away(out[i].ctx, -1);
  }
  if (coming_back) return KVCACHED_OK;
  int err = KVCACHED_OK;
  coming_back = 1;
  for (size_t i = 0; i < n && !err;) {
    struct kvcached_ctx *c = out[i++].ctx;
    if (atomic_load(&c->asleep) == 0) continue;
    (void)pthread_mutex_lock(&c->mutex);
    err = kvc_wake(c, KVCACHED_ALL_KINDS);
    (void)pthread_mutex_unlock(&c->mutex);
    i = 0; /* others may have been put to sleep meanwhile */
  }
  coming_back = 0;
  return err;
}

/* ---- waiting ---- */

static int may_park(struct kvcached_ctx *ctx, const kvc_parking *p, int err) {
  if (!can_park(ctx) || never) return 0;
  if (kvc_in_reload()) return 0; /* another context's mutex is held */
  if (err == KVCACHED_E_LIMIT) return 1;
  if (err != KVCACHED_E_NOMEM) return 0;
  /* The device is short, or something else of the system that nobody can make room in. */
  lack own = {0};
  add(ctx, p, &own);
  return !device_has(ctx, kvc_sat_add(own.missing, own.wake), 1);
}

static void begin(struct kvcached_ctx *ctx, kvc_parking *p) {
  p->since_ns = kvc_now_ns();
  p->until_ns = p->since_ns + (int64_t)ctx->options.group_wait_ms * 1000000;
  p->refusals = atomic_load(&ctx->refusals);
  if (kvc_gate_is_inside(&ctx->gate)) { /* there everything has to be awake */
    p->kinds = KVCACHED_ALL_KINDS;
    p->only = NULL;
  }
  p->next = ctx->parkings;
  ctx->parkings = p;
}

static void note(struct kvcached_ctx *ctx, kvc_parking *p, const kvc_detail *refused) {
  p->noted = 1;
  ctx->counters.parks++;
  if (p->region) p->region->counters.parks++;
  kvc_log(ctx, KVCACHED_LOG_INFO, "waits for %" PRIu64 " bytes of room: %s", ctx->wants, refused->text);
}

/* Outside the gate, without the mutex, which is taken for a look. */
static verdict wait_for_room(struct kvcached_ctx *ctx, kvc_parking *p, const char **why) {
  for (;;) {
    uint32_t seen = kvc_ledger_bell(ctx->ledger);
    (void)pthread_mutex_lock(&ctx->mutex);
    verdict v = look(ctx, p, why);
    kvc_publish_wants(ctx);
    (void)pthread_mutex_unlock(&ctx->mutex);
    if (v != WAIT) return v;
    int64_t left = p->until_ns - kvc_now_ns();
    (void)kvc_ledger_bell_wait(ctx->ledger, seen, left < LOOK_NS ? left : LOOK_NS);
  }
}

int kvc_park(struct kvcached_ctx *ctx, kvc_parking *p, int err) {
  if (!may_park(ctx, p, err)) return 0;
  kvc_detail d = kvc_detail_keep();
  const char *why = "";
  if (p->since_ns == 0) begin(ctx, p);
  int again = p->noted;
  p->device = err == KVCACHED_E_NOMEM;
  verdict v = look(ctx, p, &why);
  if (v != GIVE_UP) {
    uint64_t depth;
    uint32_t inside = 0;
    outing others[OTHERS];
    ctx->parked++;
    kvc_publish_wants(ctx);
    if (!again) note(ctx, p, &d);
    (void)pthread_mutex_unlock(&ctx->mutex);
    kvc_gate_step_out(&ctx->gate, &depth, &inside);
    if (depth > 0) kvc_mark_inside(ctx, inside);
    size_t n = leave_others(others);
    /* The sums said that it fits, and the claim was refused: not again at once. */
    if (again && v == TRY) (void)nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
    v = wait_for_room(ctx, p, &why);
    kvc_gate_step_in(&ctx->gate, depth, &inside);
    if (depth > 0) kvc_mark_inside(ctx, inside);
    if (return_to_others(others, n)) {
      kvc_log(ctx, KVCACHED_LOG_ERROR, "another context that is entered stays asleep: %s",
              kvcached_last_error());
      v = GIVE_UP;
      why = "another context that this thread is inside could not be woken";
    }
    (void)pthread_mutex_lock(&ctx->mutex);
    ctx->parked--;
    (void)pthread_cond_broadcast(&ctx->busy_cond); /* a shutdown waits for it */
    kvc_publish_wants(ctx);
  }
  if (v == TRY) return kvc_detail_again(1, &d);
  (void)kvc_fail(err, "%.860s; not waited for, or after %" PRId64 " ms no longer: %s", d.text,
                 (kvc_now_ns() - p->since_ns) / 1000000, why);
  return 0;
}

int kvc_park_end(struct kvcached_ctx *ctx, kvc_parking *p, int err) {
  if (p->since_ns == 0) return err;
  kvc_parking **at = &ctx->parkings;
  while (*at && *at != p) at = &(*at)->next;
  if (*at) *at = p->next;
  p->since_ns = 0;
  kvc_publish_wants(ctx);
  if (!err || p->wakes || atomic_load(&ctx->asleep) == 0 || atomic_load(&ctx->stopping) ||
      !kvc_gate_is_inside(&ctx->gate))
    return err;
  kvc_detail d = kvc_detail_keep();
  ctx->told = 0; /* it is not to sleep inside the gate, if there is room */
  if (kvc_wake(ctx, KVCACHED_ALL_KINDS) == KVCACHED_OK) return kvc_detail_again(err, &d);
  kvc_detail e = kvc_detail_keep();
  kvc_log(ctx, KVCACHED_LOG_ERROR, "regions sleep while the gate is entered: %s", e.text);
  return kvc_fail(err, "%.480s; what slept meanwhile stays asleep: %.480s", d.text, e.text);
}
