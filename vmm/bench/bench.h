/*
 * What the parts of the benchmark share. It is a program: what cannot go on ends it with a message (exit 2).
 *
 *   main.c     arguments, order, exit code       raw_host.c, raw_cuda.c   the system's own calls
 *   report.c   figures as table and JSON         growth.c   ensure, release, trim against raw calls
 *   counted.c  counts real driver calls          sleep.c    sleep and wake against a plain pinned copy
 *                                                contention.c  claims of several processes
 */
#ifndef BENCH_H
#define BENCH_H

#include "kvcached.h"
#include "raw.h"
#include "report.h"

#include <stddef.h>
#include <stdint.h>

#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)
#define GIB ((size_t)1 << 30)

typedef struct bench_options {
  int backend;      /* kvcached_backend */
  int device;       /* CUDA ordinal */
  size_t page_size; /* of KV pages; 0 = the backend's default */
  size_t weights;   /* bytes of WEIGHTS that sleep and wake */
  size_t kv;        /* bytes of KV that sleep and wake */
  size_t steps[8];  /* pages of a growth step */
  size_t n_steps;
  int rounds; /* of each growth measurement */
  int sleep_rounds;
  int processes;       /* contention: 1, 2, 4 ... up to this many */
  double contention_s; /* seconds of each contention measurement */
} bench_options;

/* Ends the program: exit 2. */
_Noreturn void bench_fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* Calls that have to work. */
void bench_kvc(int err, const char *what);
#define KVC(call) bench_kvc((call), #call)
void bench_raw(int err, const char *what);
#define RAW(call) bench_raw((call), #call)

/* Seconds of a clock that only goes forward. */
double bench_now(void);

/* The name of a step for keys and labels: "64_pages", "64 pages, 128 MiB". */
void bench_step_key(char *out, size_t size, const char *prefix, size_t pages, const char *unit);
void bench_size_text(char *out, size_t size, size_t bytes);

/* Path of the ledger that the benchmark uses instead of the user's own, removed at the end. */
const char *bench_ledger(void);

/* A context on the backend under test. pool_limit: bytes; ledger: path, or "" for none. */
kvcached_ctx_t bench_open(const bench_options *o, uint64_t pool_limit, const char *ledger);
kvcached_stats_t bench_stats(kvcached_ctx_t ctx);

/* The parts. Each adds its rows to the report. */
void bench_growth(const bench_options *o, raw_device *dev, report *rep);
void bench_sleep(const bench_options *o, raw_device *dev, report *rep);
void bench_contention(const bench_options *o, report *rep);
/* A process of the contention part, started by it: measures, writes its result to stdout. */
int bench_contention_worker(int argc, char **argv);

/* counted.c: calls of the driver that the library has made, counted where it looks the functions up. */
uint64_t counted_calls(void);
int counted_any(void); /* 1: the library looked driver functions up, so the count means something */

#endif
