/*
 * What llama-server's glue does with the slot it is given, for the tests of package kvcached: opens the slot named in the
 * environment, reserves 1 GiB of KV and maps argv[1] bytes of it, then argv[2] bytes of weights and argv[3] of compute
 * buffers in full, says so and waits to be ended.
 */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "kvcached.h"

static const char *variable(const char *name) {
  const char *value = getenv(name);
  if (!value) {
    fprintf(stderr, "child: %s is not set\n", name);
    exit(2);
  }
  return value;
}

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  kvcached_options_t options;
  kvcached_options_init(&options);
  options.ledger_path = variable("KVCACHED_LEDGER");
  options.slot = atoi(variable("KVCACHED_SLOT"));
  options.group = variable("KVCACHED_GROUP");
  options.limit = strtoull(variable("KVCACHED_LIMIT"), NULL, 10);

  kvcached_ctx_t context;
  int failed = kvcached_open(&options, &context);
  for (int kind = KVCACHED_KV; !failed && kind <= KVCACHED_SCRATCH; ++kind) {
    kvcached_region_t region;
    size_t size = strtoull(argv[1 + kind], NULL, 10);
    failed = kvcached_reserve(context, kind, kind == KVCACHED_KV ? (size_t)1 << 30 : size, &region) ||
             kvcached_ensure(region, 0, size);
  }
  if (failed) {
    fprintf(stderr, "child: %s\n", kvcached_last_error());
    return 1;
  }
  printf("mapped %s %s %s\n", argv[1], argv[2], argv[3]);
  fflush(stdout);
  pause();
  return 0;
}
