/* What the programs of this folder share: messages, arguments, and a clock. */
#ifndef PROGRAM_H
#define PROGRAM_H

#include "kvcached.h"
#include "raw.h"

#include <stddef.h>
#include <stdint.h>

#define MIB ((size_t)1 << 20)
#define GIB ((size_t)1 << 30)

/* Ends the program: exit 2, what cannot go on; it is no verdict. */
_Noreturn void fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void must_kvc(int err, const char *what);
#define KVC(call) must_kvc((call), #call)
void must_raw(int err, const char *what);
#define RAW(call) must_raw((call), #call)
void *must_alloc(size_t size); /* zeroed */

/* A check that failed: printed and counted. The program goes on and exits 1 at its end. */
void wrong(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
#define EXPECT(condition, ...)            \
  do {                                    \
    if (!(condition)) wrong(__VA_ARGS__); \
  } while (0)
/* Prints "ok NAME: ..." or "FAIL NAME: ..." and gives the exit code. */
int verdict(const char *name, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

double now_s(void);
/* The next of a sequence of numbers, always the same one. */
uint64_t next_random(void);

/* --name VALUE among the arguments: a number, with K, M or G; else the default. Unknown arguments end the
   program once done_arguments is called. */
uint64_t argument(int argc, char **argv, const char *name, uint64_t otherwise);
void done_arguments(int argc, char **argv);

/* A context on the GPU, with a ledger of its own that goes when the program ends. */
kvcached_ctx_t open_gpu(uint64_t pool_limit);
kvcached_stats_t stats_of(kvcached_ctx_t ctx);
/* Bytes in use on the device, as the driver reports it. */
uint64_t used_bytes(kvcached_ctx_t ctx);

#endif
