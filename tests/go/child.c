/*
 * What llama-server's glue does with the slot it is given, for the tests of package kvcached: opens the slot named in the
 * environment, reserves 1 GiB, maps argv[1] bytes of it, says so and waits to be ended.
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
  if (argc != 2) return 2;
  kvcached_options_t options;
  kvcached_options_init(&options);
  options.ledger_path = variable("KVCACHED_LEDGER");
  options.slot = atoi(variable("KVCACHED_SLOT"));
  options.group = variable("KVCACHED_GROUP");
  options.limit = strtoull(variable("KVCACHED_LIMIT"), NULL, 10);
  options.flags = KVCACHED_NO_CONTROL; /* as the glue, which does not use the gate yet */

  kvcached_ctx_t context;
  kvcached_region_t region;
  size_t size = strtoull(argv[1], NULL, 10);
  if (kvcached_open(&options, &context) || kvcached_reserve(context, KVCACHED_KV, (size_t)1 << 30, &region) ||
      kvcached_ensure(region, 0, size)) {
    fprintf(stderr, "child: %s\n", kvcached_last_error());
    return 1;
  }
  printf("mapped %zu\n", size);
  fflush(stdout);
  pause();
  return 0;
}
