/*
 * Sleep and wake: how long they take, and at what rate, against one plain copy of the same number of bytes
 * between pinned host memory and the device, in turns within each round. The raw side holds as many bytes in
 * handles of the same size, so it can also say what unmapping and mapping alone cost.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define SETTLED_S 0.5       /* background work that did nothing for so long has ended */
#define SETTLE_WAIT_S 300.0 /* pinning takes about 0.4 s a GiB */
#define SLEEP_BOUND_MS 50.0
#define WAKE_BOUND 0.90
#define GATE_MS 1000

typedef struct sides {
  const bench_options *o;
  raw_device *dev;
  report *rep;
  kvcached_ctx_t ctx;
  kvcached_region_t region;
  unsigned kind_bit;
  size_t bytes;  /* whose content is kept */
  size_t all;    /* and with them those of SCRATCH */
  raw_run run;   /* as many bytes of device memory as are kept */
  uint64_t *pin; /* as many bytes of host memory: the content */
} sides;

static double ms(double seconds) { return seconds * 1e3; }

static double rate(size_t bytes, double seconds) { return (double)bytes / 1e9 / seconds; }

/* Content that differs in every word, cheap enough for many GiB. */
static void fill(uint64_t *words, size_t bytes) {
  uint64_t x = 0x9e3779b97f4a7c15u;
  for (size_t i = 0; i < bytes / sizeof(*words); i++) words[i] = x += 0x9e3779b97f4a7c15u;
}

static void verify(kvcached_region_t region, const uint64_t *content, size_t bytes) {
  static uint64_t piece[2 * MIB / sizeof(uint64_t)];
  for (size_t off = 0; off < bytes; off += sizeof(piece)) {
    size_t n = bytes - off < sizeof(piece) ? bytes - off : sizeof(piece);
    KVC(kvcached_read(region, off, piece, n));
    if (memcmp(piece, (const char *)content + off, n) != 0)
      bench_fail("content differs after waking, between bytes %zu and %zu", off, off + n);
  }
}

static double library_sleep(const sides *s) {
  size_t freed;
  double t0 = bench_now();
  KVC(kvcached_sleep(s->ctx, s->kind_bit, GATE_MS, &freed));
  double t1 = bench_now();
  if (freed < s->all) bench_fail("sleep gave %zu bytes back, not %zu", freed, s->all);
  if (bench_stats(s->ctx).asleep != s->all) bench_fail("the regions do not sleep");
  return t1 - t0;
}

static double library_wake(const sides *s) {
  double t0 = bench_now();
  KVC(kvcached_wake(s->ctx, s->kind_bit));
  double t1 = bench_now();
  if (bench_stats(s->ctx).mapped != s->all) bench_fail("the regions did not wake");
  return t1 - t0;
}

typedef struct raw_times {
  double in, out, unmap, make;
} raw_times;

static void raw_round(sides *s, raw_times *t) {
  const raw_ops *ops = s->dev->ops;
  double t0 = bench_now();
  RAW(ops->to_host(s->dev, s->pin, s->run.base, s->bytes));
  RAW(ops->finish(s->dev));
  double t1 = bench_now();
  RAW(raw_run_unmap(s->dev, &s->run));
  RAW(raw_run_destroy(s->dev, &s->run));
  double t2 = bench_now();
  RAW(raw_run_create(s->dev, &s->run));
  RAW(raw_run_map(s->dev, &s->run));
  RAW(raw_run_access(s->dev, &s->run));
  double t3 = bench_now();
  RAW(ops->to_device(s->dev, s->run.base, s->pin, s->bytes));
  RAW(ops->finish(s->dev));
  double t4 = bench_now();
  *t = (raw_times){.out = t1 - t0, .unmap = t2 - t1, .make = t3 - t2, .in = t4 - t3};
}

static void row(const sides *s, const char *name, const char *label, const char *unit, const samples *library,
                const samples *raw_side) {
  char key[96];
  (void)snprintf(key, sizeof(key), "%s_%s", name, strcmp(unit, "GB/s") == 0 ? "gb_per_s" : unit);
  report_row(s->rep, (report_row_id){key, label, unit}, library, raw_side);
}

static void one(const sides *s, const char *name, const char *label, const char *unit, double value) {
  samples v = {.v = &value, .n = 1, .capacity = 1};
  row(s, name, label, unit, &v, NULL);
}

/* The raw side for s->bytes, in handles of `unit` bytes, and the content on both sides of the bus. */
static void begin_raw(sides *s, size_t unit) {
  RAW(raw_run_reserve(s->dev, &s->run, s->bytes, unit));
  RAW(raw_run_create(s->dev, &s->run));
  RAW(raw_run_map(s->dev, &s->run));
  RAW(raw_run_access(s->dev, &s->run));
  void *p;
  RAW(s->dev->ops->host_alloc(s->dev, s->bytes, &p));
  s->pin = p;
  fill(s->pin, s->bytes);
  RAW(s->dev->ops->to_device(s->dev, s->run.base, s->pin, s->bytes));
  RAW(s->dev->ops->finish(s->dev));
}

static void end_raw(sides *s) {
  RAW(raw_run_unmap(s->dev, &s->run));
  RAW(raw_run_destroy(s->dev, &s->run));
  RAW(raw_run_unreserve(s->dev, &s->run));
  RAW(s->dev->ops->host_free(s->dev, s->pin, s->bytes));
}

static void begin(sides *s, int kind, size_t bytes) {
  s->kind_bit = KVCACHED_KIND_BIT(kind);
  KVC(kvcached_reserve(s->ctx, kind, bytes, &s->region));
  s->all = s->bytes = kvcached_region_size(s->region);
  begin_raw(s, kvcached_region_page_size(s->region));
  KVC(kvcached_write(s->region, 0, s->pin, s->bytes));
}

static void end(sides *s) {
  verify(s->region, s->pin, s->bytes);
  end_raw(s);
  kvcached_unreserve(s->region);
  KVC(kvcached_trim(s->ctx, 0, NULL));
}

/* Seconds until the background work that prepare_sleep asked for ended. It is over when the host memory is
   there and no call of the device was made for a while. */
static double prepare_sleep(const sides *s) {
  double t0 = bench_now(), changed = t0;
  KVC(kvcached_prepare_sleep(s->ctx, s->kind_bit));
  kvcached_stats_t seen = bench_stats(s->ctx);
  for (;;) {
    (void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    kvcached_stats_t now = bench_stats(s->ctx);
    double t = bench_now();
    if (now.device_calls != seen.device_calls || now.host_bytes != seen.host_bytes) changed = t;
    seen = now;
    if (now.host_bytes >= s->bytes && t - changed > SETTLED_S) return changed - t0;
    if (t - t0 > SETTLE_WAIT_S)
      bench_fail("prepare_sleep: %" PRIu64 " of %zu bytes of host memory after %g s", now.host_bytes,
                 s->bytes, SETTLE_WAIT_S);
  }
}

static void weights(sides *s) {
  char title[96], size[32];
  begin(s, KVCACHED_WEIGHTS, s->o->weights);
  bench_size_text(size, sizeof(size), s->bytes);
  (void)snprintf(title, sizeof(title), "Sleep and wake, WEIGHTS, %s", size);
  report_section(s->rep, title);

  double first_sleep = library_sleep(s), first_wake = library_wake(s);
  size_t freed;
  KVC(kvcached_trim_host(s->ctx, 1, &freed));
  if (freed < s->bytes) bench_fail("trim_host gave %zu bytes back, not %zu", freed, s->bytes);
  double prepare = prepare_sleep(s);
  kvcached_stats_t held = bench_stats(s->ctx);
  double after_prepare = library_sleep(s);
  (void)library_wake(s);

  samples sleep = {0}, wake = {0}, wake_rate = {0}, in = {0}, out = {0}, unmap = {0}, make = {0},
          make_copy = {0};
  for (int round = 0; round <= s->o->sleep_rounds; round++) {
    raw_times t;
    if (round % 2) raw_round(s, &t);
    double slept = library_sleep(s), woke = library_wake(s);
    if (round % 2 == 0) raw_round(s, &t);
    if (round == 0) continue;
    samples_add(&sleep, ms(slept));
    samples_add(&wake, ms(woke));
    samples_add(&wake_rate, rate(s->bytes, woke));
    samples_add(&in, rate(s->bytes, t.in));
    samples_add(&out, rate(s->bytes, t.out));
    samples_add(&unmap, ms(t.unmap));
    samples_add(&make, ms(t.make));
    samples_add(&make_copy, ms(t.make + t.in));
  }
  row(s, "weights_sleep_copied", "sleep, host copy exists (raw: unmap, release)", "ms", &sleep, &unmap);
  if (s->o->backend == KVCACHED_BACKEND_CUDA) report_bound_value(s->rep, AT_MOST, SLEEP_BOUND_MS);
  row(s, "weights_wake", "wake (raw: create, map, access, copy)", "ms", &wake, &make_copy);
  row(s, "weights_wake_rate", "wake, rate (raw: plain pinned copy)", "GB/s", &wake_rate, &in);
  if (s->o->backend == KVCACHED_BACKEND_CUDA) report_bound_ratio(s->rep, AT_LEAST, WAKE_BOUND);
  row(s, "weights_raw_make", "  raw create, map, access alone", "ms", NULL, &make);
  row(s, "weights_raw_copy_out", "  raw plain pinned copy, device to host", "GB/s", NULL, &out);
  one(s, "weights_sleep_first", "sleep, no host memory yet, no copy", "ms", ms(first_sleep));
  one(s, "weights_wake_first", "wake after it", "ms", ms(first_wake));
  one(s, "weights_prepare_sleep", "prepare_sleep, until host memory and copy are there", "ms", ms(prepare));
  one(s, "weights_sleep_prepared", "sleep after it", "ms", ms(after_prepare));
  report_value(s->rep,
               (report_row_id){"weights_host_pinned_percent", "host memory of the copy that is pinned", "%"},
               held.host_bytes ? 100.0 * (double)held.host_pinned / (double)held.host_bytes : 0);
  end(s);
  samples_free(&sleep), samples_free(&wake), samples_free(&wake_rate), samples_free(&in), samples_free(&out);
  samples_free(&unmap), samples_free(&make), samples_free(&make_copy);
}

static void kv(sides *s) {
  char title[96], size[32];
  begin(s, KVCACHED_KV, s->o->kv);
  bench_size_text(size, sizeof(size), s->bytes);
  (void)snprintf(title, sizeof(title), "Sleep and wake, KV, %s, all of it in use", size);
  report_section(s->rep, title);
  double first = library_sleep(s);
  (void)library_wake(s);
  samples sleep = {0}, wake = {0}, raw_sleep = {0}, raw_wake = {0}, sleep_rate = {0}, wake_rate = {0},
          in = {0}, out = {0};
  for (int round = 0; round <= s->o->sleep_rounds; round++) {
    raw_times t;
    if (round % 2) raw_round(s, &t);
    double slept = library_sleep(s), woke = library_wake(s);
    if (round % 2 == 0) raw_round(s, &t);
    if (round == 0) continue;
    samples_add(&sleep, ms(slept));
    samples_add(&wake, ms(woke));
    samples_add(&raw_sleep, ms(t.out + t.unmap));
    samples_add(&raw_wake, ms(t.make + t.in));
    samples_add(&sleep_rate, rate(s->bytes, slept));
    samples_add(&wake_rate, rate(s->bytes, woke));
    samples_add(&in, rate(s->bytes, t.in));
    samples_add(&out, rate(s->bytes, t.out));
  }
  row(s, "kv_sleep", "sleep (raw: copy, unmap, release)", "ms", &sleep, &raw_sleep);
  row(s, "kv_wake", "wake (raw: create, map, access, copy)", "ms", &wake, &raw_wake);
  row(s, "kv_sleep_rate", "sleep, rate (raw: plain pinned copy)", "GB/s", &sleep_rate, &out);
  row(s, "kv_wake_rate", "wake, rate (raw: plain pinned copy)", "GB/s", &wake_rate, &in);
  one(s, "kv_sleep_first", "sleep, no host memory yet", "ms", ms(first));
  end(s);
  samples_free(&sleep), samples_free(&wake), samples_free(&raw_sleep), samples_free(&raw_wake);
  samples_free(&sleep_rate), samples_free(&wake_rate), samples_free(&in), samples_free(&out);
}

/* No content to keep: what is left is the mapping. */
static void scratch(sides *s) {
  char title[96], size[32];
  s->kind_bit = KVCACHED_KIND_BIT(KVCACHED_SCRATCH);
  KVC(kvcached_reserve(s->ctx, KVCACHED_SCRATCH, s->o->kv, &s->region));
  s->all = s->bytes = kvcached_region_size(s->region);
  KVC(kvcached_ensure(s->region, 0, s->bytes));
  bench_size_text(size, sizeof(size), s->bytes);
  (void)snprintf(title, sizeof(title), "Sleep and wake, SCRATCH, %s", size);
  report_section(s->rep, title);
  samples sleep = {0}, wake = {0};
  for (int round = 0; round <= s->o->sleep_rounds; round++) {
    double slept = library_sleep(s), woke = library_wake(s);
    if (round == 0) continue;
    samples_add(&sleep, ms(slept));
    samples_add(&wake, ms(woke));
  }
  row(s, "scratch_sleep", "sleep", "ms", &sleep, NULL);
  row(s, "scratch_wake", "wake, to zeros", "ms", &wake, NULL);
  kvcached_unreserve(s->region);
  samples_free(&sleep), samples_free(&wake);
}

/* A model as it is served: one wake of all kinds. Beside it the plain copy of what has content: all that is
   mapped and zeroed too has to be hidden behind it. */
static void together(sides *s) {
  char title[160], size[3][32];
  kvcached_region_t cache, buffers;
  s->kind_bit = KVCACHED_ALL_KINDS;
  KVC(kvcached_reserve(s->ctx, KVCACHED_KV, s->o->kv, &cache));
  KVC(kvcached_reserve(s->ctx, KVCACHED_SCRATCH, s->o->kv, &buffers));
  KVC(kvcached_reserve(s->ctx, KVCACHED_WEIGHTS, s->o->weights, &s->region));
  size_t large = kvcached_region_size(s->region), small = kvcached_region_size(cache);
  s->bytes = large + small;
  s->all = s->bytes + kvcached_region_size(buffers);
  begin_raw(s, kvcached_region_page_size(s->region));
  const uint64_t *content = s->pin + large / sizeof(*s->pin);
  KVC(kvcached_write(s->region, 0, s->pin, large));
  KVC(kvcached_write(cache, 0, content, small));
  KVC(kvcached_ensure(buffers, 0, kvcached_region_size(buffers)));
  bench_size_text(size[0], sizeof(size[0]), large);
  bench_size_text(size[1], sizeof(size[1]), small);
  bench_size_text(size[2], sizeof(size[2]), kvcached_region_size(buffers));
  (void)snprintf(title, sizeof(title), "WEIGHTS %s, KV %s, SCRATCH %s", size[0], size[1], size[2]);
  report_section(s->rep, title);
  samples sleep = {0}, wake = {0}, wake_rate = {0}, copy = {0}, in = {0};
  for (int round = 0; round <= s->o->sleep_rounds; round++) {
    raw_times t;
    if (round % 2) raw_round(s, &t);
    double slept = library_sleep(s), woke = library_wake(s);
    if (round % 2 == 0) raw_round(s, &t);
    if (round == 0) continue;
    samples_add(&sleep, ms(slept));
    samples_add(&wake, ms(woke));
    samples_add(&copy, ms(t.in));
    samples_add(&wake_rate, rate(s->bytes, woke));
    samples_add(&in, rate(s->bytes, t.in));
  }
  row(s, "together_sleep", "sleep, host copy of the weights exists", "ms", &sleep, NULL);
  row(s, "together_wake", "wake (raw: plain pinned copy of weights + KV)", "ms", &wake, &copy);
  row(s, "together_wake_rate", "weights + KV + scratch together, rate", "GB/s", &wake_rate, &in);
  if (s->o->backend == KVCACHED_BACKEND_CUDA) report_bound_ratio(s->rep, AT_LEAST, WAKE_BOUND);
  verify(cache, content, small);
  verify(s->region, s->pin, large);
  end_raw(s);
  kvcached_unreserve(cache);
  kvcached_unreserve(buffers);
  kvcached_unreserve(s->region);
  KVC(kvcached_trim(s->ctx, 0, NULL));
  samples_free(&sleep), samples_free(&wake), samples_free(&wake_rate), samples_free(&copy), samples_free(&in);
}

void bench_sleep(const bench_options *o, raw_device *dev, report *rep) {
  kvcached_ctx_t ctx = bench_open(o, 0, bench_ledger());
  sides s = {.o = o, .dev = dev, .rep = rep, .ctx = ctx};
  weights(&s);
  kv(&s);
  scratch(&s);
  together(&s);
  kvcached_shutdown(ctx);
}
