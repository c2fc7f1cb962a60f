/* Operations, each with every function of the backend made to fail at every place of it (drill.c). */
#include "drill.h"
#include "fault.h"

static void forget_tags(int *tags, size_t first, size_t end) {
  for (size_t i = first; i < end; i++) tags[i] = -1;
}

static void sleep_all(scene *s) { CHECK_OK(kvcached_sleep(s->ctx, KVCACHED_ALL_KINDS, 100, NULL)); }

static int do_ensure(scene *s) {
  int err = kvcached_ensure(s->kv, s->page, (KV_PAGES - 2) * s->page);
  fault_clear(); /* looking is not part of it */
  for (size_t i = 1; i < KV_PAGES - 1 && !err; i++)
    if (drill_layout[i] != 'e') CHECK(holds_ends(s->kv, i, 0));
  return err;
}
TEST(faults, ensure) { drill(&(operation){.name = "ensure", .run = do_ensure}); }

static int do_ensure_large(scene *s) {
  int err = kvcached_ensure(s->weights, 0, UNITS * s->large);
  fault_clear();
  if (!err) CHECK(holds(s->weights, 2 * s->large, 0, s->large));
  return err;
}
TEST(faults, ensure_large) { drill(&(operation){.name = "ensure_large", .run = do_ensure_large}); }

/* Unmapped pages, idle ones, such as are in use: as one call. */
static const size_t several[][2] = {{9, 4}, {2, 1}, {13, 1}, {5, 1}};
static int do_ensure_ranges(scene *s) {
  kvcached_range_t ranges[4];
  for (size_t k = 0; k < 4; k++)
    ranges[k] = (kvcached_range_t){several[k][0] * s->page, several[k][1] * s->page};
  int err = kvcached_ensure_ranges(s->kv, ranges, 4);
  fault_clear();
  for (size_t k = 0; k < 4 && !err; k++)
    for (size_t i = several[k][0]; i < several[k][0] + several[k][1]; i++)
      if (drill_layout[i] != 'e') CHECK(holds_ends(s->kv, i, 0));
  return err;
}
TEST(faults, ensure_ranges) { drill(&(operation){.name = "ranges", .run = do_ensure_ranges}); }
TEST(faults, ensure_ranges_asleep) {
  drill(&(operation){.name = "ranges", .set = sleep_all, .run = do_ensure_ranges, .leaves = SOME_REGIONS});
}

/* At the limit: idle pages give way, or one by one go into the pool. */
static void at_the_limit(scene *s) {
  kvcached_stats_t t = stats_of(s->ctx);
  kvcached_set_limit(s->ctx, t.mapped + t.pooled);
}
static int do_pressure(scene *s) { return kvcached_ensure(s->kv, 12 * s->page, 3 * s->page); }
TEST(faults, ensure_under_pressure) {
  drill(&(operation){.name = "pressure", .set = at_the_limit, .run = do_pressure, .leaves = LESS_IDLE});
}

static int do_prepare(scene *s) {
  int err = kvcached_prepare(s->kv, 0, KV_PAGES * s->page);
  if (!err) err = kvcached_prepare(s->weights, 2 * s->large, s->large);
  return err;
}
TEST(faults, prepare_inline) {
  drill(&(operation){
      .name = "prepare", .run = do_prepare, .lookahead = KVCACHED_LOOKAHEAD_INLINE, .silent = 1});
}
static int do_prepare_ranges(scene *s) {
  const kvcached_range_t ranges[] = {
      {2 * s->page, s->page}, {9 * s->page, 4 * s->page}, {3 * s->page, 1}, {0, KV_PAGES * s->page}};
  return kvcached_prepare_ranges(s->kv, ranges, 4);
}
TEST(faults, prepare_ranges_inline) {
  drill(&(operation){
      .name = "ranges", .run = do_prepare_ranges, .lookahead = KVCACHED_LOOKAHEAD_INLINE, .silent = 1});
}
TEST(faults, prepare_ranges_in_the_background) {
  drill(&(operation){
      .name = "ranges", .run = do_prepare_ranges, .lookahead = KVCACHED_LOOKAHEAD_THREAD, .silent = 1});
}
TEST(faults, prepare_in_the_background) {
  drill(&(operation){
      .name = "prepare", .run = do_prepare, .lookahead = KVCACHED_LOOKAHEAD_THREAD, .silent = 1});
}

static void release_some(scene *s) {
  CHECK_OK(kvcached_release(s->weights, s->large, s->large));
  s->weights_tag[1] = -1;
}
static int do_trim(scene *s) {
  size_t freed;
  uint64_t before = stats_of(s->ctx).mapped + stats_of(s->ctx).pooled;
  int err = kvcached_trim(s->ctx, 0, &freed);
  CHECK_EQ(before - stats_of(s->ctx).mapped - stats_of(s->ctx).pooled, freed);
  return err;
}
TEST(faults, trim) {
  drill(&(operation){.name = "trim", .set = release_some, .run = do_trim, .leaves = LESS_IDLE});
}

static int do_unreserve(scene *s) {
  if (s->kv) kvcached_unreserve(s->kv);
  s->kv = NULL;
  return KVCACHED_OK;
}
TEST(faults, unreserve) { drill(&(operation){.name = "unreserve", .run = do_unreserve}); }

TEST(faults, unreserve_asleep) {
  drill(&(operation){.name = "unreserve", .set = sleep_all, .run = do_unreserve});
}

static int do_alloc(scene *s) {
  void *p = kvcached_alloc(s->ctx, 5 * s->page);
  if (p) kvcached_free(s->ctx, p);
  return p ? KVCACHED_OK : KVCACHED_E_DEVICE;
}
TEST(faults, alloc) { drill(&(operation){.name = "alloc", .run = do_alloc, .vague = 1}); }

static int do_sleep(scene *s) {
  size_t freed;
  kvcached_stats_t before = stats_of(s->ctx);
  int err = kvcached_sleep(s->ctx, KVCACHED_ALL_KINDS, 100, &freed);
  kvcached_stats_t after = stats_of(s->ctx);
  CHECK_EQ(before.mapped + before.pooled - after.mapped - after.pooled, freed);
  return err;
}
TEST(faults, sleep) { drill(&(operation){.name = "sleep", .run = do_sleep, .leaves = LESS_IDLE}); }

/* With somebody who hears of it: each announcement has its end. */
static unsigned announced, ended;
static void count_events(int event, const struct kvcached_stats *now, void *user) {
  (void)user;
  if (event == KVCACHED_EVENT_SLEEPING) {
    CHECK_EQ(announced, ended);
    announced++;
  } else if (announced != ended) {
    CHECK(event == KVCACHED_EVENT_SLEPT || event == KVCACHED_EVENT_WOKE);
    CHECK_LE(event == KVCACHED_EVENT_SLEPT, now->asleep);
    ended++;
  }
}
TEST(faults, sleep_that_is_heard) {
  announced = ended = 0;
  drill(&(operation){.name = "sleep", .run = do_sleep, .leaves = LESS_IDLE, .event = count_events});
  CHECK(announced > 0 && announced == ended);
}

static void sleep_once(scene *s) {
  sleep_all(s);
  CHECK_OK(kvcached_wake(s->ctx, KVCACHED_ALL_KINDS));
  s->scratch_tag = -1;
}
TEST(faults, sleep_again) {
  drill(&(operation){.name = "sleep", .set = sleep_once, .run = do_sleep, .leaves = LESS_IDLE});
}

static int do_enter(scene *s) {
  int err = kvcached_enter(s->ctx);
  if (!err) CHECK_OK(kvcached_leave(s->ctx));
  return err;
}
TEST(faults, wake) {
  drill(&(operation){.name = "wake", .set = sleep_all, .run = do_enter, .leaves = SOME_REGIONS});
}

static int reload(kvcached_region_t region, void *user) {
  scene *s = user;
  unsigned char ends[64];
  const size_t unit = kvcached_region_page_size(region);
  for (size_t i = 0; i < UNITS; i++) {
    if (s->weights_tag[i] < 0) continue;
    memset(ends, s->weights_tag[i], sizeof(ends));
    if (kvcached_write(region, i * unit, ends, sizeof(ends)) ||
        kvcached_write(region, (i + 1) * unit - sizeof(ends), ends, sizeof(ends)))
      return 1;
  }
  return 0;
}

static void sleep_without_copy(scene *s) {
  CHECK_OK(kvcached_set_reload(s->weights, reload, s));
  sleep_all(s);
}
TEST(faults, wake_by_reload) {
  drill(&(operation){
      .name = "reload", .set = sleep_without_copy, .run = do_enter, .leaves = SOME_REGIONS, .host_limit = 5});
}

static int do_prepare_sleep(scene *s) { return kvcached_prepare_sleep(s->ctx, KVCACHED_ALL_KINDS); }
TEST(faults, prepare_sleep) {
  drill(&(operation){.name = "prepare_sleep", .run = do_prepare_sleep, .silent = 1});
}

static int do_read(scene *s) {
  unsigned char *buf = malloc(5 * s->page);
  CHECK(buf != NULL);
  int err = kvcached_read(s->kv, 0, buf, 5 * s->page);
  if (!err) CHECK(buf[0] == s->kv_tag[0] && buf[s->page] == s->kv_tag[1] && buf[2 * s->page] == 0);
  free(buf);
  return err;
}
TEST(faults, read) { drill(&(operation){.name = "read", .run = do_read}); }
TEST(faults, read_asleep) {
  drill(&(operation){.name = "read", .set = sleep_all, .run = do_read, .leaves = SOME_REGIONS});
}

static int do_write(scene *s) {
  unsigned char *buf = malloc(4 * s->page);
  CHECK(buf != NULL);
  memset(buf, 33, 4 * s->page);
  int err = kvcached_write(s->kv, 2 * s->page, buf, 4 * s->page); /* unmapped pages, then idle ones */
  free(buf);
  for (size_t i = 2; i < 6 && !err; i++) s->kv_tag[i] = 33;
  return err;
}
TEST(faults, write) { drill(&(operation){.name = "write", .run = do_write}); }

static int do_clear(scene *s) {
  forget_tags(s->kv_tag, 0, 1);
  int err = kvcached_clear(s->kv, 0, s->page);
  if (!err) s->kv_tag[0] = 0;
  return err;
}
TEST(faults, clear) { drill(&(operation){.name = "clear", .run = do_clear}); }

static int do_clear_all(scene *s) {
  forget_tags(s->kv_tag, 0, KV_PAGES);
  int err = kvcached_clear(s->kv, 0, KV_PAGES * s->page);
  for (size_t i = 0; i < KV_PAGES && !err; i++)
    if (drill_layout[i] == 'e') s->kv_tag[i] = 0;
  return err;
}
TEST(faults, clear_asleep) {
  drill(&(operation){.name = "clear", .set = sleep_all, .run = do_clear_all, .silent = 1});
}

static int do_reserve(scene *s) {
  kvcached_region_t r = (kvcached_region_t)1;
  int err = kvcached_reserve(s->ctx, KVCACHED_KV, 10 * s->page, &r);
  if (err) CHECK(r == NULL);
  kvcached_unreserve(r);
  return err;
}
TEST(faults, reserve) { drill(&(operation){.name = "reserve", .run = do_reserve}); }

static int do_set_limit(scene *s) {
  kvcached_set_limit(s->ctx, 0);
  kvcached_set_limit(s->ctx, SIZE_MAX);
  return KVCACHED_OK;
}
TEST(faults, set_limit) { drill(&(operation){.name = "set_limit", .run = do_set_limit, .silent = 1}); }

/* At the limit a page's worth more outside needs one of the idle pages; set back where it was had. */
static int do_set_fixed(scene *s) {
  int err = kvcached_set_fixed(s->ctx, s->page);
  return err ? err : kvcached_set_fixed(s->ctx, 0);
}
TEST(faults, set_fixed) {
  drill(&(operation){
      .name = "fixed", .set = at_the_limit, .run = do_set_fixed, .leaves = LESS_IDLE, .vague = 1});
}

static int do_trim_host(scene *s) { return kvcached_trim_host(s->ctx, 1, NULL); }
TEST(faults, trim_host) {
  drill(&(operation){.name = "trim_host", .set = sleep_once, .run = do_trim_host, .leaves = LESS_HOST});
}

/* Opening a context: everything is undone, its slot too. */
TEST(faults, open) {
  const char *path = scratch("open");
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = path;
  o.fixed = 100;
  kvcached_ctx_t ctx;
  fault_set(FAULT_OPEN, 1, KVCACHED_E_DEVICE);
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_DEVICE);
  CHECK(ctx == NULL);
  CHECK_DETAIL("injected");
  CHECK_EQ(fault_now().devices, 0);
  ctx = open_with(&o);
  CHECK_EQ(live_slots(path), 1);
  uint64_t free_bytes, total;
  fault_set(FAULT_MEMORY, 1, KVCACHED_E_DEVICE);
  CHECK_IS(kvcached_device_memory(ctx, &free_bytes, &total), KVCACHED_E_DEVICE);
  fault_set(FAULT_MEMORY, 1, KVCACHED_E_DEVICE);
  CHECK_EQ(kvcached_available(ctx), 0);
  fault_clear();
  CHECK(kvcached_available(ctx) > 0);
  kvcached_shutdown(ctx);
  CHECK_EQ(live_slots(path), 0);
}
