/* Idle time: what nobody uses goes back by itself, and not before; when there is nothing to give the thread
   that does it rests. */
#include "event_kit.h"
#include "fault.h"
#include "sleep_kit.h"

#include "context.h"

#include <dirent.h>
#include <sys/resource.h>

static kvcached_ctx_t open_idle(uint32_t ms, hearing *h) {
  kvcached_options_t o;
  test_options(&o);
  o.lookahead = KVCACHED_LOOKAHEAD_THREAD;
  o.idle_trim_ms = ms;
  if (h) hear(h, &o);
  return open_with(&o);
}

static uint64_t spare(kvcached_ctx_t ctx) { return stats_of(ctx).idle + stats_of(ctx).pooled; }

/* How often the helper thread has gone to wait, by the system's count. */
static long waits_of_the_helper(void) {
  DIR *d = opendir("/proc/self/task");
  CHECK(d != NULL);
  long waits = -1;
  for (struct dirent *e; (e = readdir(d));) {
    char path[300], line[200], name[32] = "";
    snprintf(path, sizeof(path), "/proc/self/task/%s/status", e->d_name);
    FILE *f = e->d_name[0] == '.' ? NULL : fopen(path, "re");
    if (!f) continue;
    while (fgets(line, sizeof(line), f)) {
      (void)sscanf(line, "Name: %31s", name);
      if (strcmp(name, "kvc-helper") == 0) (void)sscanf(line, "voluntary_ctxt_switches: %ld", &waits);
    }
    fclose(f);
  }
  closedir(d);
  return waits;
}

/* Until the helper waits for a change and nothing else. */
static void wait_for_rest(kvcached_ctx_t ctx) {
  int rests = 0;
  while (!rests) {
    sleep_ms(10);
    pthread_mutex_lock(&ctx->mutex);
    rests = ctx->worker_rests;
    pthread_mutex_unlock(&ctx->mutex);
  }
}

/* Whether the helper has slept since: one more may be the wait that had only just begun. */
static void check_slept_since(long waits) {
  CHECK(waits >= 0);
  CHECK_LE(waits_of_the_helper() - waits, 1);
}

TEST(idle, gives_back_what_nobody_uses) {
  const size_t page = test_page();
  hearing h = {.n = 0};
  h.ctx = open_idle(100, &h);
  kvcached_region_t r = reserve(h.ctx, KVCACHED_KV, 64 * page), other = reserve(h.ctx, KVCACHED_KV, 8 * page);
  CHECK_OK(kvcached_enter(h.ctx));
  CHECK_OK(kvcached_ensure(other, 0, 2 * page));
  CHECK_OK(kvcached_ensure(r, 0, 12 * page));
  put(r, 0, 'x', 8 * page);
  CHECK_OK(kvcached_release(r, 8 * page, 4 * page));  /* idle */
  CHECK_OK(kvcached_prepare(r, 20 * page, 4 * page)); /* ready */
  kvcached_unreserve(other);                          /* pooled, where there is a pool */
  WAIT_FOR(stats_of(h.ctx).ready >= 3 * page);        /* on a device the pool may have served */
  int64_t start = now_ms();
  CHECK_OK(kvcached_leave(h.ctx));
  expect_events(&h, "t");
  CHECK_LE(100 - 20, now_ms() - start); /* less what the cheap clock is behind */
  CHECK_EQ(spare(h.ctx), 0);
  CHECK_EQ(stats_of(h.ctx).mapped, 8 * page);
  CHECK(holds(r, 0, 'x', 8 * page));
  check_context(h.ctx);
  CHECK_OK(kvcached_release(r, 4 * page, 4 * page)); /* it goes on */
  expect_events(&h, "t");
  CHECK_EQ(stats_of(h.ctx).mapped, 4 * page);
  kvcached_shutdown(h.ctx);
}

TEST(idle, off_by_default) {
  kvcached_options_t o;
  kvcached_options_init(&o);
  CHECK_EQ(o.idle_trim_ms, 0);
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 8 * page);
  CHECK_OK(kvcached_ensure(r, 0, 8 * page));
  CHECK_OK(kvcached_release(r, 0, 8 * page));
  sleep_ms(50);
  CHECK_EQ(spare(ctx), 8 * page);
  CHECK_EQ(waits_of_the_helper(), -1); /* and there is no thread for it */
  kvcached_shutdown(ctx);
}

/* Nothing goes while a thread is inside, however long; nor while pages change. */
TEST(idle, not_while_it_is_used) {
  const size_t page = test_page();
  hearing h = {.n = 0};
  h.ctx = open_idle(20, &h);
  kvcached_region_t r = reserve(h.ctx, KVCACHED_KV, 8 * page);
  CHECK_OK(kvcached_ensure(r, 0, 8 * page));
  CHECK_OK(kvcached_enter(h.ctx));
  CHECK_OK(kvcached_release(r, 4 * page, 4 * page));
  long waits = waits_of_the_helper();
  sleep_ms(200);
  CHECK_EQ(spare(h.ctx), 4 * page);
  CHECK_LE(waits_of_the_helper() - waits, 25); /* a look each 20 ms at most */
  expect_events(&h, "");
  CHECK_OK(kvcached_leave(h.ctx));
  expect_events(&h, "t");
  kvcached_shutdown(h.ctx);

  h.ctx = open_idle(400, &h);
  r = reserve(h.ctx, KVCACHED_KV, 8 * page);
  int64_t last = now_ms(), longest = 0;
  for (int i = 0; i < 12; i++) {
    CHECK_OK(kvcached_ensure(r, 0, 8 * page));
    CHECK_OK(kvcached_release(r, 0, 8 * page));
    if (now_ms() - last > longest) longest = now_ms() - last;
    last = now_ms();
    sleep_ms(50);
  }
  if (longest < 300) expect_events(&h, ""); /* else this machine was busy with others */
  WAIT_FOR(spare(h.ctx) == 0);
  kvcached_shutdown(h.ctx);
}

/* With nothing to give the thread does not wake at all. */
TEST(idle, rests) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_idle(1, NULL);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 8 * page);
  CHECK_OK(kvcached_ensure(r, 0, 8 * page));
  CHECK_OK(kvcached_release(r, 4 * page, 4 * page));
  WAIT_FOR(spare(ctx) == 0);
  wait_for_rest(ctx);
  long waits = waits_of_the_helper();
  for (int i = 0; i < 20; i++) {
    enter_and_leave(ctx); /* using it is no reason to wake either */
    CHECK_OK(kvcached_ensure(r, (size_t)(i % 4) * page, page));
    sleep_ms(5);
  }
  check_slept_since(waits);
  CHECK_OK(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 1000, NULL));
  sleep_ms(50);
  check_slept_since(waits);
  CHECK_OK(kvcached_wake(ctx, KVCACHED_ALL_KINDS));
  CHECK_OK(kvcached_release(r, 0, 4 * page));
  WAIT_FOR(spare(ctx) == 0);
  kvcached_shutdown(ctx);
}

/* What cannot be given back is not tried again and again, but when something has changed. */
TEST(idle, a_failure_is_not_repeated) {
  const size_t page = test_page();
  static const fault_kind kinds[] = {FAULT_QUIESCE, FAULT_UNMAP};
  for (int k = 0; k < 2; k++) {
    kvcached_ctx_t ctx = open_idle(10, NULL);
    kvcached_region_t r = reserve(ctx, KVCACHED_KV, 8 * page);
    CHECK_OK(kvcached_ensure(r, 0, 8 * page));
    put(r, 0, 'x', 4 * page);
    unsigned failures = fault_failures(kinds[k]);
    fault_every(kinds[k], 1, KVCACHED_E_DEVICE);
    CHECK_OK(kvcached_release(r, 4 * page, 2 * page));
    WAIT_FOR(fault_failures(kinds[k]) > failures);
    wait_for_rest(ctx);
    failures = fault_failures(kinds[k]);
    long waits = waits_of_the_helper();
    sleep_ms(100);
    CHECK_EQ(fault_failures(kinds[k]), failures);
    check_slept_since(waits);
    fault_clear();
    CHECK_EQ(spare(ctx), 2 * page);
    check_context(ctx);
    CHECK_OK(kvcached_release(r, 6 * page, page));
    WAIT_FOR(spare(ctx) == 0);
    CHECK(holds(r, 0, 'x', 4 * page));
    check_context(ctx);
    kvcached_shutdown(ctx);
  }
}

/* What look-ahead has made goes once, and comes back when it is asked for again; a request is never lost. */
TEST(idle, look_ahead_is_left_its_work) {
  const size_t page = test_page();
  hearing h = {.n = 0};
  h.ctx = open_idle(20, &h);
  kvcached_region_t r = reserve(h.ctx, KVCACHED_KV, 64 * page);
  CHECK_OK(kvcached_prepare(r, 0, 8 * page));
  expect_events(&h, "t");
  sleep_ms(60);
  CHECK_EQ(stats_of(h.ctx).mapped, 0);
  expect_events(&h, "");
  fault_delay(FAULT_MAP, 5); /* takes longer than the idle time */
  CHECK_OK(kvcached_enter(h.ctx));
  CHECK_OK(kvcached_prepare(r, 0, 40 * page));
  WAIT_FOR(stats_of(h.ctx).ready == 40 * page);
  fault_clear();
  expect_events(&h, "");
  CHECK_OK(kvcached_leave(h.ctx));
  expect_events(&h, "t");
  kvcached_shutdown(h.ctx);
}

TEST(idle, shutdown_does_not_wait) {
  const size_t page = test_page();
  int64_t start = now_ms();
  for (int i = 0; i < 6; i++) {
    kvcached_ctx_t ctx = open_idle(i % 2 ? UINT32_MAX : 60000, NULL);
    kvcached_region_t r = reserve(ctx, KVCACHED_KV, 8 * page);
    CHECK_OK(kvcached_ensure(r, 0, 8 * page));
    if (i % 3) CHECK_OK(kvcached_release(r, 0, 8 * page));
    if (i % 3 == 2) CHECK_OK(kvcached_enter(ctx));
    sleep_ms(5);
    kvcached_shutdown(ctx);
  }
  CHECK_LE(now_ms() - start, 5000);
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) /* their threads need more than a stack \
                                                                     */
static void *stay(void *arg) {
  while (!atomic_load((atomic_int *)arg)) sleep_ms(1);
  return NULL;
}

/* Without its thread the context does not open, and everything is undone. */
TEST_HOST(idle, no_thread_to_be_had) {
  enum { STACKS = 12 }; /* more than the C library keeps of threads that ended */
  const char *path = scratch("threadless");
  pthread_t t[STACKS];
  atomic_int ends = 0;
  for (int i = 1; i < STACKS; i++) CHECK(pthread_create(&t[i], NULL, stay, &ends) == 0);
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = path;
  o.flags = KVCACHED_NO_CONTROL;
  o.idle_trim_ms = 1000;
  kvcached_shutdown(open_with(&o)); /* its stack is kept */
  CHECK(pthread_create(&t[0], NULL, stay, &ends) == 0);
  kvcached_ctx_t ctx = (kvcached_ctx_t)1;
  struct rlimit old, none;
  CHECK(getrlimit(RLIMIT_DATA, &old) == 0);
  none = old;
  none.rlim_cur = 1;
  CHECK(setrlimit(RLIMIT_DATA, &none) == 0);
  int err = kvcached_open(&o, &ctx);
  CHECK(setrlimit(RLIMIT_DATA, &old) == 0);
  CHECK_IS(err, KVCACHED_E_SYSTEM);
  CHECK_DETAIL("kvc-helper");
  CHECK(ctx == NULL);
  CHECK_EQ(live_slots(path), 0);
  CHECK_EQ(fault_now().devices, 0);
  atomic_store(&ends, 1);
  for (int i = 0; i < STACKS; i++) pthread_join(t[i], NULL);
  kvcached_shutdown(open_with(&o));
}
#endif

/* ---- figures ---- */

TEST(idle, when_it_was_last_used) {
  const uint64_t tick = 20000000; /* the clock is cheap to read, and steps on up to every 10 ms */
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX); /* without a ledger too */
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, test_page());
  CHECK_EQ(stats_of(ctx).last_inside_ns, 0);
  uint64_t before = (uint64_t)kvc_now_ns();
  CHECK_OK(kvcached_enter(ctx));
  uint64_t entered = stats_of(ctx).last_inside_ns;
  CHECK_LE(before - tick, entered);
  CHECK_LE(entered, kvc_now_ns());
  CHECK_EQ(region_stats_of(r).last_inside_ns, entered); /* the context's */
  sleep_ms(30);
  enter_and_leave(ctx); /* nested: no news */
  CHECK_EQ(stats_of(ctx).last_inside_ns, entered);
  CHECK_OK(kvcached_leave(ctx));
  CHECK_LE(entered + tick / 2, stats_of(ctx).last_inside_ns);
  kvcached_shutdown(ctx);
}

TEST(idle, what_sleeps_by_kind) {
  kvcached_options_t o;
  test_options(&o);
  scene s = set_up(&o);
  go_to_sleep(s.ctx, KV | WEIGHTS);
  kvcached_stats_t all = stats_of(s.ctx), kv = region_stats_of(s.kv), weights = region_stats_of(s.weights);
  CHECK_EQ(all.kind_asleep[KVCACHED_KV], 10 * s.page);
  CHECK_EQ(all.kind_asleep[KVCACHED_WEIGHTS], 2 * s.large + s.page);
  CHECK_EQ(all.kind_asleep[KVCACHED_SCRATCH], 0);
  CHECK_EQ(kv.kind_asleep[KVCACHED_KV], kv.asleep);
  CHECK_EQ(weights.kind_asleep[KVCACHED_WEIGHTS], weights.asleep);
  CHECK_EQ(weights.kind_asleep[KVCACHED_KV], 0);
  kvcached_shutdown(s.ctx);
}
