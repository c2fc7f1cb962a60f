/* Between the runner (runner.c) and the processes it runs the tests in (jobs.c). */
#ifndef JOBS_H
#define JOBS_H

#include "check.h"

#include <stdint.h>

enum { MAX_TESTS = 1024, MAX_JOBS = 16, MAX_FILTERS = 32 };
enum { PASSED, FAILED, SKIPPED, RESULTS };

/* ---- of the runner ---- */

/* The command line. */
typedef struct run_options {
  int list, isolate, no_exec, jobs, verbose, timeout_s, n_suites, n_names;
  const char *suite[MAX_FILTERS], *name[MAX_FILTERS];
} run_options;
extern run_options opt;

/* The tests that were chosen, suite by suite. */
extern test_case *tests[MAX_TESTS];
extern int n_tests;

/* Says and counts what came of a test; and of its process when that failed with no test under way. */
void say(int i, int result, long long ms, const char *more);
void say_process_failed(int i, const char *how);

/* ---- of the processes ---- */

/* Of the clock that times tests. */
int64_t clock_ms(void);

/* Whether CUDA's first device opens, tried in a process of its own; else why not. */
int cuda_opens(char *why, size_t size);

/* Runs all tests, as `own_args --child FD FIRST END`: tests [FIRST, END), and what becomes of them goes to
   FD. 0: all have been run. */
int run_all(char **own_args, int n_args);

#endif
