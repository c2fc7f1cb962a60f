/* The backend under test, content, scratch files and peers, for all tests. */
#include "support.h"

#include "context.h"
#include "fault.h"
#include "runner.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ---- the backend under test ---- */

int on_host(void) { return strcmp(test_backend_name(), "cuda") != 0; }

/* Memory of the device in use when this test opened its first context; not known once it has company. */
static uint64_t used_before;
static int contexts_opened, has_company;

int support_is_one_context(void) { return contexts_opened == 1; }

int support_used_before(uint64_t *bytes) {
  *bytes = used_before;
  return contexts_opened == 1 && !has_company;
}

void support_begin(void) { contexts_opened = has_company = 0; }

void support_end(void) {
  fault_held h = fault_now();
  CHECK_EQ(h.devices, 0); /* a context left open */
  CHECK_EQ(h.spaces, 0);
  CHECK_EQ(h.mapped, 0);
  CHECK_EQ(h.host_bytes, 0);
  if (!on_host()) CHECK_EQ(h.handles, 0); /* on the host a handle is a token that ends with its mapping */
}

/* A device that stays open, past the library's back: a GPU's own context then lives as long as the process,
   and is not made anew with each context of a test. */
static kvc_device *keeper;
static pid_t keeper_owner;

static void close_keeper(void) {
  if (getpid() == keeper_owner) kvc_backend_cuda.close(keeper);
}

size_t test_page(void) {
  if (strcmp(test_backend_name(), "host") == 0) return 4 * KIB;
  if (strcmp(test_backend_name(), "host-2m") == 0) return 2 * MIB;
  if (!keeper) {
    CHECK_OK(kvc_backend_cuda.open(&(kvc_device_options){.ordinal = 0}, &keeper));
    keeper_owner = getpid();
    atexit(close_keeper);
  }
  return keeper->granularity; /* the smallest there can be */
}

size_t test_large_page(void) { return 4 * test_page(); }

void test_options(kvcached_options_t *o) {
  kvcached_options_init(o);
  o->backend = on_host() ? KVCACHED_BACKEND_HOST : KVCACHED_BACKEND_CUDA;
  o->page_size = test_page();
  o->large_page = test_large_page();
  o->ledger_path = "";
  o->name = "a test";
}

kvcached_ctx_t open_with(const kvcached_options_t *o) {
  kvcached_ctx_t ctx;
  CHECK_OK(kvcached_open(o, &ctx));
  if (contexts_opened++ == 0 && !on_host()) {
    uint64_t free_bytes, total;
    CHECK_OK(kvcached_device_memory(ctx, &free_bytes, &total));
    used_before = total - free_bytes;
  }
  return ctx;
}

kvcached_ctx_t open_alone(size_t page, uint64_t limit) {
  kvcached_options_t o;
  test_options(&o);
  if (page) {
    o.page_size = page;
    o.large_page = 4 * page;
  }
  o.limit = limit;
  return open_with(&o);
}

kvcached_ctx_t open_in(const char *ledger, const char *group, uint64_t limit) {
  kvcached_options_t o;
  test_options(&o);
  o.limit = limit;
  o.ledger_path = ledger;
  o.group = group;
  return open_with(&o);
}

kvcached_region_t reserve(kvcached_ctx_t ctx, int kind, size_t size) {
  kvcached_region_t r;
  CHECK_OK(kvcached_reserve(ctx, kind, size, &r));
  return r;
}

/* ---- content ---- */

int all_bytes(const void *p, size_t n, unsigned char value) {
  const unsigned char *b = p;
  return n == 0 || (b[0] == value && memcmp(b, b + 1, n - 1) == 0);
}

static void must_be_ensured(kvcached_region_t r, size_t off, size_t len) {
  size_t run;
  int ensured;
  CHECK_OK(kvcached_mapped_run(r, off, len, &run, &ensured));
  CHECK(len == 0 || (ensured && run == len));
}

void put(kvcached_region_t r, size_t off, int byte, size_t len) {
  must_be_ensured(r, off, len);
  if (on_host()) {
    memset((char *)kvcached_region_base(r) + off, byte, len);
    return;
  }
  size_t step = len < MIB ? len : MIB;
  char *buf = malloc(step + 1);
  CHECK(buf != NULL);
  memset(buf, byte, step);
  for (size_t i = 0; i < len; i += step)
    CHECK_OK(kvcached_write(r, off + i, buf, len - i < step ? len - i : step));
  free(buf);
}

static int differs(const unsigned char *p, size_t n, int byte, size_t off) {
  if (all_bytes(p, n, (unsigned char)byte)) return 0;
  size_t i = 0;
  while (p[i] == (unsigned char)byte) i++;
  fprintf(stderr, "byte %zu of the region is 0x%02x, not 0x%02x\n", off + i, p[i], (unsigned)byte & 0xff);
  return 1;
}

int holds(kvcached_region_t r, size_t off, int byte, size_t len) {
  must_be_ensured(r, off, len);
  if (on_host()) return !differs((unsigned char *)kvcached_region_base(r) + off, len, byte, off);
  size_t step = len < MIB ? len : MIB;
  unsigned char *buf = malloc(step + 1);
  CHECK(buf != NULL);
  int good = 1;
  for (size_t i = 0; i < len && good; i += step) {
    size_t n = len - i < step ? len - i : step;
    CHECK_OK(kvcached_read(r, off + i, buf, n));
    good = !differs(buf, n, byte, off + i);
  }
  free(buf);
  return good;
}

enum { END = 64 };

static size_t bytes_of_page(kvcached_region_t r, size_t page_no) {
  size_t unit = kvcached_region_page_size(r), left = kvcached_region_size(r) - page_no * unit;
  return left < unit ? left : unit;
}

void put_ends(kvcached_region_t r, size_t page_no, int byte) {
  size_t off = page_no * kvcached_region_page_size(r), n = bytes_of_page(r, page_no);
  put(r, off, byte, END);
  put(r, off + n - END, byte, END);
}

int holds_ends(kvcached_region_t r, size_t page_no, int byte) {
  size_t off = page_no * kvcached_region_page_size(r), n = bytes_of_page(r, page_no);
  return holds(r, off, byte, END) && holds(r, off + n - END, byte, END);
}

/* ---- the ledger ---- */

size_t live_slots(const char *ledger) {
  kvcached_ledger_t l;
  size_t n;
  CHECK_OK(kvcached_ledger_open(ledger, &l));
  CHECK_OK(kvcached_ledger_slots(l, NULL, 0, &n));
  kvcached_ledger_close(l);
  return n;
}

kvcached_slot_t slot_in(const char *path, int slot) {
  kvcached_slot_t all[256];
  kvcached_ledger_t l;
  size_t n;
  all[0].struct_size = sizeof(all[0]);
  CHECK_OK(kvcached_ledger_open(path, &l));
  CHECK_OK(kvcached_ledger_slots(l, all, 256, &n));
  kvcached_ledger_close(l);
  for (size_t i = 0; i < n; i++)
    if (all[i].slot == slot) return all[i];
  check_failed(__FILE__, __LINE__, "slot %d is not live", slot);
}

int slot_of_ctx(kvcached_ctx_t ctx) { return ctx->slot; }

/* ---- this and that ---- */

static char scratch_dir[256];
static pid_t scratch_owner;

void support_clean_up(void) {
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
  static char paths[256][320];
  static int used;
  if (!scratch_dir[0]) {
    const char *tmp = getenv("TMPDIR");
    snprintf(scratch_dir, sizeof(scratch_dir), "%s/kvcached-test-XXXXXX", tmp ? tmp : "/tmp");
    CHECK(mkdtemp(scratch_dir) != NULL);
    scratch_owner = getpid();
    atexit(support_clean_up);
  }
  CHECK(used < 256);
  snprintf(paths[used], sizeof(paths[used]), "%s/%s", scratch_dir, name);
  return paths[used++];
}

void *share_file(const char *path, size_t size) {
  int fd = open(path, O_RDWR | O_CLOEXEC);
  CHECK(fd >= 0);
  void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  CHECK(p != MAP_FAILED);
  close(fd);
  return p;
}

uint32_t next_random(uint32_t *state) { /* xorshift32, Marsaglia 2003 */
  uint32_t x = *state;
  x ^= x << 13;
  x ^= x >> 17;
  x ^= x << 5;
  return *state = x;
}

static unsigned long from_environment(const char *name, unsigned long otherwise) {
  const char *text = getenv(name);
  return text && *text ? strtoul(text, NULL, 10) : otherwise;
}

unsigned rounds(unsigned n) { return n * (unsigned)from_environment("KVCACHED_TEST_ROUNDS", 1); }

uint32_t first_seed(uint32_t seed) { return (uint32_t)from_environment("KVCACHED_TEST_SEED", seed); }

int64_t now_ms(void) { return kvc_now_ns() / 1000000; }

void sleep_ms(unsigned ms) {
  struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
  nanosleep(&t, NULL);
}

/* ---- peers ---- */

peer peer_start_with(const char *ledger, const char *group, uint64_t limit, int slot, const char *more) {
  char limit_text[32], slot_text[16], backend[64];
  snprintf(limit_text, sizeof(limit_text), "%" PRIu64, limit);
  snprintf(slot_text, sizeof(slot_text), "%d", slot);
  snprintf(backend, sizeof(backend), "%s", test_backend_name());
  has_company = 1;

  int in[2], out[2];
  CHECK(pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0);
  pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    dup2(in[0], 0);
    dup2(out[1], 1);
    setenv("KVCACHED_BACKEND", backend, 1);
    execl("/proc/self/exe", "vmm_tests", "--peer", ledger, group, limit_text, slot_text, more, (char *)NULL);
    _exit(127);
  }
  close(in[0]);
  close(out[1]);
  return (peer){pid, in[1], out[0]};
}

peer peer_start(const char *ledger, const char *group, uint64_t limit, int slot) {
  return peer_start_with(ledger, group, limit, slot, "");
}

void peer_expect_open(peer p) {
  char line[600];
  peer_reply(p, line, sizeof(line));
  if (strcmp(line, "open") != 0) check_failed(__FILE__, __LINE__, "a peer could not open: %s", line);
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
  if (strcmp(line, reply) != 0)
    check_failed(__FILE__, __LINE__, "peer %ld: \"%s\" answered \"%s\", not \"%s\"", (long)p.pid, send, line,
                 reply);
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
