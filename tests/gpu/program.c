#define _GNU_SOURCE
#include "program.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int n_wrong;
static const char *known[32];
static size_t n_known;
static char ledger[64];
static pid_t ledger_owner;

void fail(const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  (void)fflush(stdout);
  (void)vfprintf(stderr, fmt, ap);
  (void)fprintf(stderr, "\n");
  va_end(ap);
  exit(2);
}

void must_kvc(int err, const char *what) {
  if (err) fail("%s: %s: %s", what, kvcached_err_name(err), kvcached_last_error());
}

void must_raw(int err, const char *what) {
  if (err) fail("%s: %s", what, raw_error());
}

void *must_alloc(size_t size) {
  void *p = calloc(1, size);
  if (!p) fail("no memory");
  return p;
}

void wrong(const char *fmt, ...) {
  if (++n_wrong > 50) return; /* they tell the same */
  va_list ap;
  va_start(ap, fmt);
  printf("wrong: ");
  (void)vprintf(fmt, ap);
  printf("\n");
  (void)fflush(stdout);
  va_end(ap);
}

int verdict(const char *name, const char *fmt, ...) {
  char text[512];
  va_list ap;
  va_start(ap, fmt);
  (void)vsnprintf(text, sizeof(text), fmt, ap);
  va_end(ap);
  printf("%s %s: %s", n_wrong ? "FAIL" : "ok", name, text);
  if (n_wrong) printf("; %d checks failed", n_wrong);
  printf("\n");
  (void)fflush(stdout);
  return n_wrong ? 1 : 0;
}

double now_s(void) {
  struct timespec t;
  if (clock_gettime(CLOCK_MONOTONIC, &t) != 0) fail("no monotonic clock");
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

uint64_t next_random(void) {
  static uint64_t state = 0x853c49e6748fea9bu;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

uint64_t argument(int argc, char **argv, const char *name, uint64_t otherwise) {
  if (n_known == sizeof(known) / sizeof(known[0])) fail("too many options");
  known[n_known++] = name;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (strcmp(argv[i], name) != 0) continue;
    char *end;
    uint64_t n = strtoull(argv[i + 1], &end, 10);
    int shift = *end == 'K' ? 10 : *end == 'M' ? 20 : *end == 'G' ? 30 : 0;
    if (end == argv[i + 1] || end[shift != 0]) fail("%s %s: a number is wanted", name, argv[i + 1]);
    return n << shift;
  }
  return otherwise;
}

void done_arguments(int argc, char **argv) {
  for (int i = 1; i < argc; i += 2) {
    int found = 0;
    for (size_t k = 0; k < n_known; k++) found |= strcmp(argv[i], known[k]) == 0;
    if (found && i + 1 < argc) continue;
    (void)fprintf(stderr, "%s: options are", argv[i]);
    for (size_t k = 0; k < n_known; k++) (void)fprintf(stderr, " %s N", known[k]);
    fail(".");
  }
}

static void log_problem(int level, const char *msg, void *user) {
  (void)user;
  if (level <= KVCACHED_LOG_WARN) (void)fprintf(stderr, "kvcached: %s\n", msg);
}

static void remove_ledger(void) {
  if (getpid() == ledger_owner) (void)unlink(ledger);
}

kvcached_ctx_t open_gpu(uint64_t pool_limit) {
  if (!ledger_owner) {
    ledger_owner = getpid();
    (void)snprintf(ledger, sizeof(ledger), "/dev/shm/kvcached-gpu-test-%ld", (long)ledger_owner);
    if (atexit(remove_ledger) != 0) fail("no memory");
  }
  kvcached_options_t o;
  kvcached_options_init(&o);
  o.backend = KVCACHED_BACKEND_CUDA;
  o.pool_limit = pool_limit;
  o.ledger_path = ledger;
  o.log = log_problem;
  kvcached_ctx_t ctx;
  KVC(kvcached_open(&o, &ctx));
  return ctx;
}

kvcached_stats_t stats_of(kvcached_ctx_t ctx) {
  kvcached_stats_t s = {.struct_size = sizeof(s)};
  KVC(kvcached_stats(ctx, &s));
  return s;
}

uint64_t used_bytes(kvcached_ctx_t ctx) {
  uint64_t free_now, total;
  KVC(kvcached_device_memory(ctx, &free_now, &total));
  return total - free_now;
}
