/*
 * Runs the tests: each suite in a fresh process (jobs.c), because a device's driver does not survive fork, a
 * test that crashes must not take others with it, and leaks show at a process's end. Here: what a test may
 * call, which of them are chosen, what such a process does, and the command line.
 */
#include "runner.h"

#include "jobs.h"

#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <unistd.h>

static const char *const backends[] = {"host", "host-2m", "cuda"};
enum { HOST, HOST_2M, CUDA, BACKENDS };

static test_case *first_test, **last_test = &first_test;
test_case *tests[MAX_TESTS];
int n_tests;
static int chosen_backend;       /* of KVCACHED_BACKEND */
static const test_case *current; /* in a child: the test that runs */
static const char *skipped;      /* why it was skipped */
static unsigned counts[BACKENDS][RESULTS];
run_options opt = {.jobs = 1, .timeout_s = 120};

void test_register(test_case *test) {
  *last_test = test;
  last_test = &test->next;
}

static int backend_of(const test_case *test) { return test->where == ON_HOST ? HOST : chosen_backend; }

const char *test_backend_name(void) { return backends[current ? backend_of(current) : chosen_backend]; }

void test_skip(const char *reason) { skipped = reason; }

static char note[400];

void test_note(const char *fmt, ...) {
  va_list args;
  va_start(args, fmt);
  vsnprintf(note, sizeof(note), fmt, args);
  va_end(args);
}

void check_failed(const char *file, int line, const char *fmt, ...) {
  char text[2000], detail[2000];
  snprintf(detail, sizeof(detail), "%s", kvcached_last_error());
  va_list args;
  va_start(args, fmt);
  vsnprintf(text, sizeof(text), fmt, args);
  va_end(args);
  fflush(stdout);
  fprintf(stderr, "%s:%d: %s\n  in %s.%s on %s, last error: %s\n", file, line, text,
          current ? current->suite : "?", current ? current->name : "?", test_backend_name(), detail);
  if (*note) fprintf(stderr, "  %s\n", note);
  fflush(stderr);
  support_clean_up();
  _exit(1); /* no handlers: other threads may still be at work */
}

/* ---- choosing ---- */

static int is_chosen(const test_case *t) {
  if (t->where == ON_CUDA && chosen_backend != CUDA) return 0;
  int yes = opt.n_suites == 0;
  for (int i = 0; i < opt.n_suites; i++) yes |= strcmp(opt.suite[i], t->suite) == 0;
  if (!yes || opt.n_names == 0) return yes;
  char full[200];
  snprintf(full, sizeof(full), "%s.%s", t->suite, t->name);
  for (int i = 0; i < opt.n_names; i++)
    if (strcmp(opt.name[i], t->name) == 0 || strcmp(opt.name[i], full) == 0) return 1;
  return 0;
}

static int choose(void) {
  for (const test_case *s = first_test; s; s = s->next) {
    int seen = 0;
    for (const test_case *t = first_test; t != s; t = t->next) seen |= strcmp(t->suite, s->suite) == 0;
    if (seen) continue;
    for (test_case *t = first_test; t; t = t->next) {
      if (strcmp(t->suite, s->suite) != 0 || !is_chosen(t)) continue;
      if (n_tests == MAX_TESTS) return -1;
      tests[n_tests++] = t;
    }
  }
  return n_tests;
}

/* ---- in the child ---- */

static int run_one(int i, char *result, size_t size) {
  current = tests[i];
  skipped = NULL;
  note[0] = 0;
  support_begin();
  int64_t start = clock_ms();
  tests[i]->run();
  support_end();
  fflush(stdout);
  int64_t ms = clock_ms() - start;
  if (skipped)
    snprintf(result, size, "skip %d %lld %s\n", i, (long long)ms, skipped);
  else
    snprintf(result, size, "pass %d %lld\n", i, (long long)ms);
  current = NULL;
  return skipped ? SKIPPED : PASSED;
}

/* Tests [first, end); what becomes of them goes to fd. */
static int run_child(int fd, int first, int end) {
  char line[400];
  (void)fcntl(fd, F_SETFD, FD_CLOEXEC);
  signal(SIGPIPE, SIG_IGN);
  for (int i = first; i < end; i++) {
    int n = snprintf(line, sizeof(line), "begin %d\n", i);
    if (write(fd, line, (size_t)n) != n) return 3;
    (void)run_one(i, line, sizeof(line));
    n = (int)strlen(line);
    if (write(fd, line, (size_t)n) != n) return 3;
  }
  return 0;
}

/* ---- what came of them ---- */

void say(int i, int result, long long ms, const char *more) {
  static const char *const word[] = {"ok  ", "FAIL", "skip"};
  counts[backend_of(tests[i])][result]++;
  printf("%s %-7s %s.%s (%lld ms)%s%s\n", word[result], backends[backend_of(tests[i])], tests[i]->suite,
         tests[i]->name, ms, *more ? ": " : "", more);
  fflush(stdout);
}

void say_process_failed(int i, const char *how) {
  counts[backend_of(tests[i])][FAILED]++;
  printf("FAIL %-7s %s: its process ended with %s\n", backends[backend_of(tests[i])], tests[i]->suite, how);
}

/* ---- in this process: for debuggers ---- */

static void run_here(void) {
  char result[400];
  for (int i = 0; i < n_tests; i++) {
    printf("     %s.%s\n", tests[i]->suite, tests[i]->name);
    fflush(stdout);
    int64_t start_ms = clock_ms();
    int how = run_one(i, result, sizeof(result));
    say(i, how, clock_ms() - start_ms, how == SKIPPED ? skipped : "");
  }
}

/* ---- the command line ---- */

static void usage(FILE *to) {
  fprintf(
      to,
      "vmm_tests [--list] [--suite NAME]... [--test [SUITE.]NAME]... [--isolate] [--no-exec]\n"
      "          [--jobs N] [--timeout SECONDS] [--verbose]\n"
      "  --isolate   a process a test instead of one a suite\n"
      "  --no-exec   all tests in this process (debuggers); the first failure ends it\n"
      "  --timeout   of one test; default 120, or KVCACHED_TEST_TIMEOUT\n"
      "  KVCACHED_BACKEND=host|host-2m|cuda chooses the backend; KVCACHED_TEST_ROUNDS=N makes the random\n"
      "  tests N times as long; KVCACHED_TEST_SEED=S has them begin with that seed\n");
}

/* A number from 1; without one the program ends. */
static int number(const char *option, const char *text) {
  int n = text ? atoi(text) : 0;
  if (n > 0) return n;
  fprintf(stderr, "%s%s%s: a number from 1 is wanted\n", option, text ? " " : "", text ? text : "");
  exit(2);
}

static int filter(const char *option, const char *text, const char **list, int *n) {
  if (text && *n < MAX_FILTERS) {
    list[(*n)++] = text;
    return 0;
  }
  if (text)
    fprintf(stderr, "%s %s: %d of them at most\n", option, text, MAX_FILTERS);
  else
    fprintf(stderr, "%s: its value is missing\n", option);
  return -1;
}

static int parse(int argc, char **argv) {
  for (int i = 1; i < argc; i++) {
    const char *a = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
    if (strcmp(a, "--list") == 0) {
      opt.list = 1;
    } else if (strcmp(a, "--isolate") == 0) {
      opt.isolate = 1;
    } else if (strcmp(a, "--no-exec") == 0) {
      opt.no_exec = 1;
    } else if (strcmp(a, "--verbose") == 0) {
      opt.verbose = 1;
    } else if (strcmp(a, "--suite") == 0) {
      if (filter(a, value, opt.suite, &opt.n_suites) != 0) return -1;
      i++;
    } else if (strcmp(a, "--test") == 0) {
      if (filter(a, value, opt.name, &opt.n_names) != 0) return -1;
      i++;
    } else if (strcmp(a, "--jobs") == 0) {
      opt.jobs = number(a, value), i++;
      if (opt.jobs > MAX_JOBS) opt.jobs = MAX_JOBS;
    } else if (strcmp(a, "--timeout") == 0) {
      opt.timeout_s = number(a, value), i++;
    } else if (strcmp(a, "--help") == 0 || strcmp(a, "-h") == 0) {
      usage(stdout);
      exit(0);
    } else {
      fprintf(stderr, "%s: not an option\n", a);
      usage(stderr);
      return -1;
    }
  }
  return 0;
}

static int no_such_test(void) {
  fprintf(stderr, "no such test on %s:", backends[chosen_backend]);
  for (int i = 0; i < opt.n_suites; i++) fprintf(stderr, " --suite %s", opt.suite[i]);
  for (int i = 0; i < opt.n_names; i++) fprintf(stderr, " --test %s", opt.name[i]);
  fprintf(stderr, " (--list: all there are)\n");
  return 2;
}

/* 0 when a test is chosen that needs CUDA and there is none: said once here, not by every test. */
static int device_is_there(void) {
  char why[1100];
  int wanted = 0;
  for (int i = 0; i < n_tests; i++) wanted |= backend_of(tests[i]) == CUDA;
  if (!wanted || cuda_opens(why, sizeof(why))) return 1;
  fprintf(stderr, "no CUDA here (%s): make test-fake runs the CUDA backend without a GPU\n", why);
  return 0;
}

int main(int argc, char **argv) {
  int child = argc > 4 && strcmp(argv[1], "--child") == 0;
  const char *backend = getenv("KVCACHED_BACKEND"), *timeout = getenv("KVCACHED_TEST_TIMEOUT");
  if (timeout && atoi(timeout) > 0) opt.timeout_s = atoi(timeout);
  if (backend && *backend) {
    chosen_backend = -1;
    for (int i = 0; i < BACKENDS; i++)
      if (strcmp(backend, backends[i]) == 0) chosen_backend = i;
    if (chosen_backend < 0) {
      fprintf(stderr, "KVCACHED_BACKEND=%s is none of host, host-2m, cuda\n", backend);
      return 2;
    }
  }
  if (argc > 1 && strcmp(argv[1], "--peer") == 0) return peer_main(argc - 1, argv + 1);
  if (parse(child ? argc - 4 : argc, child ? argv + 4 : argv) != 0) return 2;
  if (choose() < 0) {
    fprintf(stderr, "more than %d tests\n", MAX_TESTS);
    return 2;
  }
  if (child) return run_child(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
  if (n_tests == 0) return no_such_test();
  if (opt.list) {
    for (int i = 0; i < n_tests; i++)
      printf("%s.%s %s\n", tests[i]->suite, tests[i]->name, backends[backend_of(tests[i])]);
    return 0;
  }
  if (!device_is_there()) return 3;
  if (opt.no_exec)
    run_here();
  else if (run_all(argv, argc) != 0)
    return 3;

  unsigned failed = 0, skips = 0;
  for (int b = 0; b < BACKENDS; b++) {
    const unsigned *c = counts[b];
    if (c[PASSED] + c[FAILED] + c[SKIPPED] == 0) continue;
    printf("%s: %u passed, %u failed, %u skipped\n", backends[b], c[PASSED], c[FAILED], c[SKIPPED]);
    failed += c[FAILED];
    skips += c[SKIPPED];
  }
  if (chosen_backend == CUDA && skips > 0) {
    printf("with KVCACHED_BACKEND=cuda nothing may be skipped\n");
    return 1;
  }
  return failed > 0;
}
