/*
 * Every function of the backend is made to fail at every place of every operation. After each failure what
 * the library counts, what the system and the ledger see and what the pages hold must be as before, and the
 * same call must work right after.
 */
#include "context.h"
#include "fault.h"
#include "support.h"

enum { KV_PAGES = 16, UNITS = 3, RUNS_OUT = 200 };

/* A KV region with every kind of run: e = ensured, i = idle, . = unmapped; a WEIGHTS region of large pages.
 */
static const char layout[KV_PAGES + 1] = "ee..ii.e.iie....";
static const char layout_weights[UNITS + 1] = "ee.";

typedef struct scene {
  kvcached_ctx_t ctx;
  kvcached_region_t kv, weights, scratch;
  void *allocated;
  const char *ledger;
  size_t page, large;
  int kv_tag[KV_PAGES], weights_tag[UNITS]; /* what ensured pages hold; -1: not known */
  int scratch_tag;
} scene;

/* One operation. `set` brings the scene to where it can be done; `run` returns an error or KVCACHED_OK. */
typedef struct operation {
  const char *name;
  void (*set)(scene *s);
  int (*run)(scene *s);
  int lookahead;
  uint64_t host_limit;
  int silent; /* 1: tells of no failure; what it could not do is simply not done */
  enum {
    NOTHING, /* what a failure may leave behind of it */
    LESS_IDLE,
    LESS_HOST,
    SOME_REGIONS /* those before the failure are done, each as a whole */
  } leaves;
} operation;

static void tag_all(scene *s) {
  for (size_t i = 0; i < KV_PAGES; i++)
    if (layout[i] == 'e') put_ends(s->kv, i, s->kv_tag[i] = 10 + (int)i);
  for (size_t i = 0; i < UNITS; i++)
    if (layout_weights[i] == 'e') put_ends(s->weights, i, s->weights_tag[i] = 60 + (int)i);
  put_ends(s->scratch, 0, s->scratch_tag = 90);
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

static scene set_up(const operation *op) {
  static unsigned n;
  static const char *ledger;
  if (!ledger) ledger = scratch("ledger");
  kvcached_options_t o;
  test_options(&o);
  o.large_page = 2 * test_page();
  o.pool_limit = 3 * test_page();
  o.lookahead = op->lookahead;
  o.host_limit = op->host_limit ? op->host_limit * test_page() : UINT64_MAX;
  o.ledger_path = ledger;
  o.group = "faults";
  o.room_wait_ms = 100;
  o.flags = n++ % 2 ? KVCACHED_NO_CONTROL : 0; /* with a second thread, and without */
  scene s = {.page = test_page(), .large = 2 * test_page(), .ledger = ledger};
  CHECK_OK(kvcached_open(&o, &s.ctx)); /* not open_with: what the device holds is looked at another way */
  s.kv = reserve(s.ctx, KVCACHED_KV, KV_PAGES * s.page);
  s.weights = reserve(s.ctx, KVCACHED_WEIGHTS, UNITS * s.large);
  s.scratch = reserve(s.ctx, KVCACHED_SCRATCH, s.large);
  for (size_t i = 0; i < KV_PAGES; i++) s.kv_tag[i] = -1;
  for (size_t i = 0; i < UNITS; i++) s.weights_tag[i] = -1;
  for (size_t i = 0; i < KV_PAGES; i++)
    if (layout[i] != '.') CHECK_OK(kvcached_ensure(s.kv, i * s.page, s.page));
  CHECK_OK(kvcached_ensure(s.weights, 0, 2 * s.large));
  CHECK_OK(kvcached_ensure(s.scratch, 0, s.large));
  tag_all(&s);
  for (size_t i = 0; i < KV_PAGES; i++)
    if (layout[i] == 'i') CHECK_OK(kvcached_release(s.kv, i * s.page, s.page));
  return s;
}

/* ---- what is looked at ---- */

typedef struct snapshot {
  char kv[KV_PAGES + 1], weights[UNITS + 1], scratch;
  uint64_t mapped, pooled, asleep, reserved, host, ensures, releases, sleeps;
} snapshot;

static char letter(kvcached_region_t r, size_t i) {
  uint8_t state = r->pages.state[i];
  return state == KVC_ENSURED ? 'e' : state == KVC_ASLEEP ? 's' : '-';
}

static snapshot look(const scene *s) {
  check_context(s->ctx);
  kvcached_stats_t t = stats_of(s->ctx);
  snapshot shot;
  memset(&shot, 0, sizeof(shot));
  for (size_t i = 0; i < KV_PAGES && s->kv; i++) shot.kv[i] = letter(s->kv, i);
  for (size_t i = 0; i < UNITS; i++) shot.weights[i] = letter(s->weights, i);
  shot.scratch = letter(s->scratch, 0);
  shot.mapped = t.mapped;
  shot.pooled = t.pooled;
  shot.asleep = t.asleep;
  shot.reserved = t.reserved;
  shot.host = t.host_bytes;
  shot.ensures = t.ensures;
  shot.releases = t.releases;
  shot.sleeps = t.sleeps;
  return shot;
}

/* What the backend holds for this one context, by the calls that were made, against what it counts. */
static void check_held(const scene *s) {
  fault_held h = fault_now();
  kvcached_stats_t t = stats_of(s->ctx);
  CHECK_EQ(h.mapped, t.mapped);
  CHECK_EQ(h.reserved, t.reserved);
  CHECK_EQ(h.host_bytes, t.host_bytes);
  if (!on_host()) CHECK_EQ(h.handle_bytes, t.mapped + t.pooled);
}

/* Pages that hold something known hold it still, whatever slept in between. */
static void check_content(scene *s, int scratch_too) {
  CHECK_OK(kvcached_enter(s->ctx));
  for (size_t i = 0; i < KV_PAGES && s->kv; i++)
    if (s->kv_tag[i] >= 0) CHECK(holds_ends(s->kv, i, s->kv_tag[i]));
  for (size_t i = 0; i < UNITS; i++)
    if (s->weights_tag[i] >= 0) CHECK(holds_ends(s->weights, i, s->weights_tag[i]));
  if (scratch_too && s->scratch_tag >= 0) CHECK(holds_ends(s->scratch, 0, s->scratch_tag));
  CHECK_OK(kvcached_leave(s->ctx));
}

static void check_same(const operation *op, const snapshot *a, const snapshot *b, int err) {
  CHECK_EQ(b->reserved, a->reserved);
  CHECK_EQ(b->releases, a->releases);
  CHECK_EQ(b->sleeps, a->sleeps);
  if (op->leaves == SOME_REGIONS) {
    CHECK(strchr(b->kv, 's') == NULL || strchr(b->kv, 'e') == NULL);
    CHECK(strchr(b->weights, 's') == NULL || strchr(b->weights, 'e') == NULL);
    CHECK_EQ(b->asleep + b->mapped, a->asleep + a->mapped);
    return;
  }
  CHECK_TEXT(b->kv, a->kv);
  CHECK_TEXT(b->weights, a->weights);
  CHECK_EQ(b->scratch, a->scratch);
  CHECK_EQ(b->asleep, a->asleep);
  CHECK_EQ(b->ensures, a->ensures);
  CHECK_LE(b->host, a->host);
  if (op->leaves != LESS_HOST) CHECK_EQ(b->host, a->host);
  /* Where memory was short, idle memory may have been given back for it. */
  CHECK_LE(b->mapped + b->pooled, a->mapped + a->pooled);
  if (op->leaves != LESS_IDLE && err != KVCACHED_E_NOMEM)
    CHECK_EQ(b->mapped + b->pooled, a->mapped + a->pooled);
}

static void end_scene(scene *s) {
  kvcached_shutdown(s->ctx);
  fault_held h = fault_now();
  CHECK_EQ(h.spaces + h.mapped + h.host_bytes, 0);
  if (!on_host()) CHECK_EQ(h.handles, 0);
  CHECK_EQ(live_slots(s->ledger), 0);
}

/* ---- the drill ---- */

static int do_alloc(scene *s); /* tells of a failure, not which */

/* One failure at the nth call of a kind; 0: the operation makes fewer. */
static int fail_once(const operation *op, fault_kind kind, unsigned nth, int err) {
  scene s = set_up(op);
  if (op->set) op->set(&s);
  snapshot before = look(&s);
  unsigned failures = fault_failures(kind);
  fault_set(kind, nth, err);
  int got = op->run(&s);
  int hit = fault_failures(kind) != failures;
  snapshot after = look(&s); /* waits for the helper, too */
  hit |= fault_failures(kind) != failures;
  fault_clear();
  check_held(&s);
  if (got) {
    CHECK(hit);
    /* A reload function's failure, or a limit that holds after all, is told as such. */
    if (got == err) CHECK_DETAIL("injected");
    CHECK(got == err || got == KVCACHED_E_RELOAD || (got == KVCACHED_E_LIMIT && op->leaves == LESS_IDLE) ||
          op->run == do_alloc);
    check_same(op, &before, &after, err);
    if (before.asleep == 0) check_content(&s, 1);
  }
  if (hit) {
    if (got || op->silent) CHECK_OK(op->run(&s)); /* the next call works */
    check_context(s.ctx);
    check_held(&s);
  }
  check_content(&s, before.sleeps == 0 && stats_of(s.ctx).sleeps == 0);
  /* What had to stay goes in the end. */
  CHECK_OK(kvcached_trim(s.ctx, 0, NULL));
  kvcached_stats_t t = stats_of(s.ctx);
  CHECK_EQ(t.idle + t.pooled, 0);
  check_context(s.ctx);
  end_scene(&s);
  return hit;
}

/* Every nth call of any kind fails, again and again: whatever comes of it, nothing is lost. */
static void fail_often(const operation *op, unsigned nth, int err) {
  scene s = set_up(op);
  if (op->set) op->set(&s);
  for (int i = 0; i < 3; i++) {
    fault_every(FAULT_ANY, nth, err);
    int got = op->run(&s);
    fault_clear();
    check_context(s.ctx);
    check_held(&s);
    if (got == KVCACHED_OK && !op->silent) break;
  }
  CHECK_OK(op->run(&s));
  check_context(s.ctx);
  check_content(&s, 0);
  end_scene(&s);
}

static void drill(const operation *op) {
  unsigned places = 0;
  static const int errors[] = {KVCACHED_E_DEVICE, KVCACHED_E_NOMEM};
  for (int kind = FAULT_RESERVE; kind < FAULT_KINDS; kind++) {
    for (int e = 0; e < 2; e++) {
      unsigned n = 1;
      while (n < RUNS_OUT && fail_once(op, (fault_kind)kind, n, errors[e])) n++;
      CHECK_LE(n, RUNS_OUT - 1);
      places += n - 1;
    }
  }
  if (places == 0) check_failed(__FILE__, __LINE__, "%s: no place where anything could fail", op->name);
  for (unsigned nth = 1; nth < 6; nth++)
    for (int e = 0; e < 2; e++) fail_often(op, nth, errors[e]);
}

/* ---- the operations ---- */

static void forget_tags(int *tags, size_t first, size_t end) {
  for (size_t i = first; i < end; i++) tags[i] = -1;
}

static int do_ensure(scene *s) {
  int err = kvcached_ensure(s->kv, s->page, (KV_PAGES - 2) * s->page);
  fault_clear(); /* looking is not part of it */
  for (size_t i = 1; i < KV_PAGES - 1 && !err; i++)
    if (layout[i] != 'e') CHECK(holds_ends(s->kv, i, 0));
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

static void sleep_all(scene *s) { CHECK_OK(kvcached_sleep(s->ctx, KVCACHED_ALL_KINDS, 100, NULL)); }
TEST(faults, unreserve_asleep) {
  drill(&(operation){.name = "unreserve", .set = sleep_all, .run = do_unreserve});
}

static int do_alloc(scene *s) {
  void *p = kvcached_alloc(s->ctx, 5 * s->page);
  if (p) kvcached_free(s->ctx, p);
  return p ? KVCACHED_OK : KVCACHED_E_DEVICE;
}
TEST(faults, alloc) { drill(&(operation){.name = "alloc", .run = do_alloc}); }

static int do_sleep(scene *s) {
  size_t freed;
  kvcached_stats_t before = stats_of(s->ctx);
  int err = kvcached_sleep(s->ctx, KVCACHED_ALL_KINDS, 100, &freed);
  kvcached_stats_t after = stats_of(s->ctx);
  CHECK_EQ(before.mapped + before.pooled - after.mapped - after.pooled, freed);
  return err;
}
TEST(faults, sleep) { drill(&(operation){.name = "sleep", .run = do_sleep, .leaves = LESS_IDLE}); }

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
    if (layout[i] == 'e') s->kv_tag[i] = 0;
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
