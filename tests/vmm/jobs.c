/*
 * The processes in which the tests run: this program again, one for each suite or for each test, several at
 * once.
 *
 * The child says over a pipe which test begins and how it ended; what it and its own children print is kept
 * and shown when a test fails. Where a child ends in the middle of a test that test has failed, and the next
 * one is begun in another child.
 */
#include "jobs.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { OUTPUT = 64 * 1024 };

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

int64_t clock_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* The first test behind `first` that does not belong into the same process. */
static int end_of(int first) {
  int end = first + 1;
  while (!opt.isolate && end < n_tests && strcmp(tests[end]->suite, tests[first]->suite) == 0) end++;
  return end;
}

static int remove_entry(const char *path, const struct stat *info, int type, struct FTW *at) {
  (void)info, (void)type, (void)at;
  (void)remove(path);
  return 0;
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
    say_process_failed(at, how);
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

static int own_path(char *self, size_t size) {
  ssize_t len = readlink("/proc/self/exe", self, size - 1);
  if (len <= 0) return -1;
  self[len] = 0;
  return 0;
}

int cuda_opens(char *why, size_t size) {
  char self[4096];
  int out[2];
  if (own_path(self, sizeof(self)) != 0 || pipe2(out, O_CLOEXEC) != 0) return 1; /* the tests will tell */
  fflush(stdout);
  pid_t pid = fork();
  if (pid == 0) {
    (void)setenv("KVCACHED_PROBE", "open", 1); /* probe.c */
    (void)dup2(out[1], 1);
    execl(self, self, (char *)NULL);
    _exit(127);
  }
  close(out[1]);
  char line[1200] = "";
  size_t have = 0;
  for (ssize_t n; have < sizeof(line) - 1 && (n = read(out[0], line + have, sizeof(line) - 1 - have)) > 0;)
    have += (size_t)n;
  close(out[0]);
  while (pid > 0 && waitpid(pid, NULL, 0) < 0 && errno == EINTR) {
  }
  line[strcspn(line, "\n")] = 0;
  if (strncmp(line, "KVCACHED_E_", 11) != 0) return 1;
  const char *detail = strchr(line, ' ');
  snprintf(why, size, "%s", detail ? detail + 1 : line);
  return 0;
}

int run_all(char **own_args, int n_args) {
  char self[4096];
  if (own_path(self, sizeof(self)) != 0) return -1;
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
