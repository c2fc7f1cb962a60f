#include "support.h"

#include <errno.h>
#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static void walk_smaps(const void *base, size_t size, size_t *rss, size_t *huge, size_t *count) {
  uintptr_t lo = (uintptr_t)base, hi = lo + size;
  FILE *f = fopen("/proc/self/smaps", "re");
  CHECK(f != NULL);
  char line[512];
  int inside = 0;
  *rss = *huge = *count = 0;
  while (fgets(line, sizeof(line), f)) {
    uintptr_t a, b;
    size_t kb;
    if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " ", &a, &b) == 2) {
      inside = a < hi && b > lo;
      if (!inside) continue;
      CHECK(a >= lo && b <= hi);
      ++*count;
    } else if (inside && sscanf(line, "Rss: %zu kB", &kb) == 1) {
      *rss += kb * KIB;
    } else if (inside && sscanf(line, "AnonHugePages: %zu kB", &kb) == 1) {
      *huge += kb * KIB;
    }
  }
  fclose(f);
}

size_t resident(const void *base, size_t size) {
  size_t rss, huge, count;
  walk_smaps(base, size, &rss, &huge, &count);
  return rss;
}

size_t huge_pages(const void *base, size_t size) {
  size_t rss, huge, count;
  walk_smaps(base, size, &rss, &huge, &count);
  return huge;
}

size_t mappings(const void *base, size_t size) {
  size_t rss, huge, count;
  walk_smaps(base, size, &rss, &huge, &count);
  return count;
}

int accessible(const void *p) {
  static int pipe_fd[2] = {-1, -1};
  if (pipe_fd[0] < 0) CHECK(pipe(pipe_fd) == 0);
  ssize_t n = write(pipe_fd[1], p, 1); /* the kernel reads the byte */
  if (n < 0) {
    CHECK_EQ(errno, EFAULT);
    return 0;
  }
  n = read(pipe_fd[0], (void *)(uintptr_t)p, 1); /* and writes it back */
  if (n < 0) {
    CHECK_EQ(errno, EFAULT);
    char c;
    CHECK(read(pipe_fd[0], &c, 1) == 1);
    return 0;
  }
  return 1;
}

int all_bytes(const void *p, size_t n, unsigned char value) {
  const unsigned char *b = p;
  for (size_t i = 0; i < n; i++)
    if (b[i] != value) return 0;
  return 1;
}

kvcached_stats_t stats_of(kvcached_ctx_t ctx) {
  kvcached_stats_t s = {.struct_size = sizeof(s)};
  CHECK_OK(kvcached_stats(ctx, &s));
  return s;
}

void check_region(kvcached_region_t r) {
  kvcached_stats_t s = {.struct_size = sizeof(s)};
  CHECK_OK(kvcached_region_stats(r, &s));
  CHECK_EQ(resident(kvcached_region_base(r), kvcached_region_size(r)), s.mapped);
  size_t size = kvcached_region_size(r), ensured_bytes = 0;
  char *base = kvcached_region_base(r);
  for (size_t off = 0, run; off < size; off += run) {
    int ensured;
    CHECK_OK(kvcached_mapped_run(r, off, size - off, &run, &ensured));
    CHECK(run > 0);
    if (ensured) {
      CHECK(accessible(base + off) && accessible(base + off + run - 1));
      ensured_bytes += run;
    }
  }
  CHECK_EQ(ensured_bytes, s.mapped - s.idle);
}

kvcached_ctx_t open_alone(size_t page, uint64_t limit) {
  kvcached_options_t o;
  kvcached_options_init(&o);
  o.page_size = page;
  o.limit = limit;
  o.ledger_path = "";
  kvcached_ctx_t ctx;
  CHECK_OK(kvcached_open(&o, &ctx));
  return ctx;
}

kvcached_ctx_t open_in(const char *ledger, const char *group, uint64_t limit) {
  kvcached_options_t o;
  kvcached_options_init(&o);
  o.limit = limit;
  o.ledger_path = ledger;
  o.group = group;
  o.name = "a test";
  kvcached_ctx_t ctx;
  CHECK_OK(kvcached_open(&o, &ctx));
  return ctx;
}

static char scratch_dir[256];
static pid_t scratch_owner;

static void remove_scratch(void) {
  if (getpid() != scratch_owner) return;
  DIR *d = opendir(scratch_dir);
  if (!d) return;
  for (struct dirent *e; (e = readdir(d));) {
    char path[600];
    snprintf(path, sizeof(path), "%s/%s", scratch_dir, e->d_name);
    if (unlink(path) != 0) rmdir(path);
  }
  closedir(d);
  rmdir(scratch_dir);
}

const char *scratch(const char *name) {
  static char paths[64][320];
  static int used;
  if (!scratch_dir[0]) {
    const char *tmp = getenv("TMPDIR");
    snprintf(scratch_dir, sizeof(scratch_dir), "%s/kvcached-test-XXXXXX", tmp ? tmp : "/tmp");
    CHECK(mkdtemp(scratch_dir) != NULL);
    scratch_owner = getpid();
    atexit(remove_scratch);
  }
  CHECK(used < 64);
  snprintf(paths[used], sizeof(paths[used]), "%s/%s", scratch_dir, name);
  return paths[used++];
}

size_t live_slots(const char *ledger) {
  kvcached_ledger_t l;
  size_t n;
  CHECK_OK(kvcached_ledger_open(ledger, &l));
  CHECK_OK(kvcached_ledger_slots(l, NULL, 0, &n));
  kvcached_ledger_close(l);
  return n;
}

uint32_t next_random(uint32_t *state) { /* xorshift32, Marsaglia 2003 */
  uint32_t x = *state;
  x ^= x << 13;
  x ^= x >> 17;
  x ^= x << 5;
  return *state = x;
}

peer peer_start(const char *ledger, const char *group, uint64_t limit, int slot) {
  char exe[512], limit_text[32], slot_text[16];
  ssize_t n = readlink("/proc/self/exe", exe, sizeof(exe) - 1);
  CHECK(n > 0);
  exe[n] = 0;
  char *slash = strrchr(exe, '/');
  CHECK(slash != NULL);
  snprintf(slash, sizeof(exe) - (size_t)(slash - exe), "/peer");
  snprintf(limit_text, sizeof(limit_text), "%" PRIu64, limit);
  snprintf(slot_text, sizeof(slot_text), "%d", slot);

  int in[2], out[2];
  CHECK(pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0);
  pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    dup2(in[0], 0);
    dup2(out[1], 1);
    execl(exe, exe, ledger, group, limit_text, slot_text, (char *)NULL);
    _exit(127);
  }
  close(in[0]);
  close(out[1]);
  return (peer){pid, in[1], out[0]};
}

void peer_send(peer p, const char *line) { CHECK(dprintf(p.in, "%s\n", line) > 0); }

void peer_reply(peer p, char *line, size_t size) {
  size_t i = 0;
  for (char c;;) {
    ssize_t n = read(p.out, &c, 1);
    if (n < 0 && errno == EINTR) continue;
    CHECK(n == 1); /* the peer ended */
    if (c == '\n') break;
    if (i + 1 < size) line[i++] = c;
  }
  line[i] = 0;
}

void peer_expect(peer p, const char *send, const char *reply) {
  char line[600];
  peer_send(p, send);
  peer_reply(p, line, sizeof(line));
  if (strcmp(line, reply) != 0) {
    fprintf(stderr, "peer %ld: \"%s\" answered \"%s\", not \"%s\"\n", (long)p.pid, send, line, reply);
    exit(1);
  }
}

static int peer_end(peer *p) {
  int status;
  close(p->in);
  CHECK(waitpid(p->pid, &status, 0) == p->pid);
  close(p->out);
  return status;
}

void peer_kill(peer *p) {
  kill(p->pid, SIGKILL);
  (void)peer_end(p);
}

void peer_stop(peer *p) {
  int status = peer_end(p);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
