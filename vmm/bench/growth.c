/*
 * Growing and shrinking: kvcached_ensure, release and trim against the raw calls that do the same to the same
 * number of pages of the same size. Both sides take turns within a round, and who begins changes from round
 * to round, so that neither profits from what the other left behind; the first round is not counted.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <stdio.h>
#include <time.h>

#define CALL_BATCHES 20   /* of calls too short to be timed one by one */
#define CALLS 10000       /* calls of a batch */
#define READY_WAIT_S 10.0 /* the look-ahead thread has long finished by then, or it never will */
#define BOUND 1.10        /* a growth step may cost this many times the raw calls */

static double us(double seconds) { return seconds * 1e6; }

static int bounded(const bench_options *o) { return o->backend == KVCACHED_BACKEND_CUDA; }

typedef struct step {
  const bench_options *o;
  raw_device *dev;
  report *rep;
  kvcached_ctx_t ctx;
  size_t page, pages, bytes;
} step;

static void row(const step *s, const char *prefix, const char *label, const samples *library,
                const samples *raw_side) {
  char key[96], text[96], size[32];
  bench_step_key(key, sizeof(key), prefix, s->pages, "us");
  bench_size_text(size, sizeof(size), s->bytes);
  (void)snprintf(text, sizeof(text), "%s, %zu page%s (%s)", label, s->pages, s->pages == 1 ? "" : "s", size);
  report_row(s->rep, (report_row_id){key, text, "us"}, library, raw_side);
}

/* The same as microseconds for a GiB. */
static void row_per_gib(const step *s, const char *prefix, const char *label, const samples *library,
                        const samples *raw_side) {
  double scale = (double)GIB / (double)s->bytes;
  samples a = {0}, b = {0};
  for (size_t i = 0; i < library->n; i++) samples_add(&a, library->v[i] * scale);
  for (size_t i = 0; raw_side && i < raw_side->n; i++) samples_add(&b, raw_side->v[i] * scale);
  char key[96];
  (void)snprintf(key, sizeof(key), "%s_per_gib_us", prefix);
  report_row(s->rep, (report_row_id){key, label, "us/GiB"}, &a, raw_side ? &b : NULL);
  samples_free(&a);
  samples_free(&b);
}

/* ---- cold: nothing is mapped, the pool is empty ---- */

enum { CREATE, MAP, ACCESS, ZERO, UNMAP, RELEASE, RAW_CALLS };
static const char *const raw_call[RAW_CALLS] = {"create", "map", "access", "zero", "unmap", "release"};

static void raw_cold(const step *s, raw_run *run, double took[RAW_CALLS]) {
  double t[RAW_CALLS + 1];
  t[CREATE] = bench_now();
  RAW(raw_run_create(s->dev, run));
  t[MAP] = bench_now();
  RAW(raw_run_map(s->dev, run));
  t[ACCESS] = bench_now();
  RAW(raw_run_access(s->dev, run));
  t[ZERO] = bench_now();
  RAW(raw_run_zero(s->dev, run));
  t[UNMAP] = bench_now();
  RAW(raw_run_unmap(s->dev, run));
  t[RELEASE] = bench_now();
  RAW(raw_run_destroy(s->dev, run));
  t[RAW_CALLS] = bench_now();
  for (int i = 0; i < RAW_CALLS; i++) took[i] = us(t[i + 1] - t[i]);
}

static void library_cold(const step *s, kvcached_region_t region, double *grow, double *shrink,
                         double *calls) {
  kvcached_stats_t before = bench_stats(s->ctx);
  if (before.pooled || before.mapped) bench_fail("the pages to be made are there already");
  uint64_t counted = counted_calls();
  double t0 = bench_now();
  KVC(kvcached_ensure(region, 0, s->bytes));
  double t1 = bench_now();
  *calls = (double)(counted_calls() - counted);
  if (bench_stats(s->ctx).mapped != s->bytes) bench_fail("ensure did not map what was asked for");
  size_t freed;
  double t2 = bench_now();
  KVC(kvcached_release(region, 0, s->bytes));
  KVC(kvcached_trim(s->ctx, 0, &freed));
  double t3 = bench_now();
  if (freed != s->bytes) bench_fail("trim gave %zu bytes back, not %zu", freed, s->bytes);
  *grow = us(t1 - t0);
  *shrink = us(t3 - t2);
}

static void cold(const step *s, int kind, const char *prefix, const char *label, int last) {
  kvcached_region_t region;
  KVC(kvcached_reserve(s->ctx, kind, s->bytes, &region));
  size_t unit = kvcached_region_page_size(region);
  raw_run run;
  RAW(raw_run_reserve(s->dev, &run, s->bytes, unit));

  samples grow = {0}, shrink = {0}, calls = {0}, raw_grow = {0}, raw_shrink = {0}, parts[RAW_CALLS] = {{0}};
  for (int round = 0; round <= s->o->rounds; round++) {
    double took[RAW_CALLS], grew = 0, shrank = 0, made = 0;
    if (round % 2) raw_cold(s, &run, took);
    library_cold(s, region, &grew, &shrank, &made);
    if (round % 2 == 0) raw_cold(s, &run, took);
    if (round == 0) continue;
    samples_add(&grow, grew);
    samples_add(&shrink, shrank);
    samples_add(&calls, made);
    samples_add(&raw_grow, took[CREATE] + took[MAP] + took[ACCESS] + took[ZERO]);
    samples_add(&raw_shrink, took[UNMAP] + took[RELEASE]);
    for (int i = 0; i < RAW_CALLS; i++) samples_add(&parts[i], took[i] / (double)run.n);
  }
  char name[96];
  (void)snprintf(name, sizeof(name), "%s_ensure_cold", prefix);
  char text[96];
  (void)snprintf(text, sizeof(text), "%sensure, cold", label);
  row(s, name, text, &grow, &raw_grow);
  if (bounded(s->o)) report_bound_ratio(s->rep, AT_MOST, BOUND);
  if (last) row_per_gib(s, name, "  the same for a GiB", &grow, &raw_grow);
  if (counted_any() && last) {
    char key[96];
    bench_step_key(key, sizeof(key), name, s->pages, "driver_calls");
    report_row(s->rep, (report_row_id){key, "  driver calls it made", "calls"}, &calls, NULL);
  }
  (void)snprintf(name, sizeof(name), "%s_release_trim", prefix);
  (void)snprintf(text, sizeof(text), "%srelease and trim", label);
  row(s, name, text, &shrink, &raw_shrink);
  if (last) row_per_gib(s, name, "  the same for a GiB", &shrink, &raw_shrink);
  if (last) {
    char size[32];
    bench_size_text(size, sizeof(size), unit);
    for (int i = 0; i < RAW_CALLS; i++) {
      char key[96];
      (void)snprintf(key, sizeof(key), "%s_raw_%s_per_page_us", prefix, raw_call[i]);
      (void)snprintf(text, sizeof(text), "  raw %s, per page of %s", raw_call[i], size);
      report_row(s->rep, (report_row_id){key, text, "us"}, NULL, &parts[i]);
    }
  }
  for (int i = 0; i < RAW_CALLS; i++) samples_free(&parts[i]);
  samples_free(&grow), samples_free(&shrink), samples_free(&calls);
  samples_free(&raw_grow), samples_free(&raw_shrink);
  RAW(raw_run_unreserve(s->dev, &run));
  kvcached_unreserve(region);
}

/* ---- pooled: the pages' physical memory is in the context's pool ---- */

static double library_pooled(const step *s) {
  /* The pool is filled by giving a region of as many pages back, which the last round has done. Addresses are
     new each time, on the raw side as well. */
  kvcached_region_t region;
  KVC(kvcached_reserve(s->ctx, KVCACHED_KV, s->bytes, &region));
  uint64_t pooled = bench_stats(s->ctx).pooled;
  if (pooled != s->bytes) bench_fail("the pool holds %ju bytes, not %zu", (uintmax_t)pooled, s->bytes);
  double t0 = bench_now();
  KVC(kvcached_ensure(region, 0, s->bytes));
  double t1 = bench_now();
  if (bench_stats(s->ctx).pooled) bench_fail("ensure did not use the pool");
  kvcached_unreserve(region);
  return us(t1 - t0);
}

static double raw_pooled(const step *s, raw_run *run) {
  double t0 = bench_now();
  RAW(raw_run_map(s->dev, run));
  RAW(raw_run_access(s->dev, run));
  RAW(raw_run_zero(s->dev, run));
  double t1 = bench_now();
  RAW(raw_run_unmap(s->dev, run));
  RAW(s->dev->ops->unreserve(s->dev, run->base, s->bytes));
  RAW(s->dev->ops->reserve(s->dev, s->bytes, &run->base));
  return us(t1 - t0);
}

static void pooled(const step *s) {
  kvcached_region_t region;
  KVC(kvcached_reserve(s->ctx, KVCACHED_KV, s->bytes, &region));
  KVC(kvcached_ensure(region, 0, s->bytes));
  kvcached_unreserve(region);
  raw_run run;
  RAW(raw_run_reserve(s->dev, &run, s->bytes, s->page));
  RAW(raw_run_create(s->dev, &run));

  samples library = {0}, raw_side = {0};
  for (int round = 0; round <= s->o->rounds; round++) {
    double r = 0;
    if (round % 2) r = raw_pooled(s, &run);
    double l = library_pooled(s);
    if (round % 2 == 0) r = raw_pooled(s, &run);
    if (round == 0) continue;
    samples_add(&library, l);
    samples_add(&raw_side, r);
  }
  row(s, "kv_ensure_pooled", "ensure, pooled", &library, &raw_side);
  if (bounded(s->o)) report_bound_ratio(s->rep, AT_MOST, BOUND);
  RAW(raw_run_destroy(s->dev, &run));
  RAW(raw_run_unreserve(s->dev, &run));
  KVC(kvcached_trim(s->ctx, 0, NULL));
  samples_free(&library), samples_free(&raw_side);
}

/* ---- idle: the pages were released and are still mapped, so zeroing is all there is to do ---- */

static void idle(const step *s) {
  kvcached_region_t region;
  KVC(kvcached_reserve(s->ctx, KVCACHED_KV, s->bytes, &region));
  KVC(kvcached_ensure(region, 0, s->bytes));
  raw_run run;
  RAW(raw_run_reserve(s->dev, &run, s->bytes, s->page));
  RAW(raw_run_create(s->dev, &run));
  RAW(raw_run_map(s->dev, &run));
  RAW(raw_run_access(s->dev, &run));

  samples library = {0}, raw_side = {0};
  for (int round = 0; round <= s->o->rounds; round++) {
    KVC(kvcached_release(region, 0, s->bytes));
    double t0 = bench_now();
    KVC(kvcached_ensure(region, 0, s->bytes));
    double t1 = bench_now();
    RAW(raw_run_zero(s->dev, &run));
    double t2 = bench_now();
    if (round == 0) continue;
    samples_add(&library, us(t1 - t0));
    samples_add(&raw_side, us(t2 - t1));
  }
  row(s, "kv_ensure_idle", "ensure, idle (raw: zero)", &library, &raw_side);
  RAW(raw_run_unmap(s->dev, &run));
  RAW(raw_run_destroy(s->dev, &run));
  RAW(raw_run_unreserve(s->dev, &run));
  kvcached_unreserve(region);
  KVC(kvcached_trim(s->ctx, 0, NULL));
  samples_free(&library), samples_free(&raw_side);
}

/* ---- prepared: look-ahead has mapped and zeroed them ---- */

static void wait_ready(const step *s, kvcached_region_t region, double since) {
  uint64_t seen = 0, ready;
  double changed = since;
  while ((ready = bench_stats(s->ctx).ready) < s->bytes) {
    double now = bench_now();
    if (now - since > READY_WAIT_S)
      bench_fail("of %zu bytes to prepare %ju are ready", s->bytes, (uintmax_t)ready);
    if (ready != seen) changed = now;
    seen = ready;
    /* A context without the thread does a few pages a call, and wants to be asked again. */
    if (now - changed > 2e-3) KVC(kvcached_prepare(region, 0, s->bytes));
    (void)nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
  }
}

static void prepared(const step *s) {
  kvcached_region_t region;
  KVC(kvcached_reserve(s->ctx, KVCACHED_KV, s->bytes, &region));
  samples ask = {0}, ready = {0}, take = {0}, calls = {0};
  for (int round = 0; round <= s->o->rounds; round++) {
    double t0 = bench_now();
    KVC(kvcached_prepare(region, 0, s->bytes));
    double t1 = bench_now();
    wait_ready(s, region, t0);
    double t2 = bench_now();
    uint64_t device = bench_stats(s->ctx).device_calls, counted = counted_calls();
    double t3 = bench_now();
    KVC(kvcached_ensure(region, 0, s->bytes));
    double t4 = bench_now();
    device = bench_stats(s->ctx).device_calls - device;
    counted = counted_calls() - counted;
    KVC(kvcached_release(region, 0, s->bytes));
    KVC(kvcached_trim(s->ctx, 0, NULL));
    if (round == 0) continue;
    samples_add(&ask, us(t1 - t0));
    samples_add(&ready, us(t2 - t0));
    samples_add(&take, us(t4 - t3));
    samples_add(&calls, (double)(device > counted ? device : counted));
  }
  row(s, "kv_prepare_call", "prepare, the call", &ask, NULL);
  row(s, "kv_prepare_ready", "prepare, until all is ready", &ready, NULL);
  row(s, "kv_ensure_prepared", "ensure, prepared", &take, NULL);
  char key[96];
  bench_step_key(key, sizeof(key), "kv_ensure_prepared", s->pages, "driver_calls");
  report_row(s->rep, (report_row_id){key, "  driver calls it made", "calls"}, &calls, NULL);
  report_bound_value(s->rep, AT_MOST, 0);
  kvcached_unreserve(region);
  KVC(kvcached_trim(s->ctx, 0, NULL));
  samples_free(&ask), samples_free(&ready), samples_free(&take), samples_free(&calls);
}

/* ---- when nothing grows ---- */

static void nothing_grows(const step *s) {
  kvcached_region_t region;
  KVC(kvcached_reserve(s->ctx, KVCACHED_KV, s->bytes, &region));
  KVC(kvcached_ensure(region, 0, s->bytes));
  samples ensure = {0}, gate = {0};
  uint64_t device = bench_stats(s->ctx).device_calls, counted = counted_calls();
  for (int batch = 0; batch <= CALL_BATCHES; batch++) {
    double t0 = bench_now();
    for (int i = 0; i < CALLS; i++) KVC(kvcached_ensure(region, 0, s->bytes));
    double t1 = bench_now();
    for (int i = 0; i < CALLS; i++) {
      KVC(kvcached_enter(s->ctx));
      KVC(kvcached_leave(s->ctx));
    }
    double t2 = bench_now();
    if (batch == 0) continue;
    samples_add(&ensure, (t1 - t0) * 1e9 / CALLS);
    samples_add(&gate, (t2 - t1) * 1e9 / CALLS);
  }
  device = bench_stats(s->ctx).device_calls - device;
  counted = counted_calls() - counted;

  char label[96];
  (void)snprintf(label, sizeof(label), "ensure of %zu ensured pages, one call", s->pages);
  report_row(s->rep, (report_row_id){"ensure_ensured_ns", label, "ns"}, &ensure, NULL);
  report_row(s->rep, (report_row_id){"enter_leave_ns", "enter and leave, one pair", "ns"}, &gate, NULL);
  (void)snprintf(label, sizeof(label), "driver calls of all %d such calls, as the library counts",
                 (CALL_BATCHES + 1) * CALLS * 3);
  report_value(s->rep, (report_row_id){"nothing_grows_device_calls", label, "calls"}, (double)device);
  report_bound_value(s->rep, AT_MOST, 0);
  if (counted_any()) {
    report_value(s->rep,
                 (report_row_id){"nothing_grows_driver_calls", "  the same, counted at the driver", "calls"},
                 (double)counted);
    report_bound_value(s->rep, AT_MOST, 0);
  }
  kvcached_unreserve(region);
  KVC(kvcached_trim(s->ctx, 0, NULL));
  samples_free(&ensure), samples_free(&gate);
}

/* The step of most pages holds them twice: the library's, and the raw side's. */
static void must_fit(const step *s, size_t most) {
  uint64_t free_now, total;
  RAW(s->dev->ops->memory(s->dev, &free_now, &total));
  double need = 2.0 * (double)most * (double)s->page;
  if (need > (double)free_now)
    bench_fail("--steps %zu: memory is short: twice %zu pages of %zu KiB are %.1f GiB, and %.1f GiB are free",
               most, most, s->page / KIB, need / (double)GIB, (double)free_now / (double)GIB);
}

void bench_growth(const bench_options *o, raw_device *dev, report *rep) {
  size_t most = 0;
  for (size_t i = 0; i < o->n_steps; i++) most = o->steps[i] > most ? o->steps[i] : most;
  kvcached_ctx_t ctx = bench_open(o, 0, bench_ledger());
  size_t page = kvcached_page_size(ctx);
  kvcached_shutdown(ctx);
  step s = {.o = o, .dev = dev, .rep = rep, .page = page};
  must_fit(&s, most);
  s.ctx = ctx = bench_open(o, most * page, bench_ledger());

  char title[96], size[32];
  bench_size_text(size, sizeof(size), page);
#define EACH_STEP for (size_t i = 0; i < o->n_steps && (s.pages = o->steps[i], s.bytes = s.pages * page); i++)
  (void)snprintf(title, sizeof(title), "KV pages of %s, cold", size);
  report_section(rep, title);
  EACH_STEP cold(&s, KVCACHED_KV, "kv", "", i + 1 == o->n_steps);
  if (dev->ops->handles) {
    report_section(rep, "KV pages from the pool");
    EACH_STEP pooled(&s);
  }
  report_section(rep, "KV pages released before, and prepared ahead");
  EACH_STEP idle(&s);
  EACH_STEP prepared(&s);
#undef EACH_STEP

  report_section(rep, "When nothing grows");
  s.pages = o->steps[o->n_steps - 1];
  s.bytes = s.pages * page;
  nothing_grows(&s);

  /* Of the size of the region that the sleep part uses, a GiB at most. */
  report_section(rep, "WEIGHTS pages, cold");
  s.bytes = o->weights < GIB ? o->weights : GIB;
  kvcached_region_t probe;
  KVC(kvcached_reserve(ctx, KVCACHED_WEIGHTS, s.bytes, &probe));
  s.bytes = kvcached_region_size(probe);
  s.page = kvcached_region_page_size(probe);
  s.pages = (s.bytes + s.page - 1) / s.page;
  kvcached_unreserve(probe);
  cold(&s, KVCACHED_WEIGHTS, "weights", "", 1);
  kvcached_shutdown(ctx);
}
