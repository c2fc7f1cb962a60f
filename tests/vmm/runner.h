/* Between the runner and the rest of the test program. */
#ifndef RUNNER_H
#define RUNNER_H

#include "check.h"

#include <stdint.h>

/* The backend of the test that runs: "host", "host-2m" or "cuda". */
const char *test_backend_name(void);

/* Called before and after each test; a test must leave nothing open. */
void support_begin(void);
void support_end(void);

/* Between support.c and figures.c: whether the test has opened one context only; and what of the device's
   memory was used before it, with 1 when no other process of the test uses it since. */
int support_is_one_context(void);
int support_used_before(uint64_t *bytes);

/* Called before a failing process ends: removes its scratch files. */
void support_clean_up(void);

/* The program as `vmm_tests --peer ...`: a second process (peer.c). */
int peer_main(int argc, char **argv);

#endif
