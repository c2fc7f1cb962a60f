/*
 * libkvcached in one page: addresses first, memory where it is used, none of it while nobody works, and the
 * same content at the same address after. Ordinary memory, or that of a GPU:
 *
 *   tour [(host | cuda) [LEDGER]]
 */
#include "kvcached.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MIB ((size_t)1 << 20)

static void check(const char *what, int err) {
  if (err == KVCACHED_OK) return;
  fprintf(stderr, "%s: %s: %s (%s)\n", what, kvcached_err_name(err), kvcached_strerror(err),
          kvcached_last_error());
  exit(1);
}

static void show(const char *when, kvcached_ctx_t ctx) {
  kvcached_stats_t s = {.struct_size = sizeof s};
  check("stats", kvcached_stats(ctx, &s));
  printf("%-22s reserved %4" PRIu64 " MiB, mapped %3" PRIu64 ", idle %3" PRIu64 ", asleep %3" PRIu64
         ", host copy %3" PRIu64 "\n",
         when, s.reserved / MIB, s.mapped / MIB, s.idle / MIB, s.asleep / MIB, s.host_bytes / MIB);
}

static void log_line(int level, const char *message, void *user) {
  (void)user;
  if (level <= KVCACHED_LOG_WARN) fprintf(stderr, "libkvcached: %s\n", message);
}

int main(int argc, char **argv) {
  if (kvcached_abi_version() != KVCACHED_ABI_VERSION) {
    fprintf(stderr, "libkvcached has ABI %u, this program needs %u\n", kvcached_abi_version(),
            KVCACHED_ABI_VERSION);
    return 1;
  }
  int cuda = argc > 1 && strcmp(argv[1], "cuda") == 0;
  if (argc > 3 || (argc > 1 && !cuda && strcmp(argv[1], "host") != 0)) {
    fprintf(stderr, "usage: %s [(host | cuda) [LEDGER]]\n", argv[0]);
    return 2;
  }

  kvcached_options_t options;
  kvcached_options_init(&options);
  options.backend = cuda ? KVCACHED_BACKEND_CUDA : KVCACHED_BACKEND_HOST;
  options.name = "tour";
  options.limit = 512 * MIB; /* of everybody in our group together */
  options.ledger_path = argc > 2 ? argv[2] : NULL;
  options.log = log_line;
  kvcached_ctx_t ctx;
  check("open", kvcached_open(&options, &ctx));

  /* Addresses for the longest context there may be, and for the weights. They cost nothing yet. */
  kvcached_region_t kv, weights;
  check("reserve", kvcached_reserve(ctx, KVCACHED_KV, 1024 * MIB, &kv));
  check("reserve", kvcached_reserve(ctx, KVCACHED_WEIGHTS, 64 * MIB, &weights));
  show("reserved", ctx);

  /* Whoever touches the memory, or launches work that does, is inside the gate. */
  unsigned char *data = malloc(2 * MIB), *back = malloc(2 * MIB);
  if (!data || !back) return 1;
  for (size_t i = 0; i < 2 * MIB; i++) data[i] = (unsigned char)(i * 31 + i / 4096);
  check("enter", kvcached_enter(ctx));
  check("ensure", kvcached_ensure(weights, 0, 64 * MIB));
  check("write", kvcached_write(weights, 10 * MIB, data, 2 * MIB));
  check("ensure", kvcached_ensure(kv, 0, 16 * MIB)); /* as the context grows: all of it, or nothing */
  check("write", kvcached_write(kv, 6 * MIB, data, 2 * MIB));
  void *base = kvcached_region_base(kv);
  check("leave", kvcached_leave(ctx));
  show("in use", ctx);

  /* The memory is somebody else's now. Nothing may touch it: hence the gate. */
  size_t freed;
  check("sleep", kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 1000, &freed));
  show("asleep", ctx);
  printf("sleep gave back %zu MiB\n", freed / MIB);

  /* Entering wakes. Addresses are what they were, and so is what is there. */
  check("enter", kvcached_enter(ctx));
  const kvcached_region_t regions[] = {kv, weights};
  const size_t offsets[] = {6 * MIB, 10 * MIB};
  for (int i = 0; i < 2; i++) {
    memset(back, 0, 2 * MIB);
    check("read", kvcached_read(regions[i], offsets[i], back, 2 * MIB));
    if (memcmp(data, back, 2 * MIB) != 0 || kvcached_region_base(kv) != base) {
      fprintf(stderr, "the content did not survive\n");
      return 1;
    }
  }
  check("leave", kvcached_leave(ctx));
  show("awake, as before", ctx);

  /* A conversation has ended: its pages stay for the next one, until memory is wanted. */
  check("release", kvcached_release(kv, 0, 16 * MIB));
  show("released", ctx);
  check("trim", kvcached_trim(ctx, 0, &freed));
  show("trimmed", ctx);

  kvcached_shutdown(ctx); /* regions, copies, threads, slot */
  free(data);
  free(back);
  return 0;
}
