/* What the library's host process notices of it: the log, threads, descriptors, signal handlers. */
#include "support.h"

#include <dirent.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/stat.h>

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
