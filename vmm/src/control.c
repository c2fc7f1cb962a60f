/*
 * The control thread: it answers commands that other processes left in the context's slot. It touches no page
 * before it has the gate for itself, and a context that is in use says so within some milliseconds, rather
 * than let the asker wait.
 */
#include "context.h"

#include <time.h>

#define GATE_WAIT_MS 20
#define MUTEX_WAIT_MS 50
#define LOOK_MS 1000 /* between looks at whether to stop; a ring makes it look at once */

static void nap(long ms) {
  struct timespec t = {.tv_nsec = ms * 1000000};
  (void)nanosleep(&t, NULL);
}

/* By trying: a timed lock would wait on the clock that people set. */
static int lock_in_time(struct kvcached_ctx *ctx) {
  for (int ms = 0; ms < MUTEX_WAIT_MS; ms++) {
    if (pthread_mutex_trylock(&ctx->mutex) == 0) return KVCACHED_OK;
    nap(1);
  }
  return kvc_fail(KVCACHED_E_BUSY, "another call was under way on the context for %d ms", MUTEX_WAIT_MS);
}

static int trim_alone(struct kvcached_ctx *ctx, uint64_t *freed) {
  kvc_wait_all(ctx);
  int err = kvc_call(ctx)->quiesce(ctx->device);
  return err ? err : kvc_trim(ctx, 0, freed);
}

static int carry_out(struct kvcached_ctx *ctx, int command, uint64_t *freed) {
  int err;
  switch (command) {
    case KVCACHED_CMD_TRIM:
    case KVCACHED_CMD_SLEEP:
      err = kvc_gate_lock(&ctx->gate, GATE_WAIT_MS);
      if (err) return err;
      err = lock_in_time(ctx);
      if (!err) {
        err = command == KVCACHED_CMD_TRIM ? trim_alone(ctx, freed)
                                           : kvc_sleep_alone(ctx, KVCACHED_ALL_KINDS, freed);
        if (command == KVCACHED_CMD_SLEEP && (ctx->parkings || ctx->away) && atomic_load(&ctx->asleep) > 0)
          ctx->told = 1;
        (void)pthread_mutex_unlock(&ctx->mutex);
      }
      kvc_gate_unlock(&ctx->gate);
      return err;
    case KVCACHED_CMD_WAKE:
      err = kvcached_enter(ctx);
      if (!err) err = kvcached_leave(ctx);
      if (!err) kvc_ledger_bell_ring(ctx->ledger); /* for its own calls that wait */
      return err;
    case KVCACHED_CMD_REFUSE:
      atomic_fetch_add(&ctx->refusals, 1);
      kvc_ledger_bell_ring(ctx->ledger);
      return KVCACHED_OK;
    default: return kvc_fail(KVCACHED_E_INVAL, "command %d: there is none such", command);
  }
}

static void *control_body(void *arg) {
  struct kvcached_ctx *ctx = arg;
  uint64_t measured_ns = 0;
  kvc_never_park(); /* or there were nobody to answer its lessor */
  while (!atomic_load(&ctx->stopping)) {
    int command = 0;
    int got = kvc_ledger_next_command(ctx->ledger, ctx->slot, LOOK_MS, &command);
    if (got <= 0) {
      if (!atomic_load(&ctx->stopping)) kvc_measure_again(ctx, &measured_ns);
      continue;
    }
    uint64_t freed = 0;
    int result = carry_out(ctx, command, &freed);
    if (result)
      kvc_log(ctx, KVCACHED_LOG_INFO, "command %d: %s: %s", command, kvcached_err_name(result),
              kvcached_last_error());
    kvc_ledger_answer(ctx->ledger, ctx->slot, result, freed);
  }
  return NULL;
}

int kvc_control_start(struct kvcached_ctx *ctx) {
  if (!ctx->ledger || ctx->control_runs) return KVCACHED_OK;
  int err = kvc_thread_start(&ctx->control, control_body, ctx, "kvc-control");
  if (err) return err;
  ctx->control_runs = 1;
  kvc_ledger_control(ctx->ledger, ctx->slot, 1);
  return KVCACHED_OK;
}

void kvc_stop_threads(struct kvcached_ctx *ctx) {
  atomic_store(&ctx->stopping, 1);
  if (ctx->ledger) kvc_ledger_bell_ring(ctx->ledger); /* calls that wait for room end */
  if (ctx->control_runs) {
    kvc_ledger_ring(ctx->ledger, ctx->slot);
    (void)pthread_join(ctx->control, NULL); /* a command being carried out is answered first */
    kvc_ledger_control(ctx->ledger, ctx->slot, 0);
    ctx->control_runs = 0;
  }
  (void)pthread_mutex_lock(&ctx->mutex); /* a helper between its look at `stopping` and its wait */
  (void)pthread_cond_broadcast(&ctx->work_cond);
  (void)pthread_cond_broadcast(&ctx->busy_cond);
  int helper = ctx->worker_runs;
  ctx->worker_runs = 0;
  (void)pthread_mutex_unlock(&ctx->mutex);
  if (helper) (void)pthread_join(ctx->worker, NULL);
}
