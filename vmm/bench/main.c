/* Arguments, the order of the measurements, the exit code. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char usage[] =
    "usage: kvcached-bench [options]\n"
    "  --backend host|host-2m|cuda  what to measure (default: cuda where it opens, else host)\n"
    "  --device N                   CUDA ordinal (default 0)\n"
    "  --only growth|sleep|contention   one part; may be given several times (default: all)\n"
    "  --steps A,B,...              pages of a growth step (default 1,8,64,512)\n"
    "  --rounds N                   rounds of a growth measurement (default 30)\n"
    "  --size BYTES                 WEIGHTS that sleep and wake (default 8G on cuda, 256M on host)\n"
    "  --kv-size BYTES              KV that sleeps and wakes (default 1G on cuda, 64M on host)\n"
    "  --sleep-rounds N             rounds of a sleep measurement (default 7)\n"
    "  --processes N                contention of 1, 2, 4 ... N processes (default 8)\n"
    "  --seconds S                  time of each contention measurement (default 1)\n"
    "  --json FILE                  every figure, for programs\n"
    "  --check                      exit 1 when a bound does not hold (see README.md)\n"
    "BYTES: a number, with K, M or G for powers of 1024.\n";

enum { GROWTH = 1, SLEEP = 2, CONTENTION = 4, EVERYTHING = 7 };

static char ledger_path[64];
static pid_t ledger_owner;

void bench_fail(const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  (void)fprintf(stderr, "kvcached-bench: ");
  (void)vfprintf(stderr, fmt, ap);
  (void)fprintf(stderr, "\n");
  va_end(ap);
  exit(2);
}

void bench_kvc(int err, const char *what) {
  if (err) bench_fail("%s: %s: %s", what, kvcached_err_name(err), kvcached_last_error());
}

void bench_raw(int err, const char *what) {
  if (err) bench_fail("%s: %s", what, raw_error());
}

double bench_now(void) {
  struct timespec t;
  if (clock_gettime(CLOCK_MONOTONIC, &t) != 0) bench_fail("no monotonic clock");
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

void bench_size_text(char *out, size_t size, size_t bytes) {
  if (bytes >= GIB && bytes % GIB == 0)
    (void)snprintf(out, size, "%zu GiB", bytes / GIB);
  else if (bytes >= MIB && bytes % MIB == 0)
    (void)snprintf(out, size, "%zu MiB", bytes / MIB);
  else
    (void)snprintf(out, size, "%zu KiB", bytes / KIB);
}

void bench_step_key(char *out, size_t size, const char *prefix, size_t pages, const char *unit) {
  (void)snprintf(out, size, "%s_%zu_page%s_%s", prefix, pages, pages == 1 ? "" : "s", unit);
}

const char *bench_ledger(void) { return ledger_path; }

static void remove_ledger(void) {
  if (getpid() == ledger_owner) (void)unlink(ledger_path);
}

static void log_problem(int level, const char *msg, void *user) {
  (void)user;
  if (level <= KVCACHED_LOG_WARN) (void)fprintf(stderr, "kvcached: %s\n", msg);
}

kvcached_ctx_t bench_open(const bench_options *o, uint64_t pool_limit, const char *ledger) {
  kvcached_options_t options;
  kvcached_options_init(&options);
  options.backend = o->backend;
  options.device = o->device;
  options.page_size = o->page_size;
  options.pool_limit = pool_limit;
  options.ledger_path = ledger;
  options.group = "bench";
  options.name = "kvcached-bench";
  options.log = log_problem;
  kvcached_ctx_t ctx;
  KVC(kvcached_open(&options, &ctx));
  return ctx;
}

kvcached_stats_t bench_stats(kvcached_ctx_t ctx) {
  kvcached_stats_t s = {.struct_size = sizeof(s)};
  KVC(kvcached_stats(ctx, &s));
  return s;
}

/* ---- arguments ---- */

static size_t size_argument(const char *option, const char *text) {
  char *end;
  errno = 0;
  unsigned long long n = strtoull(text, &end, 10);
  int shift = *end == 'K' ? 10 : *end == 'M' ? 20 : *end == 'G' ? 30 : 0;
  if (shift) end++;
  if (errno || end == text || *end || text[0] == '-' || n == 0 || n > SIZE_MAX >> shift)
    bench_fail("%s %s: bytes are wanted, for instance 8G", option, text);
  return (size_t)n << shift;
}

static int count_argument(const char *option, const char *text, int max) {
  char *end;
  errno = 0;
  long n = strtol(text, &end, 10);
  if (errno || end == text || *end || n < 0 || n > max)
    bench_fail("%s %s: a number from 0 to %d is wanted", option, text, max);
  return (int)n;
}

static double seconds_argument(const char *option, const char *text) {
  char *end;
  double s = strtod(text, &end);
  if (end == text || *end || !(s > 0 && s <= 3600)) bench_fail("%s %s: seconds are wanted", option, text);
  return s;
}

static void steps_argument(bench_options *o, const char *text) {
  char *end;
  o->n_steps = 0;
  do {
    errno = 0;
    unsigned long n = strtoul(text, &end, 10);
    if (errno || end == text || (*end && *end != ',') || n == 0 || n > 1u << 20)
      bench_fail("--steps: numbers of pages are wanted, for instance 1,64");
    if (o->n_steps == sizeof(o->steps) / sizeof(o->steps[0])) bench_fail("--steps: too many");
    o->steps[o->n_steps++] = n;
    text = end + 1;
  } while (*end);
}

static const raw_ops *backend_argument(bench_options *o, const char *name) {
  if (strcmp(name, "cuda") == 0) {
    o->backend = KVCACHED_BACKEND_CUDA;
    return &raw_cuda;
  }
  o->backend = KVCACHED_BACKEND_HOST;
  if (strcmp(name, "host-2m") == 0)
    o->page_size = 2 * MIB;
  else if (strcmp(name, "host") != 0)
    bench_fail("--backend %s: host, host-2m or cuda", name);
  return &raw_host;
}

typedef struct run {
  bench_options options;
  const raw_ops *ops; /* NULL: what there is */
  const char *json;
  int check;
  unsigned parts;
} run;

static void parse(int argc, char **argv, run *r) {
  bench_options *o = &r->options;
  for (int i = 1; i < argc; i++) {
    const char *a = argv[i];
    if (strcmp(a, "--check") == 0) {
      r->check = 1;
      continue;
    }
    if (strcmp(a, "--help") == 0 || strcmp(a, "-h") == 0) {
      (void)fputs(usage, stdout);
      exit(0);
    }
    if (i + 1 == argc) bench_fail("%s: not an option, or its value is missing\n%s", a, usage);
    const char *v = argv[++i];
    if (strcmp(a, "--backend") == 0)
      r->ops = backend_argument(o, v);
    else if (strcmp(a, "--device") == 0)
      o->device = count_argument(a, v, INT_MAX);
    else if (strcmp(a, "--only") == 0) {
      unsigned part = strcmp(v, "growth") == 0       ? GROWTH
                      : strcmp(v, "sleep") == 0      ? SLEEP
                      : strcmp(v, "contention") == 0 ? CONTENTION
                                                     : 0;
      if (!part) bench_fail("--only %s: growth, sleep or contention", v);
      r->parts |= part;
    } else if (strcmp(a, "--steps") == 0)
      steps_argument(o, v);
    else if (strcmp(a, "--rounds") == 0)
      o->rounds = count_argument(a, v, 100000);
    else if (strcmp(a, "--size") == 0)
      o->weights = size_argument(a, v);
    else if (strcmp(a, "--kv-size") == 0)
      o->kv = size_argument(a, v);
    else if (strcmp(a, "--sleep-rounds") == 0)
      o->sleep_rounds = count_argument(a, v, 10000);
    else if (strcmp(a, "--processes") == 0)
      o->processes = count_argument(a, v, 64);
    else if (strcmp(a, "--seconds") == 0)
      o->contention_s = seconds_argument(a, v);
    else if (strcmp(a, "--json") == 0)
      r->json = v;
    else
      bench_fail("%s: not an option\n%s", a, usage);
  }
  if (o->rounds < 1 || o->sleep_rounds < 1 || o->processes < 1)
    bench_fail("a measurement needs one round and one process at least");
  if (!r->parts) r->parts = EVERYTHING;
}

/* The raw side of the comparison; decides the backend where none was asked for. */
static raw_device *open_raw(run *r) {
  raw_device *dev;
  if (!r->ops) {
    if (raw_cuda.open(r->options.device, &dev) == 0) {
      r->options.backend = KVCACHED_BACKEND_CUDA;
      return dev;
    }
    (void)fprintf(stderr, "kvcached-bench: no GPU (%s): ordinary memory is measured\n", raw_error());
    r->ops = &raw_host;
  }
  if (r->ops->open(r->options.device, &dev) != 0) bench_fail("%s: %s", r->ops->name, raw_error());
  return dev;
}

static void add_facts(const run *r, raw_device *dev, report *rep) {
  char device[128], driver[160], when[32];
  time_t now = time(NULL);
  struct tm utc;
  if (!gmtime_r(&now, &utc) || strftime(when, sizeof(when), "%Y-%m-%dT%H:%M:%SZ", &utc) == 0) when[0] = 0;
  dev->ops->describe(dev, device, sizeof(device), driver, sizeof(driver));
  report_fact(rep, "library", "libkvcached %s, ABI %u", kvcached_version(), (unsigned)kvcached_abi_version());
  report_fact(rep, "backend", "%s", dev->ops->name);
  report_fact(rep, "device", "%s", device);
  report_fact(rep, "driver", "%s", driver);
  report_fact(rep, "time", "%s", when);
  report_fact(rep, "cpus", "%ld", sysconf(_SC_NPROCESSORS_ONLN));
  report_fact(rep, "rounds", "%d, sleep %d, one more of each not counted", r->options.rounds,
              r->options.sleep_rounds);
}

int main(int argc, char **argv) {
  if (argc > 1 && strcmp(argv[1], "--contention-worker") == 0) return bench_contention_worker(argc, argv);

  run r = {.options = {.steps = {1, 8, 64, 512},
                       .n_steps = 4,
                       .rounds = 30,
                       .sleep_rounds = 7,
                       .processes = 8,
                       .contention_s = 1}};
  parse(argc, argv, &r);
  FILE *json = NULL; /* before the measurements, which are not to be lost for it */
  if (r.json && !(json = fopen(r.json, "we"))) bench_fail("--json %s: %s", r.json, strerror(errno));
  if (kvcached_abi_version() != KVCACHED_ABI_VERSION)
    bench_fail("libkvcached.so has ABI %u, this program was built for %d", (unsigned)kvcached_abi_version(),
               KVCACHED_ABI_VERSION);
  ledger_owner = getpid();
  (void)snprintf(ledger_path, sizeof(ledger_path), "/dev/shm/kvcached-bench-%ld", (long)ledger_owner);
  if (atexit(remove_ledger) != 0) bench_fail("no memory");

  raw_device *dev = open_raw(&r);
  int gpu = r.options.backend == KVCACHED_BACKEND_CUDA;
  if (!r.options.weights) r.options.weights = gpu ? 8 * GIB : 256 * MIB;
  if (!r.options.kv) r.options.kv = gpu ? GIB : 64 * MIB;

  report *rep = report_new();
  add_facts(&r, dev, rep);
  if (r.parts & GROWTH) bench_growth(&r.options, dev, rep);
  if (r.parts & SLEEP) bench_sleep(&r.options, dev, rep);
  if (r.parts & CONTENTION) bench_contention(&r.options, rep);
  dev->ops->close(dev);

  size_t bounds, failures = report_failures(rep, &bounds);
  report_table(rep);
  printf("\n%zu of %zu bounds hold%s\n", bounds - failures, bounds,
         bounds ? "" : " (bounds are for cuda, and for the parts that were run)");
  if (json && report_json(rep, json) != 0) bench_fail("--json %s: %s", r.json, strerror(errno));
  report_free(rep);
  if (fflush(stdout) != 0) bench_fail("the table could not be written: %s", strerror(errno));
  return r.check && (failures || !bounds) ? 1 : 0;
}
