/* The library's face: names, versions, the six functions of the simplest use, options that grow, and what is
   refused. */
#include "context.h"
#include "support.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <unistd.h>

TEST_HOST(api, names) {
  CHECK_EQ(kvcached_abi_version(), KVCACHED_ABI_VERSION);
  CHECK_TEXT(kvcached_version(), KVCACHED_VERSION);
#define XX(name, value, text)                                        \
  CHECK_TEXT(kvcached_strerror(KVCACHED_##name), text);              \
  CHECK_TEXT(kvcached_err_name(KVCACHED_##name), "KVCACHED_" #name); \
  CHECK_EQ(KVCACHED_##name, value);
  KVCACHED_ERROR_MAP(XX)
#undef XX
  CHECK_TEXT(kvcached_err_name(-99), "KVCACHED_E_UNKNOWN");
  CHECK_TEXT(kvcached_err_name(1), "KVCACHED_E_UNKNOWN");
  CHECK(*kvcached_strerror(-99));
  CHECK_TEXT(kvcached_last_error(), ""); /* a fresh process: the suite's first test */
}

static void *fail_once(void *arg) {
  (void)arg;
  CHECK_TEXT(kvcached_last_error(), ""); /* each thread has its own */
  CHECK_IS(kvcached_ensure(NULL, 0, 1), KVCACHED_E_INVAL);
  CHECK(*kvcached_last_error());
  return NULL;
}

TEST_HOST(api, last_error_is_the_threads_own) {
  kvcached_ctx_t ctx = NULL;
  CHECK_IS(kvcached_open(NULL, &ctx), KVCACHED_E_INVAL);
  char before[400];
  snprintf(before, sizeof(before), "%s", kvcached_last_error());
  pthread_t t;
  CHECK(pthread_create(&t, NULL, fail_once, NULL) == 0);
  pthread_join(t, NULL);
  CHECK_TEXT(kvcached_last_error(), before);
}

/* ---- the six ---- */

/* A default ledger that another version of the library left behind, and that nobody uses. */
static void remove_left_over(const char *device) {
  char path[KVCACHED_PATH_MAX];
  kvcached_ledger_t l;
  CHECK_OK(kvcached_ledger_default_path(device, path, sizeof(path)));
  int err = kvcached_ledger_open(path, &l);
  kvcached_ledger_close(err ? NULL : l);
  int fd = err ? open(path, O_RDWR | O_CLOEXEC) : -1;
  if (fd < 0) return;
  struct flock all = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
  if (fcntl(fd, F_OFD_GETLK, &all) == 0 && all.l_type == F_UNLCK) (void)unlink(path);
  close(fd);
}

TEST(api, six_functions) {
  kvcached_ctx_t first = open_alone(0, UINT64_MAX);
  remove_left_over(first->device->id);
  kvcached_shutdown(first);
  kvcached_ctx_t ctx = kvcached_init(on_host() ? KVCACHED_DEVICE_HOST : 0);
  if (!ctx) check_failed(__FILE__, __LINE__, "kvcached_init failed");
  const size_t page = kvcached_page_size(ctx);
  size_t available = kvcached_available(ctx);
  uint64_t free_bytes, total;
  CHECK_OK(kvcached_device_memory(ctx, &free_bytes, &total));
  CHECK(free_bytes > 0);
  CHECK_LE(free_bytes, total);
  CHECK(available > 64 * page);
  CHECK_LE(available, total);

  void *p = kvcached_alloc(ctx, 3 * page);
  CHECK(p != NULL);
  if (on_host()) CHECK(all_bytes(p, 3 * page, 0));
  kvcached_set_limit(ctx, 10 * page);
  CHECK_EQ(stats_of(ctx).limit, 10 * page);
  CHECK_EQ(kvcached_available(ctx), 7 * page);
  CHECK(kvcached_alloc(ctx, 8 * page) == NULL);
  CHECK(*kvcached_last_error());
  void *q = kvcached_alloc(ctx, 7 * page);
  CHECK(q != NULL);
  CHECK_EQ(kvcached_available(ctx), 0);
  kvcached_set_limit(ctx, page); /* what is in use stays in use */
  CHECK_EQ(kvcached_available(ctx), 0);
  CHECK_EQ(stats_of(ctx).mapped, 10 * page);
  if (on_host()) memset(q, 'q', 7 * page);
  kvcached_free(ctx, q);
  kvcached_set_limit(ctx, SIZE_MAX);
  CHECK_EQ(stats_of(ctx).limit, UINT64_MAX);
  CHECK(kvcached_available(ctx) > 64 * page);
  q = kvcached_alloc(ctx, 20 * page);
  CHECK(q != NULL);
  kvcached_free(ctx, NULL);
  kvcached_shutdown(ctx); /* frees what is left */
  if (on_host()) CHECK(!accessible(q));
  kvcached_shutdown(NULL);
}

TEST(api, nothing_of_null) {
  CHECK_EQ(kvcached_available(NULL), 0);
  CHECK(kvcached_alloc(NULL, 1) == NULL);
  kvcached_free(NULL, NULL);
  kvcached_set_limit(NULL, 0);
  CHECK_EQ(kvcached_page_size(NULL), 0);
  CHECK(kvcached_region_base(NULL) == NULL);
  CHECK_EQ(kvcached_region_size(NULL) + kvcached_region_page_size(NULL), 0);
  kvcached_unreserve(NULL);
  kvcached_ledger_close(NULL);
  CHECK(kvcached_ledger_path(NULL) == NULL);
  size_t n;
  int ensured;
  kvcached_stats_t s = {.struct_size = sizeof(s)};
  uint64_t a, b;
  CHECK_IS(kvcached_enter(NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_leave(NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_set_queued(NULL, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ensure(NULL, 0, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_prepare(NULL, 0, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_release(NULL, 0, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_trim(NULL, 0, &n), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_mapped_run(NULL, 0, 1, &n, &ensured), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_read(NULL, 0, &n, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_write(NULL, 0, &n, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_clear(NULL, 0, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_set_reload(NULL, NULL, NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_prepare_sleep(NULL, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_sleep(NULL, 1, 0, NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_wake(NULL, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_trim_host(NULL, 0, NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_stats(NULL, &s), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_region_stats(NULL, &s), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_device_memory(NULL, &a, &b), KVCACHED_E_INVAL);
}

/* ---- limits of a context ---- */

TEST(api, available_is_the_least_of_all) {
  const size_t page = test_page();
  kvcached_options_t o;
  test_options(&o);
  const char *path = scratch("available");
  o.ledger_path = path;
  o.group = "g";
  o.limit = 50 * page;
  kvcached_ctx_t a = open_with(&o);
  kvcached_ctx_t b = open_with(&o);
  kvcached_region_t r = reserve(a, KVCACHED_KV, 60 * page);
  CHECK_OK(kvcached_ensure(r, 0, 20 * page));
  CHECK_EQ(kvcached_available(a), 30 * page);
  CHECK_EQ(kvcached_available(b), 30 * page);
  kvcached_ledger_t l;
  CHECK_OK(kvcached_ledger_open(path, &l));
  CHECK_OK(kvcached_ledger_set_limit(l, NULL, 26 * page, 0, NULL)); /* the card */
  CHECK_EQ(kvcached_available(b), 6 * page);
  CHECK_OK(kvcached_ledger_set_limit(l, "g", 24 * page, 0, NULL));
  CHECK_EQ(kvcached_available(b), 4 * page);
  CHECK_EQ(stats_of(b).card_limit, 26 * page);
  CHECK_EQ(stats_of(b).card_charge, 20 * page);
  CHECK_EQ(stats_of(b).limit, 24 * page);
  kvcached_ledger_close(l);
  kvcached_shutdown(b);
  kvcached_shutdown(a);

  test_options(&o); /* the device's own memory, less the headroom */
  o.headroom = UINT64_MAX / 2;
  a = open_with(&o);
  CHECK_EQ(kvcached_available(a), 0);
  kvcached_shutdown(a);
}

TEST(api, set_limit_drains_what_is_idle) {
  const size_t page = test_page();
  for (int with_ledger = 0; with_ledger < 2; with_ledger++) {
    kvcached_options_t o;
    test_options(&o);
    if (with_ledger) o.ledger_path = scratch("drain");
    kvcached_ctx_t ctx = open_with(&o);
    kvcached_region_t r = reserve(ctx, KVCACHED_KV, 32 * page), gone = reserve(ctx, KVCACHED_KV, 8 * page);
    CHECK_OK(kvcached_ensure(r, 0, 20 * page));
    CHECK_OK(kvcached_ensure(gone, 0, 8 * page));
    put(r, 0, 'd', 20 * page);
    kvcached_unreserve(gone); /* pooled, where there is a pool */
    CHECK_OK(kvcached_release(r, 12 * page, 8 * page));
    kvcached_set_limit(ctx, 16 * page);
    kvcached_stats_t s = stats_of(ctx);
    CHECK_LE(s.mapped + s.pooled, 16 * page);
    CHECK_LE(12 * page, s.mapped);
    CHECK_EQ(s.limit, 16 * page);
    check_context(ctx);
    kvcached_set_limit(ctx, 0); /* all that is idle; what is in use stays */
    s = stats_of(ctx);
    CHECK_EQ(s.mapped, 12 * page);
    CHECK_EQ(s.idle + s.pooled, 0);
    CHECK(holds(r, 0, 'd', 12 * page));
    CHECK_IS(kvcached_ensure(r, 12 * page, 1), KVCACHED_E_LIMIT);
    check_context(ctx);
    CHECK_OK(kvcached_enter(ctx)); /* from inside the gate as well */
    kvcached_set_limit(ctx, SIZE_MAX);
    CHECK_OK(kvcached_ensure(r, 12 * page, 8 * page));
    CHECK_OK(kvcached_release(r, 12 * page, 8 * page));
    kvcached_set_limit(ctx, 13 * page);
    CHECK_LE(stats_of(ctx).mapped, 13 * page);
    CHECK_OK(kvcached_leave(ctx));
    check_context(ctx);
    kvcached_shutdown(ctx);
  }
}

/* ---- options ---- */

TEST(api, bad_options) {
  kvcached_options_t o;
  kvcached_ctx_t ctx = (kvcached_ctx_t)1;
  test_options(&o);
  CHECK_IS(kvcached_open(NULL, &ctx), KVCACHED_E_INVAL);
  CHECK(ctx == NULL);
  CHECK_IS(kvcached_open(&o, NULL), KVCACHED_E_INVAL);
#define REFUSED(field, value, text)                      \
  do {                                                   \
    test_options(&o);                                    \
    o.field = value;                                     \
    ctx = (kvcached_ctx_t)1;                             \
    CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_INVAL); \
    CHECK(ctx == NULL);                                  \
    CHECK_DETAIL(text);                                  \
  } while (0)
  REFUSED(page_size, test_page() + 1, "page_size");
  REFUSED(page_size, 3, "page_size");
  REFUSED(large_page, test_page() + 512, "large_page");
  REFUSED(slot, 3, "slot"); /* without a ledger */
  REFUSED(slot, -2, "slot");
  REFUSED(struct_size, 0, "struct_size");
  REFUSED(lookahead, 17, "lookahead");
  REFUSED(flags, 0x80, "flags");
  REFUSED(group, "", "group");
  REFUSED(group, "a group whose name is much too long", "group");
#undef REFUSED
  test_options(&o);
  o.backend = 7;
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_UNSUPPORTED);
  test_options(&o);
  o.limit = 10;
  o.fixed = 11;
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_LIMIT);
  CHECK(ctx == NULL);
}

TEST_CUDA(api, no_such_device) {
  kvcached_options_t o;
  kvcached_ctx_t ctx;
  test_options(&o);
  o.device = 4711;
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_UNSUPPORTED);
  CHECK_DETAIL("4711");
  test_options(&o);
  o.pci_bus_id = "ffff:ff:1f.0";
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_UNSUPPORTED);
  CHECK_DETAIL("ffff:ff:1f.0");
  CHECK(kvcached_init(4711) == NULL);
  CHECK(*kvcached_last_error());
}

/* A structure that ended earlier: what lies behind its end is not looked at. */
TEST(api, older_callers) {
  const size_t page = test_page();
  kvcached_options_t o;
  kvcached_ctx_t ctx;
  test_options(&o);
  memset((char *)&o + offsetof(kvcached_options_t, device), 0xee,
         sizeof(o) - offsetof(kvcached_options_t, device));
  o.struct_size = offsetof(kvcached_options_t, device); /* that of ABI 1 */
  o.limit = 10 * page;
  CHECK_OK(kvcached_open(&o, &ctx));
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 20 * page);
  CHECK_IS(kvcached_ensure(r, 0, 11 * page), KVCACHED_E_LIMIT);
  CHECK_OK(kvcached_ensure(r, 0, 10 * page));

  struct {
    kvcached_stats_t s;
    unsigned char behind[64];
  } stats;
  memset(&stats, 0xee, sizeof(stats));
  size_t abi_1 = offsetof(kvcached_stats_t, kind_mapped);
  stats.s.struct_size = abi_1;
  CHECK_OK(kvcached_stats(ctx, &stats.s));
  CHECK_EQ(stats.s.mapped, 10 * page);
  CHECK(all_bytes((char *)&stats + abi_1, sizeof(stats) - abi_1, 0xee));
  CHECK_EQ(stats.s.struct_size, abi_1);
  stats.s.struct_size = 0;
  CHECK_IS(kvcached_stats(ctx, &stats.s), KVCACHED_E_INVAL);
  kvcached_shutdown(ctx);

  test_options(&o); /* cut in the middle: the fields that are whole hold */
  o.limit = 1;
  o.page_size = 12345;
  o.struct_size = offsetof(kvcached_options_t, limit);
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_INVAL);
  CHECK_DETAIL("12345");
}

/* One that ends later: good while the unknown part is empty. */
TEST(api, newer_callers) {
  struct {
    kvcached_options_t known;
    uint64_t unknown;
  } longer;
  kvcached_ctx_t ctx;
  memset(&longer, 0, sizeof(longer));
  test_options(&longer.known);
  longer.known.struct_size = sizeof(longer);
  CHECK_OK(kvcached_open(&longer.known, &ctx));
  struct {
    kvcached_stats_t s;
    unsigned char behind[64];
  } stats;
  memset(&stats, 0xee, sizeof(stats));
  stats.s.struct_size = sizeof(stats);
  CHECK_OK(kvcached_stats(ctx, &stats.s));
  CHECK_LE(stats.s.struct_size, sizeof(stats));
  kvcached_shutdown(ctx);
  longer.unknown = 1;
  CHECK_IS(kvcached_open(&longer.known, &ctx), KVCACHED_E_INVAL);
}

TEST_HOST(api, default_options) {
  struct {
    kvcached_options_t o;
    unsigned char behind[32];
  } x;
  memset(&x, 0xee, sizeof(x));
  kvcached_options_init(&x.o);
  kvcached_options_init(NULL);
  CHECK_EQ(x.o.struct_size, sizeof(x.o));
  CHECK(all_bytes(x.behind, sizeof(x.behind), 0xee));
  CHECK_EQ(x.o.backend, KVCACHED_BACKEND_HOST);
  CHECK(x.o.page_size == 0 && x.o.large_page == 0 && x.o.limit == UINT64_MAX && x.o.slot == -1);
  CHECK(!x.o.name && !x.o.group && !x.o.ledger_path && !x.o.log && !x.o.pci_bus_id);
  CHECK(x.o.fixed == 0 && x.o.headroom == 0 && x.o.flags == 0 && x.o.device == 0);
  CHECK_EQ(x.o.pool_limit, 64 * MIB);
  CHECK_EQ(x.o.host_limit, UINT64_MAX);
  CHECK_EQ(x.o.room_wait_ms, 1000);
  CHECK_EQ(x.o.lookahead, KVCACHED_LOOKAHEAD_AUTO);
}

/* ---- ranges ---- */

TEST(api, bad_ranges) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  kvcached_region_t r = (kvcached_region_t)1;
  CHECK_IS(kvcached_reserve(ctx, KVCACHED_KV, 0, &r), KVCACHED_E_INVAL);
  CHECK(r == NULL);
  CHECK_IS(kvcached_reserve(NULL, KVCACHED_KV, 1, &r), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_reserve(ctx, KVCACHED_KV, page, NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_reserve(ctx, 3, page, &r), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_reserve(ctx, -1, page, &r), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_reserve(ctx, KVCACHED_KV, SIZE_MAX, &r), KVCACHED_E_NOMEM);
  CHECK_IS(kvcached_reserve(ctx, KVCACHED_KV, SIZE_MAX / 2, &r), KVCACHED_E_NOMEM);
  CHECK_IS(kvcached_reserve(ctx, KVCACHED_WEIGHTS, SIZE_MAX - page, &r), KVCACHED_E_NOMEM);
  CHECK(r == NULL);
  CHECK_EQ(stats_of(ctx).reserved, 0);
  r = reserve(ctx, KVCACHED_KV, 3 * page - 1);
  const size_t size = 3 * page;
  size_t run;
  int ensured;
  CHECK_IS(kvcached_ensure(r, 0, size + 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ensure(r, size + 1, 0), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ensure(r, 2, SIZE_MAX), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_prepare(r, 2, SIZE_MAX), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_release(r, page, 2 * page + 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_mapped_run(r, 0, size + 1, &run, &ensured), KVCACHED_E_INVAL);
  CHECK_OK(kvcached_ensure(r, size, 0));
  CHECK_OK(kvcached_prepare(r, size, 0));
  CHECK_OK(kvcached_release(r, 0, 0));
  CHECK_OK(kvcached_mapped_run(r, 5, 0, &run, &ensured));
  CHECK_EQ(run, 0);
  CHECK_IS(kvcached_prepare_sleep(ctx, 0), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_prepare_sleep(ctx, 8), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_sleep(ctx, 8, 0, NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_sleep(ctx, 0, 0, NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_wake(ctx, 0x100), KVCACHED_E_INVAL);
  CHECK_EQ(stats_of(ctx).mapped, 0);
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* ---- the host process ---- */

static atomic_int messages;

static void count_message(int level, const char *msg, void *user) {
  CHECK(level >= KVCACHED_LOG_ERROR && level <= KVCACHED_LOG_DEBUG && *msg && user == &messages);
  messages++;
}

TEST(api, log) {
  kvcached_options_t o;
  test_options(&o);
  o.log = count_message;
  o.log_user = &messages;
  kvcached_ctx_t ctx = open_with(&o);
  CHECK(messages > 0);
  int before = messages, no_allocation;
  kvcached_free(ctx, &no_allocation);
  CHECK(messages > before);
  kvcached_shutdown(ctx);
}

/* It returns nothing, so the log has to say when another limit is in force after. */
TEST(api, set_limit_says_when_it_failed) {
  const char *path = scratch("last-revision");
  kvcached_options_t o;
  kvcached_ledger_t l;
  test_options(&o);
  o.ledger_path = path;
  o.group = "g";
  o.log = count_message;
  o.log_user = &messages;
  kvcached_ctx_t ctx = open_with(&o);
  CHECK_OK(kvcached_ledger_open(path, &l));
  int before = messages;
  kvcached_set_limit(ctx, 1 * MIB);
  CHECK_EQ(messages, before);
  CHECK_OK(kvcached_ledger_set_limit(l, "g", 2 * MIB, UINT32_MAX, NULL));
  kvcached_set_limit(ctx, 3 * MIB);
  CHECK_EQ(messages, before + 1);
  CHECK_DETAIL("4294967295");
  CHECK_EQ(stats_of(ctx).limit, 2 * MIB);
  kvcached_ledger_close(l);
  kvcached_shutdown(ctx);
}

/* Threads of this process by the mask of signals they block: those that block all of them are not ours. */
static int threads(int *blocking) {
  DIR *d = opendir("/proc/self/task");
  CHECK(d != NULL);
  int n = 0;
  *blocking = 0;
  for (struct dirent *e; (e = readdir(d));) {
    char path[300], line[200];
    snprintf(path, sizeof(path), "/proc/self/task/%s/status", e->d_name);
    FILE *f = e->d_name[0] == '.' ? NULL : fopen(path, "re");
    if (!f) continue;
    n++;
    unsigned long long mask;
    while (fgets(line, sizeof(line), f))
      /* SIGKILL and SIGSTOP cannot be, and the C library keeps 32 and 33 to itself */
      if (sscanf(line, "SigBlk: %llx", &mask) == 1) *blocking += (mask | 0x180040100ull) == ~0ull;
    fclose(f);
  }
  closedir(d);
  return n;
}

static int open_files(int *inherited) {
  int n = 0;
  *inherited = 0;
  for (int fd = 0; fd < 256; fd++) {
    char path[64];
    struct stat info;
    snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
    FILE *f = fopen(path, "re");
    if (!f) continue;
    if (fstat(fd, &info) == 0) n++;
    char line[200];
    unsigned flags = 0;
    while (fgets(line, sizeof(line), f)) (void)sscanf(line, "flags: %o", &flags);
    fclose(f);
    *inherited += fd > 2 && !(flags & 02000000 /* O_CLOEXEC */);
  }
  return n;
}

static void (*handler_of(int sig))(int) {
  struct sigaction action;
  return sigaction(sig, NULL, &action) == 0 ? action.sa_handler : SIG_ERR;
}

/* Threads, descriptors, signal handlers and address space are what they were when all is over. */
TEST_HOST(api, leaves_the_process_as_it_was) {
  int blocking, inherited, inherited_before;
  kvcached_shutdown(open_in(scratch("first"), "g", UINT64_MAX)); /* what is made once a process is made now */
  int threads_before = threads(&blocking), files_before = open_files(&inherited_before);
  CHECK_EQ(blocking, 0);
  void (*handlers[32])(int);
  for (int sig = 1; sig < 32; sig++) handlers[sig] = handler_of(sig);
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = scratch("second");
  o.lookahead = KVCACHED_LOOKAHEAD_THREAD;
  kvcached_ctx_t ctx = open_with(&o);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 64 * test_page());
  CHECK_OK(kvcached_prepare(r, 0, 4 * test_page()));
  CHECK_OK(kvcached_prepare_sleep(ctx, KVCACHED_ALL_KINDS));
  int now = threads(&blocking);
  CHECK_EQ(blocking, now - threads_before);
  CHECK_LE(blocking, 2); /* the helper and the one that answers commands */
  CHECK(blocking > 0);
  CHECK(open_files(&inherited) > files_before);
  CHECK_EQ(inherited, inherited_before);
  for (int sig = 1; sig < 32; sig++) CHECK(handler_of(sig) == handlers[sig]);
  kvcached_shutdown(ctx);
  CHECK_EQ(threads(&blocking), threads_before);
  CHECK_EQ(open_files(&inherited), files_before);
}

/* A context with a ledger has a thread that answers commands, unless it was told not to; one without a ledger
   has none. */
TEST_HOST(api, no_thread_without_need) {
  int blocking;
  kvcached_options_t o;
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  (void)threads(&blocking);
  CHECK_EQ(blocking, 0);
  kvcached_shutdown(ctx);
  test_options(&o);
  o.ledger_path = scratch("quiet");
  o.flags = KVCACHED_NO_CONTROL;
  ctx = open_with(&o);
  (void)threads(&blocking);
  CHECK_EQ(blocking, 0);
  CHECK_EQ(slot_in(o.ledger_path, slot_of_ctx(ctx)).controlled, 0);
  kvcached_shutdown(ctx);
  kvcached_ledger_t l;
  CHECK_OK(kvcached_ledger_open(o.ledger_path, &l));
  (void)threads(&blocking);
  CHECK_EQ(blocking, 0);
  kvcached_ledger_close(l);
}
