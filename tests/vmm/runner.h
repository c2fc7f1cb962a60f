/* Between the runner and the rest of the test program. */
#ifndef RUNNER_H
#define RUNNER_H

#include "check.h"

/* The backend of the test that runs: "host", "host-2m" or "cuda". */
const char *test_backend_name(void);

/* Called before and after each test; a test must leave nothing open. */
void support_begin(void);
void support_end(void);

/* Called before a failing process ends: removes its scratch files. */
void support_clean_up(void);

/* The program as `vmm_tests --peer ...`: a second process (peer.c). */
int peer_main(int argc, char **argv);

#endif
