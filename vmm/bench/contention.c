/*
 * Contention for the ledger: N processes, each a new program, that ensure one page, release and trim it as
 * fast as they can, all in one group. Each ensure makes one claim in the ledger, each trim drops it. Pages
 * are ordinary memory of 4 KiB, whatever the rest of the benchmark uses, so that little else is measured; one
 * process without a ledger says what that little is.
 *
 * "roomy": the limit leaves room for all. "tight": room for half of them, so claims collide and are refused.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* Latencies by powers of two of nanoseconds, each cut into 32. */
#define PARTS 32
#define BUCKETS (40 * PARTS)

typedef struct latencies {
  uint64_t granted, refused; /* claims */
  double seconds;
  uint64_t max_ns;
  uint32_t count[BUCKETS]; /* of ensure calls, granted and refused */
} latencies;

static size_t bucket_of(uint64_t ns) {
  if (ns < PARTS) return (size_t)ns;
  int log = 63 - __builtin_clzll(ns); /* >= 5 */
  size_t b = (size_t)(log - 4) * PARTS + (size_t)((ns >> (log - 5)) - PARTS);
  return b < BUCKETS ? b : BUCKETS - 1;
}

/* The least of the nanoseconds that fall into a bucket. */
static double bucket_ns(size_t b) {
  if (b < PARTS) return (double)b;
  return (double)((uint64_t)(PARTS + b % PARTS) << (b / PARTS - 1));
}

static double percentile_us(const latencies *l, double share) {
  uint64_t total = 0, seen = 0;
  for (size_t b = 0; b < BUCKETS; b++) total += l->count[b];
  for (size_t b = 0; b < BUCKETS; b++) {
    seen += l->count[b];
    if (total && (double)seen >= share * (double)total) return bucket_ns(b) / 1e3;
  }
  return 0;
}

/* ---- one process ---- */

/* argv: program --contention-worker LEDGER LIMIT_BYTES SECONDS. Begins when stdin ends. */
int bench_contention_worker(int argc, char **argv) {
  if (argc != 5) bench_fail("--contention-worker is for the benchmark's own use");
  kvcached_options_t options;
  kvcached_options_init(&options);
  options.ledger_path = argv[2];
  options.limit = strtoull(argv[3], NULL, 10);
  options.group = "bench";
  options.flags = KVCACHED_NO_CONTROL;
  double seconds = strtod(argv[4], NULL);
  kvcached_ctx_t ctx;
  kvcached_region_t region;
  KVC(kvcached_open(&options, &ctx));
  size_t page = kvcached_page_size(ctx);
  KVC(kvcached_reserve(ctx, KVCACHED_KV, page, &region));

  static latencies l;
  char ready = 'r', byte;
  if (write(STDOUT_FILENO, &ready, 1) != 1) bench_fail("pipe: %s", strerror(errno));
  ssize_t n;
  while ((n = read(STDIN_FILENO, &byte, 1)) != 0)
    if (n < 0 && errno != EINTR) bench_fail("pipe: %s", strerror(errno));

  double begin = bench_now(), now = begin;
  while (now - begin < seconds) {
    double t0 = bench_now();
    int err = kvcached_ensure(region, 0, page);
    double t1 = bench_now();
    if (err && err != KVCACHED_E_LIMIT) KVC(err);
    uint64_t ns = (uint64_t)((t1 - t0) * 1e9);
    l.count[bucket_of(ns)]++;
    if (ns > l.max_ns) l.max_ns = ns;
    if (err) {
      l.refused++;
    } else {
      l.granted++;
      KVC(kvcached_release(region, 0, page));
      KVC(kvcached_trim(ctx, 0, NULL));
    }
    now = bench_now();
  }
  l.seconds = now - begin;
  kvcached_shutdown(ctx);
  for (size_t done = 0; done < sizeof(l);) {
    n = write(STDOUT_FILENO, (const char *)&l + done, sizeof(l) - done);
    if (n <= 0) bench_fail("pipe: %s", strerror(errno));
    done += (size_t)n;
  }
  return 0;
}

/* ---- all of them ---- */

typedef struct worker {
  pid_t pid;
  int from; /* its stdout */
} worker;

static worker start(const char *ledger, uint64_t limit, double seconds, int go_read, int go_write) {
  int out[2];
  if (pipe2(out, O_CLOEXEC) != 0) bench_fail("pipe: %s", strerror(errno));
  char limit_text[32], seconds_text[32];
  (void)snprintf(limit_text, sizeof(limit_text), "%ju", (uintmax_t)limit);
  (void)snprintf(seconds_text, sizeof(seconds_text), "%.3f", seconds);
  pid_t pid = fork();
  if (pid < 0) bench_fail("fork: %s", strerror(errno));
  if (pid == 0) {
    if (dup2(go_read, STDIN_FILENO) < 0 || dup2(out[1], STDOUT_FILENO) < 0) _exit(126);
    (void)close(go_write);
    (void)execl("/proc/self/exe", "kvcached-bench", "--contention-worker", ledger, limit_text, seconds_text,
                (char *)NULL);
    _exit(127);
  }
  (void)close(out[1]);
  return (worker){pid, out[0]};
}

static void receive(const worker *w, void *to, size_t size) {
  for (size_t done = 0; done < size;) {
    ssize_t n = read(w->from, (char *)to + done, size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) bench_fail("a process of the contention measurement ended early");
    done += (size_t)n;
  }
}

static void measure(const bench_options *o, int processes, const char *ledger, uint64_t limit, latencies *sum,
                    double *claims_per_s) {
  worker w[64];
  int go[2];
  if (pipe2(go, O_CLOEXEC) != 0) bench_fail("pipe: %s", strerror(errno));
  for (int i = 0; i < processes; i++) w[i] = start(ledger, limit, o->contention_s, go[0], go[1]);
  char ready;
  for (int i = 0; i < processes; i++) receive(&w[i], &ready, 1);
  (void)close(go[0]);
  (void)close(go[1]); /* all begin */
  memset(sum, 0, sizeof(*sum));
  *claims_per_s = 0;
  for (int i = 0; i < processes; i++) {
    static latencies l;
    receive(&w[i], &l, sizeof(l));
    (void)close(w[i].from);
    int status;
    if (waitpid(w[i].pid, &status, 0) != w[i].pid || status != 0)
      bench_fail("a process of the contention measurement failed");
    sum->granted += l.granted;
    sum->refused += l.refused;
    if (l.max_ns > sum->max_ns) sum->max_ns = l.max_ns;
    for (size_t b = 0; b < BUCKETS; b++) sum->count[b] += l.count[b];
    *claims_per_s += (double)(l.granted + l.refused) / l.seconds;
  }
}

static void rows(report *rep, int processes, const char *name, const char *label, const latencies *l,
                 double claims_per_s) {
  static const struct {
    const char *key, *label;
    double share;
  } share[] = {{"p50", "half within", 0.5}, {"p99", "99 % within", 0.99}, {"p999", "99.9 % within", 0.999}};
  char key[96], text[96];
  (void)snprintf(key, sizeof(key), "claims_%s_%d_processes_per_s", name, processes);
  (void)snprintf(text, sizeof(text), "%s, claims of all", label);
  report_value(rep, (report_row_id){key, text, "1/s"}, claims_per_s);
  for (size_t i = 0; i < sizeof(share) / sizeof(share[0]); i++) {
    (void)snprintf(key, sizeof(key), "claims_%s_%d_processes_%s_us", name, processes, share[i].key);
    (void)snprintf(text, sizeof(text), "  ensure with its claim, %s", share[i].label);
    report_value(rep, (report_row_id){key, text, "us"}, percentile_us(l, share[i].share));
  }
  (void)snprintf(key, sizeof(key), "claims_%s_%d_processes_max_us", name, processes);
  report_value(rep, (report_row_id){key, "  the longest", "us"}, (double)l->max_ns / 1e3);
  if (strcmp(name, "tight") != 0) {
    /* Room for all and still refused: the ledger would be wrong. */
    if (l->refused)
      bench_fail("%ju claims were refused though there was room for all", (uintmax_t)l->refused);
    return;
  }
  (void)snprintf(key, sizeof(key), "claims_%s_%d_processes_refused_percent", name, processes);
  report_value(rep, (report_row_id){key, "  refused", "%"},
               100.0 * (double)l->refused / (double)(l->granted + l->refused));
}

void bench_contention(const bench_options *o, report *rep) {
  char ledger[96];
  (void)snprintf(ledger, sizeof(ledger), "%s-contention", bench_ledger());
  uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
  latencies l;
  double per_s;
  report_section(rep, "Contention for the ledger");
  measure(o, 1, "", UINT64_MAX, &l, &per_s);
  rows(rep, 1, "no_ledger", "1 process, no ledger", &l, per_s);
  for (int n = 1; n <= o->processes; n = n < o->processes && n * 2 > o->processes ? o->processes : n * 2) {
    char label[64];
    (void)snprintf(label, sizeof(label), "%d process%s, roomy", n, n == 1 ? "" : "es");
    measure(o, n, ledger, UINT64_MAX, &l, &per_s);
    rows(rep, n, "roomy", label, &l, per_s);
    if (n == 1) continue;
    (void)snprintf(label, sizeof(label), "%d processes, tight", n);
    measure(o, n, ledger, (uint64_t)n / 2 * page, &l, &per_s);
    rows(rep, n, "tight", label, &l, per_s);
  }
  (void)unlink(ledger);
}
