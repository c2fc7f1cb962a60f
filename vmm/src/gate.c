/*
 * The gate: threads inside are counted in one word, with a bit beside the count for who wants to be alone.
 *
 * A thread remembers the gates it is inside itself, so entering again costs no atomic step, and cannot wait
 * for a thread that waits for this one to leave. Waiting is by the gate's mutex and condition; the fast paths
 * do not touch them.
 */
#include "context.h"

#include <time.h>

#define ALONE UINT32_C(0x80000000)

/* ---- which gates the calling thread is inside ---- */

/* A thread is rarely inside more than one: one for each device it uses. */
#define THREAD_GATES 64

typedef struct visit {
  uint64_t gate; /* id; 0: free */
  uint64_t depth;
} visit;

static _Thread_local visit visits[THREAD_GATES];
static _Thread_local size_t visits_top; /* entries from here on are free */

static visit *find_visit(uint64_t gate) {
  for (size_t i = 0; i < visits_top; i++)
    if (visits[i].gate == gate) return &visits[i];
  return NULL;
}

static visit *add_visit(uint64_t gate) {
  size_t i = 0;
  while (i < visits_top && visits[i].gate != 0) i++;
  if (i == THREAD_GATES) return NULL;
  if (i == visits_top) visits_top++;
  visits[i] = (visit){.gate = gate};
  return &visits[i];
}

static void drop_visit(visit *v) {
  v->gate = 0;
  while (visits_top > 0 && visits[visits_top - 1].gate == 0) visits_top--;
}

/* ---- the gate ---- */

int kvc_cond_init(pthread_cond_t *cond) {
  pthread_condattr_t attr;
  int e = pthread_condattr_init(&attr);
  if (e) return e;
  e = pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
  if (!e) e = pthread_cond_init(cond, &attr);
  (void)pthread_condattr_destroy(&attr);
  return e;
}

int kvc_gate_init(kvc_gate *gate) {
  static _Atomic uint64_t last_id;
  int e = pthread_mutex_init(&gate->mutex, NULL);
  if (e) return kvc_fail_errno(KVCACHED_E_SYSTEM, e, "making the gate's mutex");
  e = kvc_cond_init(&gate->cond);
  if (e) {
    (void)pthread_mutex_destroy(&gate->mutex);
    return kvc_fail_errno(KVCACHED_E_SYSTEM, e, "making the gate's condition");
  }
  atomic_init(&gate->state, 0);
  gate->id = atomic_fetch_add(&last_id, 1) + 1;
  return KVCACHED_OK;
}

void kvc_gate_destroy(kvc_gate *gate) {
  visit *v = find_visit(gate->id);
  if (v) drop_visit(v); /* closed from inside: the place in the thread's list is free again */
  (void)pthread_cond_destroy(&gate->cond);
  (void)pthread_mutex_destroy(&gate->mutex);
}

/* Counts one thread more, unless somebody wants to be alone. */
static int try_enter(kvc_gate *gate, uint32_t *inside) {
  uint32_t state = atomic_load_explicit(&gate->state, memory_order_relaxed);
  while (!(state & ALONE)) {
    if (atomic_compare_exchange_weak(&gate->state, &state, state + 1)) {
      *inside = state + 1;
      return 1;
    }
  }
  return 0;
}

static void come_in(kvc_gate *gate, uint32_t *inside) {
  if (try_enter(gate, inside)) return;
  (void)pthread_mutex_lock(&gate->mutex);
  while (!try_enter(gate, inside)) (void)pthread_cond_wait(&gate->cond, &gate->mutex);
  (void)pthread_mutex_unlock(&gate->mutex);
}

static void go_out(kvc_gate *gate, uint32_t *inside) {
  uint32_t state = atomic_fetch_sub(&gate->state, 1) - 1;
  *inside = state & ~ALONE;
  if (state != ALONE) return;
  /* The last one out, and somebody waits to be alone. */
  (void)pthread_mutex_lock(&gate->mutex);
  (void)pthread_cond_broadcast(&gate->cond);
  (void)pthread_mutex_unlock(&gate->mutex);
}

int kvc_gate_enter(kvc_gate *gate, int *first, uint32_t *inside) {
  visit *v = find_visit(gate->id);
  *first = v == NULL;
  if (v) {
    v->depth++;
    *inside = atomic_load_explicit(&gate->state, memory_order_relaxed) & ~ALONE;
    return KVCACHED_OK;
  }
  v = add_visit(gate->id);
  if (!v)
    return kvc_fail(KVCACHED_E_INVAL, "this thread is inside the gates of %d contexts: leave one first",
                    THREAD_GATES);
  v->depth = 1;
  come_in(gate, inside);
  return KVCACHED_OK;
}

int kvc_gate_leave(kvc_gate *gate, int *last, uint32_t *inside) {
  visit *v = find_visit(gate->id);
  if (!v) return kvc_fail(KVCACHED_E_INVAL, "the calling thread is not inside the gate: enter comes first");
  *last = v->depth == 1;
  if (--v->depth > 0) {
    *inside = atomic_load_explicit(&gate->state, memory_order_relaxed) & ~ALONE;
    return KVCACHED_OK;
  }
  drop_visit(v);
  go_out(gate, inside);
  return KVCACHED_OK;
}

void kvc_gate_step_out(kvc_gate *gate, uint64_t *depth, uint32_t *inside) {
  visit *v = find_visit(gate->id);
  *depth = v ? v->depth : 0;
  if (!v) return;
  drop_visit(v);
  go_out(gate, inside);
}

void kvc_gate_step_in(kvc_gate *gate, uint64_t depth, uint32_t *inside) {
  visit *v = depth > 0 ? add_visit(gate->id) : NULL;
  if (!v) return; /* it was not inside; the place it had in the thread's list is free still */
  v->depth = depth;
  come_in(gate, inside);
}

uint32_t kvc_gate_inside(const kvc_gate *gate) { return atomic_load(&gate->state) & ~ALONE; }

int kvc_gate_is_inside(const kvc_gate *gate) { return find_visit(gate->id) != NULL; }

int kvc_gate_lock(kvc_gate *gate, uint32_t wait_ms) {
  if (kvc_gate_is_inside(gate))
    return kvc_fail(KVCACHED_E_BUSY, "the calling thread is inside the gate itself: it has to leave first");
  struct timespec until;
  (void)clock_gettime(CLOCK_MONOTONIC, &until);
  until.tv_sec += (time_t)(wait_ms / 1000);
  until.tv_nsec += (long)(wait_ms % 1000) * 1000000;
  if (until.tv_nsec >= 1000000000) {
    until.tv_sec++;
    until.tv_nsec -= 1000000000;
  }
  int err = KVCACHED_OK, e = 0;
  (void)pthread_mutex_lock(&gate->mutex);
  while ((atomic_load(&gate->state) & ALONE) && e == 0)
    e = pthread_cond_timedwait(&gate->cond, &gate->mutex, &until);
  if (atomic_load(&gate->state) & ALONE) {
    err = kvc_fail(KVCACHED_E_BUSY, "after %u ms a sleep or trim on another thread was still under way",
                   wait_ms);
  } else {
    (void)atomic_fetch_or(&gate->state, ALONE);
    e = 0;
    while (atomic_load(&gate->state) != ALONE && e == 0)
      e = pthread_cond_timedwait(&gate->cond, &gate->mutex, &until);
    uint32_t state = atomic_load(&gate->state);
    if (state != ALONE) {
      (void)atomic_fetch_and(&gate->state, ~ALONE);
      (void)pthread_cond_broadcast(&gate->cond); /* those that were stopped meanwhile */
      err = kvc_fail(KVCACHED_E_BUSY, "after %u ms %u threads were still inside the gate: wait longer",
                     wait_ms, state & ~ALONE);
    }
  }
  (void)pthread_mutex_unlock(&gate->mutex);
  return err;
}

void kvc_gate_unlock(kvc_gate *gate) {
  (void)pthread_mutex_lock(&gate->mutex);
  (void)atomic_fetch_and(&gate->state, ~ALONE);
  (void)pthread_cond_broadcast(&gate->cond);
  (void)pthread_mutex_unlock(&gate->mutex);
}

/* ---- the public face ---- */

/* Tells the ledger how many are inside. Threads that come and go at once may tell it in another order than
   they came; whoever sees that the number has changed meanwhile tells it again, so the last word is right.
   The look is a step that changes nothing, because a plain one might come before what is told has arrived. */
void kvc_mark_inside(struct kvcached_ctx *ctx, uint32_t inside) {
  uint64_t now_ns = kvc_coarse_ns();
  atomic_store_explicit(&ctx->last_inside_ns, now_ns, memory_order_relaxed);
  if (!ctx->ledger) return;
  for (;;) {
    kvc_ledger_mark_inside(ctx->ledger, ctx->slot, inside);
    uint32_t now = atomic_fetch_add(&ctx->gate.state, 0) & ~ALONE;
    if (now == inside) break;
    inside = now;
  }
  if (inside == 0) kvc_ledger_ring_if_wanted(ctx->ledger, now_ns); /* it may be put to sleep now */
}

int kvcached_enter(kvcached_ctx_t ctx) {
  int err = kvc_check_ctx(ctx), first, last;
  uint32_t inside;
  if (err) return err;
  err = kvc_gate_enter(&ctx->gate, &first, &inside);
  if (err) return err;
  /* Before it wakes: nobody asks a context for memory that has just come to use it. */
  if (first) kvc_mark_inside(ctx, inside);
  if (atomic_load(&ctx->asleep) == 0) return KVCACHED_OK;

  (void)pthread_mutex_lock(&ctx->mutex);
  err = kvc_wake(ctx, KVCACHED_ALL_KINDS);
  if (err == KVCACHED_E_LIMIT) ctx->counters.limit_failures++;
  /* Before the mutex goes: a shutdown that has ended the wait for room takes it, and then the gate is no
   * more. */
  if (err) {
    (void)kvc_gate_leave(&ctx->gate, &last, &inside);
    if (last) kvc_mark_inside(ctx, inside);
  }
  (void)pthread_mutex_unlock(&ctx->mutex);
  return err;
}

int kvcached_leave(kvcached_ctx_t ctx) {
  int err = kvc_check_ctx(ctx), last;
  uint32_t inside;
  if (err) return err;
  err = kvc_gate_leave(&ctx->gate, &last, &inside);
  if (!err && last) kvc_mark_inside(ctx, inside);
  return err;
}

int kvcached_set_queued(kvcached_ctx_t ctx, uint32_t requests) {
  int err = kvc_check_ctx(ctx);
  if (err) return err;
  if (ctx->ledger) kvc_ledger_mark_queued(ctx->ledger, ctx->slot, requests);
  return KVCACHED_OK;
}
