/*
 * What llama-server's glue does with the slot it is given, for the tests of package kvcached: opens the slot
 * that KVCACHED_LEASES names for the host, reserves 1 GiB of KV and maps argv[1] bytes of it, then argv[2]
 * bytes of weights and argv[3] of compute buffers in full, says so, and does what its standard input says:
 *
 *   grow N   inside the gate, N more bytes of KV: "grown TOTAL" or "failed ERROR"
 *   check    inside the gate, whether all content is as it was left: "intact" or "damaged KIND AT"
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvcached.h"

static const char *variable(const char *name) {
  const char *value = getenv(name);
  if (!value) {
    fprintf(stderr, "child: %s is not set\n", name);
    exit(2);
  }
  return value;
}

/* Fills options from the host's entry, device,slot,limit,ledger, which may be followed by others. */
static void take_lease(kvcached_options_t *options, char *leases) {
  for (char *entry = strtok(leases, ";"); entry; entry = strtok(NULL, ";")) {
    static char path[KVCACHED_PATH_MAX * 4];
    unsigned long long limit;
    if (sscanf(entry, "host,%d,%llu,%511[^;]", &options->slot, &limit, path) != 3) continue;
    options->limit = limit;
    options->ledger_path = path;
    return;
  }
  fprintf(stderr, "child: no lease of host memory\n");
  exit(2);
}

static unsigned char pattern(int kind, size_t at) { return (unsigned char)(at / 4096 * 7 + at + 31u * kind); }

static void fill(kvcached_region_t region, int kind, size_t from, size_t to) {
  unsigned char *base = kvcached_region_base(region);
  for (size_t at = from; at < to; ++at) base[at] = pattern(kind, at);
}

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  kvcached_options_t options;
  kvcached_options_init(&options);
  take_lease(&options, strdup(variable("KVCACHED_LEASES")));
  options.group = variable("KVCACHED_GROUP");
  options.group_wait_ms = (uint32_t)strtoul(variable("KVCACHED_ROOM_WAIT_MS"), NULL, 10);

  kvcached_ctx_t context;
  kvcached_region_t regions[3];
  size_t sizes[3];
  int failed = kvcached_open(&options, &context);
  for (int kind = KVCACHED_KV; !failed && kind <= KVCACHED_SCRATCH; ++kind) {
    sizes[kind] = strtoull(argv[1 + kind], NULL, 10);
    if (sizes[kind] == 0) continue;
    failed = kvcached_reserve(context, kind, kind == KVCACHED_KV ? (size_t)1 << 30 : sizes[kind],
                              &regions[kind]) ||
             kvcached_ensure(regions[kind], 0, sizes[kind]);
    if (!failed) fill(regions[kind], kind, 0, sizes[kind]);
  }
  if (failed) {
    fprintf(stderr, "child: %s\n", kvcached_last_error());
    return 1;
  }
  printf("mapped %s %s %s\n", argv[1], argv[2], argv[3]);
  fflush(stdout);

  char line[64];
  while (fgets(line, sizeof line, stdin)) {
    size_t more;
    if (kvcached_enter(context)) {
      printf("failed %s\n", kvcached_last_error());
    } else if (sscanf(line, "grow %zu", &more) == 1) {
      if (kvcached_ensure(regions[KVCACHED_KV], sizes[KVCACHED_KV], more)) {
        printf("failed %s\n", kvcached_last_error());
      } else {
        fill(regions[KVCACHED_KV], KVCACHED_KV, sizes[KVCACHED_KV], sizes[KVCACHED_KV] + more);
        sizes[KVCACHED_KV] += more;
        printf("grown %zu\n", sizes[KVCACHED_KV]);
      }
      kvcached_leave(context);
    } else {
      const char *damaged = NULL;
      size_t where = 0;
      /* compute buffers are dropped by a sleep */
      for (int kind = KVCACHED_KV; kind <= KVCACHED_WEIGHTS && !damaged; ++kind)
        for (size_t at = 0; at < sizes[kind] && !damaged; ++at)
          if (((unsigned char *)kvcached_region_base(regions[kind]))[at] != pattern(kind, at))
            damaged = kind == KVCACHED_KV ? "KV" : "weights", where = at;
      if (damaged)
        printf("damaged %s %zu\n", damaged, where);
      else
        printf("intact\n");
      kvcached_leave(context);
    }
    fflush(stdout);
  }
  kvcached_shutdown(context);
  return 0;
}
