/* Regions of all kinds with known content, for the tests of sleep. */
#include "sleep_kit.h"

#include "context.h"

size_t asleep(kvcached_ctx_t ctx) { return stats_of(ctx).asleep; }

void fill(kvcached_region_t r, size_t n, int tag) {
  size_t bytes = n * kvcached_region_page_size(r), size = kvcached_region_size(r);
  CHECK_OK(kvcached_ensure(r, 0, bytes < size ? bytes : size));
  for (size_t i = 0; i < n; i++) put_ends(r, i, tag + (int)i);
}

int filled(kvcached_region_t r, size_t n, int tag) {
  for (size_t i = 0; i < n; i++)
    if (!holds_ends(r, i, tag + (int)i)) return 0;
  return 1;
}

int has_copy(kvcached_region_t r) {
  pthread_mutex_lock(&r->ctx->mutex);
  int valid = r->copy.valid;
  pthread_mutex_unlock(&r->ctx->mutex);
  return valid;
}

void enter_and_leave(kvcached_ctx_t ctx) {
  CHECK_OK(kvcached_enter(ctx));
  CHECK_OK(kvcached_leave(ctx));
}

size_t go_to_sleep(kvcached_ctx_t ctx, unsigned kinds) {
  size_t freed;
  CHECK_OK(kvcached_sleep(ctx, kinds, 1000, &freed));
  return freed;
}

scene set_up(const kvcached_options_t *o) {
  scene s = {.ctx = open_with(o), .ledger = o->ledger_path, .page = test_page(), .large = test_large_page()};
  s.kv = reserve(s.ctx, KVCACHED_KV, 32 * s.page);
  s.weights = reserve(s.ctx, KVCACHED_WEIGHTS, 2 * s.large + s.page);
  s.scratch = reserve(s.ctx, KVCACHED_SCRATCH, s.large);
  fill(s.kv, 12, 10);
  CHECK_OK(kvcached_release(s.kv, 8 * s.page, 2 * s.page)); /* a hole of idle pages */
  fill(s.weights, 3, 60);
  fill(s.scratch, 1, 90);
  s.in_use = 10 * s.page + 3 * s.large + s.page;
  return s;
}

scene set_up_in(const char *name) {
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = scratch(name);
  o.group = "g";
  return set_up(&o);
}

int kv_is_there(const scene *s) {
  return filled(s->kv, 8, 10) && holds_ends(s->kv, 10, 20) && holds_ends(s->kv, 11, 21);
}

int weights_are_there(const scene *s) { return filled(s->weights, 3, 60); }
