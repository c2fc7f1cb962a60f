/*
 * Runs the tests: each suite in a fresh process (this program again), because a device's driver does not
 * survive fork, a test that crashes must not take others with it, and leaks show at a process's end.
 *
 * The child says over a pipe which test begins and how it ended; what it and its own children print is kept
 * and shown when a test fails. Where a child ends in the middle of a test that test has failed, and the next
 * one is begun in another child.
 */
#include "runner.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_TESTS = 1024, MAX_JOBS = 16, MAX_FILTERS = 32, OUTPUT = 64 * 1024 };
enum { PASSED, FAILED, SKIPPED, RESULTS };
static const char *const backends[] = {"host", "host-2m", "cuda"};
enum { HOST, HOST_2M, CUDA, BACKENDS };

static test_case *first_test, **last_test = &first_test;
static test_case *tests[MAX_TESTS]; /* those chosen, suite by suite */
static int n_tests;
static int chosen_backend;       /* of KVCACHED_BACKEND */
static const test_case *current; /* in a child: the test that runs */
static const char *skipped;      /* why it was skipped */
static unsigned counts[BACKENDS][RESULTS];

static struct {
  int list, isolate, no_exec, jobs, verbose, timeout_s, n_suites, n_names;
  const char *suite[MAX_FILTERS], *name[MAX_FILTERS];
} opt = {.jobs = 1, .timeout_s = 120};

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

/* The first test behind `first` that does not belong into the same process. */
static int end_of(int first) {
  int end = first + 1;
  while (!opt.isolate && end < n_tests && strcmp(tests[end]->suite, tests[first]->suite) == 0) end++;
  return end;
}

static int64_t clock_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
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

/* ---- the runner ---- */

typedef struct job {
  pid_t pid; /* 0: not in use */
  int results, output;
  int first, next, end, running; /* the test to begin next; the one under way, or -1 */
  int64_t since;                 /* when that began, or the process */
  int timed_out;
  char folder[256];
  char line[512], out[OUTPUT];
  size_t line_len, out_len;
} job;

static job jobs[MAX_JOBS];

static int remove_entry(const char *path, const struct stat *info, int type, struct FTW *at) {
  (void)info, (void)type, (void)at;
  (void)remove(path);
  return 0;
}

static void say(int i, int result, long long ms, const char *more) {
  static const char *const word[] = {"ok  ", "FAIL", "skip"};
  counts[backend_of(tests[i])][result]++;
  printf("%s %-7s %s.%s (%lld ms)%s%s\n", word[result], backends[backend_of(tests[i])], tests[i]->suite,
         tests[i]->name, ms, *more ? ": " : "", more);
  fflush(stdout);
}

static void show_output(job *j) {
  if (j->out_len == 0) return;
  for (char *p = j->out, *end = j->out + j->out_len; p < end;) {
    char *stop = memchr(p, '\n', (size_t)(end - p));
    if (!stop) stop = end;
    printf("    %.*s\n", (int)(stop - p), p);
    p = stop + 1;
  }
  fflush(stdout);
  j->out_len = 0;
}

static int start(job *j, int first, int end, const char *self, char **own_args, int n_args) {
  const char *tmp = getenv("TMPDIR");
  *j = (job){.first = first, .next = first, .end = end, .running = -1, .since = clock_ms()};
  snprintf(j->folder, sizeof(j->folder), "%s/kvcached-tests-XXXXXX", tmp && *tmp ? tmp : "/tmp");
  int results[2], output[2];
  if (!mkdtemp(j->folder) || pipe2(results, O_CLOEXEC) != 0 || pipe2(output, O_CLOEXEC) != 0) {
    perror("starting a suite");
    return -1;
  }
  char fd_text[16], first_text[16], end_text[16];
  char *argv[MAX_FILTERS * 4 + 16];
  int n = 0;
  snprintf(fd_text, sizeof(fd_text), "%d", results[1]);
  snprintf(first_text, sizeof(first_text), "%d", first);
  snprintf(end_text, sizeof(end_text), "%d", end);
  argv[n++] = own_args[0];
  argv[n++] = "--child";
  argv[n++] = fd_text;
  argv[n++] = first_text;
  argv[n++] = end_text;
  for (int i = 1; i < n_args && n < MAX_FILTERS * 4 + 15; i++) argv[n++] = own_args[i];
  argv[n] = NULL;
  fflush(stdout);
  pid_t pid = fork();
  if (pid < 0) {
    perror("fork");
    return -1;
  }
  if (pid == 0) {
    (void)setpgid(0, 0);
    (void)setenv("TMPDIR", j->folder, 1);
    if (getenv("FAKE_CUDA_MEMORY") && !getenv("FAKE_CUDA_STATE")) { /* a device of its own for each process */
      char state[300];
      snprintf(state, sizeof(state), "%s/fake-cuda", j->folder);
      (void)setenv("FAKE_CUDA_STATE", state, 1);
    }
    (void)fcntl(results[1], F_SETFD, 0);
    (void)dup2(output[1], 1);
    (void)dup2(output[1], 2);
    execv(self, argv);
    _exit(127);
  }
  (void)setpgid(pid, pid);
  close(results[1]);
  close(output[1]);
  j->pid = pid;
  j->results = results[0];
  j->output = output[0];
  (void)fcntl(j->results, F_SETFL, O_NONBLOCK);
  (void)fcntl(j->output, F_SETFL, O_NONBLOCK);
  return 0;
}

/* Keeps the last part of what was printed. */
static void read_output(job *j) {
  char buf[4096];
  for (ssize_t n; (n = read(j->output, buf, sizeof(buf))) > 0;) {
    size_t add = (size_t)n;
    if (j->out_len + add > OUTPUT) {
      size_t drop = j->out_len + add - OUTPUT;
      memmove(j->out, j->out + drop, j->out_len - drop);
      j->out_len -= drop;
    }
    memcpy(j->out + j->out_len, buf, add);
    j->out_len += add;
  }
}

static void take_line(job *j) {
  int i;
  long long ms;
  char reason[400] = "";
  if (sscanf(j->line, "begin %d", &i) == 1) {
    j->running = i;
    j->next = i + 1;
    j->since = clock_ms();
  } else if (sscanf(j->line, "pass %d %lld", &i, &ms) == 2) {
    read_output(j);
    say(i, PASSED, ms, "");
    if (opt.verbose) show_output(j);
    j->out_len = 0;
    j->running = -1;
    j->since = clock_ms();
  } else if (sscanf(j->line, "skip %d %lld %399[^\n]", &i, &ms, reason) >= 2) {
    say(i, SKIPPED, ms, reason);
    j->running = -1;
    j->since = clock_ms();
  }
}

static void read_results(job *j) {
  char buf[1024];
  for (ssize_t n; (n = read(j->results, buf, sizeof(buf))) > 0;)
    for (ssize_t k = 0; k < n; k++) {
      if (buf[k] != '\n') {
        if (j->line_len + 1 < sizeof(j->line)) j->line[j->line_len++] = buf[k];
        continue;
      }
      j->line[j->line_len] = 0;
      j->line_len = 0;
      take_line(j);
    }
}

/* The child has ended; what was under way has failed. Its own children end with it, and its files. */
static void finish(job *j) {
  int status = 0;
  (void)kill(-j->pid, SIGKILL);
  while (waitpid(j->pid, &status, 0) < 0 && errno == EINTR) {
  }
  read_results(j);
  read_output(j);
  char how[100];
  if (j->timed_out)
    snprintf(how, sizeof(how), "no end after %d s", opt.timeout_s);
  else if (WIFSIGNALED(status))
    snprintf(how, sizeof(how), "signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
  else
    snprintf(how, sizeof(how), "exit status %d", WEXITSTATUS(status));
  if (j->running >= 0) {
    say(j->running, FAILED, clock_ms() - j->since, how);
    show_output(j);
  } else if (j->timed_out || status != 0) {
    /* after its last test, or before its first: a leak, a crash at exit; nothing else would count it */
    int at = j->next > j->first ? j->next - 1 : j->first;
    counts[backend_of(tests[at])][FAILED]++;
    printf("FAIL %-7s %s: its process ended with %s\n", backends[backend_of(tests[at])], tests[at]->suite,
           how);
    show_output(j);
    if (j->next == j->first) j->next = j->end; /* it does not even start */
  }
  close(j->results);
  close(j->output);
  (void)nftw(j->folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
  j->pid = 0;
}

static int has_ended(const job *j) {
  siginfo_t info = {.si_pid = 0};
  return waitid(P_PID, (id_t)j->pid, &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid == j->pid;
}

static int run_all(char **own_args, int n_args) {
  char self[4096];
  ssize_t len = readlink("/proc/self/exe", self, sizeof(self) - 1);
  if (len <= 0) return -1;
  self[len] = 0;
  for (int next = 0;;) {
    int busy = 0;
    for (int k = 0; k < opt.jobs; k++) {
      job *j = &jobs[k];
      if (j->pid == 0 && j->next < j->end) { /* the rest of a suite whose process died */
        if (start(j, j->next, j->end, self, own_args, n_args)) return -1;
      } else if (j->pid == 0 && next < n_tests) {
        int end = end_of(next);
        if (start(j, next, end, self, own_args, n_args)) return -1;
        next = end;
      }
      busy += j->pid != 0;
    }
    if (!busy) return 0;
    struct pollfd fds[2 * MAX_JOBS];
    nfds_t n = 0;
    for (int k = 0; k < opt.jobs; k++)
      if (jobs[k].pid) {
        fds[n++] = (struct pollfd){.fd = jobs[k].results, .events = POLLIN};
        fds[n++] = (struct pollfd){.fd = jobs[k].output, .events = POLLIN};
      }
    (void)poll(fds, n, 20);
    for (int k = 0; k < opt.jobs; k++) {
      job *j = &jobs[k];
      if (!j->pid) continue;
      read_results(j);
      read_output(j);
      if (has_ended(j)) {
        finish(j);
      } else if (clock_ms() - j->since > (int64_t)opt.timeout_s * 1000) {
        j->timed_out = 1;
        (void)kill(j->pid, SIGABRT); /* lets a sanitizer or a debugger say where it was */
        usleep(200 * 1000);
        finish(j);
      }
    }
  }
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

static int usage(void) {
  fprintf(
      stderr,
      "vmm_tests [--list] [--suite NAME]... [--test [SUITE.]NAME]... [--isolate] [--no-exec]\n"
      "          [--jobs N] [--timeout SECONDS] [--verbose]\n"
      "  --isolate   a process a test instead of one a suite\n"
      "  --no-exec   all tests in this process (debuggers); the first failure ends it\n"
      "  --timeout   of one test; default 120, or KVCACHED_TEST_TIMEOUT\n"
      "  KVCACHED_BACKEND=host|host-2m|cuda chooses the backend; KVCACHED_TEST_ROUNDS=N makes the random\n"
      "  tests N times as long; KVCACHED_TEST_SEED=S has them begin with that seed\n");
  return 2;
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
    } else if (strcmp(a, "--suite") == 0 && value && opt.n_suites < MAX_FILTERS) {
      opt.suite[opt.n_suites++] = value, i++;
    } else if (strcmp(a, "--test") == 0 && value && opt.n_names < MAX_FILTERS) {
      opt.name[opt.n_names++] = value, i++;
    } else if (strcmp(a, "--jobs") == 0 && value && atoi(value) > 0) {
      opt.jobs = atoi(value) < MAX_JOBS ? atoi(value) : MAX_JOBS, i++;
    } else if (strcmp(a, "--timeout") == 0 && value && atoi(value) > 0) {
      opt.timeout_s = atoi(value), i++;
    } else {
      return -1;
    }
  }
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
  if (parse(child ? argc - 4 : argc, child ? argv + 4 : argv) != 0) return usage();
  if (choose() < 0) {
    fprintf(stderr, "more than %d tests\n", MAX_TESTS);
    return 2;
  }
  if (child) return run_child(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
  if (n_tests == 0) {
    fprintf(stderr, "no such test\n");
    return 2;
  }
  if (opt.list) {
    for (int i = 0; i < n_tests; i++)
      printf("%s.%s %s\n", tests[i]->suite, tests[i]->name, backends[backend_of(tests[i])]);
    return 0;
  }
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
