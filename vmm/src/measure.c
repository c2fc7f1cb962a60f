/*
 * What the process holds on a GPU beside the context's pages: its CUDA context, and what its other allocators
 * took there. It is measured when the context is opened, and again once it has been used and is idle, at most
 * once a second, by the control thread: NVML takes milliseconds, and nobody waits for it.
 */
#include "context.h"

#include <inttypes.h>

/* 0: nothing is known, now or at all. */
static uint64_t measure(struct kvcached_ctx *ctx) {
  uint64_t bytes = 0;
  if (!ctx->backend->beside) return 0;
  int err = ctx->backend->beside(ctx->device, &bytes);
  if (err) kvc_log(ctx, KVCACHED_LOG_DEBUG, "the CUDA context is not measured: %s", kvcached_last_error());
  return err ? 0 : bytes;
}

void kvc_measure(struct kvcached_ctx *ctx) {
  uint64_t bytes = measure(ctx);
  if (bytes == 0) return;
  (void)pthread_mutex_lock(&ctx->mutex);
  if (bytes != ctx->measured) {
    kvc_log(ctx, KVCACHED_LOG_DEBUG,
            "%" PRIu64 " bytes of the device are held beside the pages, after %" PRIu64, bytes,
            ctx->measured);
    kvc_set_measured(ctx, bytes);
  }
  (void)pthread_mutex_unlock(&ctx->mutex);
}

void kvc_measure_again(struct kvcached_ctx *ctx, uint64_t *last_ns) {
  uint64_t used = atomic_load_explicit(&ctx->last_inside_ns, memory_order_relaxed);
  if (ctx->measured == 0 || used == *last_ns || kvc_gate_inside(&ctx->gate) > 0) return;
  *last_ns = used;
  kvc_measure(ctx);
}
