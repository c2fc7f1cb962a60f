/* Users without a context, the file's map, children, namespaces. */
#include "ledger_kit.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

kvcached_ledger_t open_ledger(const char *path) {
  kvcached_ledger_t l;
  CHECK_OK(kvcached_ledger_open(path, &l));
  return l;
}

user user_take(const char *path, const char *group) {
  user u = {.ledger = open_ledger(path)};
  CHECK_OK(kvc_ledger_take(u.ledger, group, "a test", &u.slot));
  return u;
}

void user_end(user *u) {
  kvcached_ledger_close(u->ledger);
  u->ledger = NULL;
}

int user_claim(user u, uint64_t bytes, uint64_t limit, uint32_t wait_ms) {
  kvc_shortage shortage;
  int64_t start = now_ms();
  int err = kvc_ledger_claim(u.ledger, u.slot, KVC_CLAIM_PAGES, bytes, limit, wait_ms, &shortage);
  CHECK_LE(now_ms() - start, wait_ms + 500);
  return err;
}

void user_unclaim(user u, uint64_t bytes) { kvc_ledger_unclaim(u.ledger, u.slot, KVC_CLAIM_PAGES, bytes); }

kvc_ledger_map *map_ledger(const char *path) { return share_file(path, sizeof(kvc_ledger_map)); }

void unmap_ledger(kvc_ledger_map *map) { CHECK(munmap(map, sizeof(*map)) == 0); }

void announce(kvc_ledger_map *map, int slot, int account, uint64_t age, int state, uint64_t target) {
  atomic_store(&map->slot[slot].ask[account].target, target);
  atomic_store(&map->slot[slot].ask[account].word, age << 2 | (unsigned)state);
}

pid_t child_start(void (*body)(void *), void *arg) {
  fflush(stdout);
  fflush(stderr);
  pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    body(arg);
    fflush(stdout);
    _exit(0);
  }
  return pid;
}

void child_join(pid_t pid) {
  int status;
  pid_t got;
  do got = waitpid(pid, &status, 0);
  while (got < 0 && errno == EINTR);
  CHECK_EQ(got, pid);
  CHECK(WIFEXITED(status));
  CHECK_EQ(WEXITSTATUS(status), 0);
}

void child_kill(pid_t pid) {
  int status;
  CHECK(kill(pid, SIGKILL) == 0);
  CHECK_EQ(waitpid(pid, &status, 0), pid);
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

static int write_text(const char *path, const char *text) {
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  ssize_t n = write(fd, text, strlen(text));
  close(fd);
  return n == (ssize_t)strlen(text);
}

int enter_namespaces(int flags) {
  if (unshare(flags) == 0) return 1;
  char users[64], groups[64]; /* files need both mapped */
  snprintf(users, sizeof(users), "%lu %lu 1", (unsigned long)geteuid(), (unsigned long)geteuid());
  snprintf(groups, sizeof(groups), "%lu %lu 1", (unsigned long)getegid(), (unsigned long)getegid());
  return unshare(CLONE_NEWUSER | flags) == 0 && write_text("/proc/self/setgroups", "deny") &&
         write_text("/proc/self/uid_map", users) && write_text("/proc/self/gid_map", groups);
}

void *shared_memory(size_t size) {
  void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(p != MAP_FAILED);
  return p;
}

kvcached_limit_t limit_set(kvcached_ledger_t ledger, const char *group, uint64_t bytes, uint32_t revision) {
  kvcached_limit_t out = {.struct_size = sizeof(out)};
  CHECK_OK(kvcached_ledger_set_limit(ledger, group, bytes, revision, &out));
  return out;
}

kvcached_limit_t limit_get(kvcached_ledger_t ledger, const char *group) {
  kvcached_limit_t out = {.struct_size = sizeof(out)};
  CHECK_OK(kvcached_ledger_get_limit(ledger, group, &out));
  return out;
}

void check_limit(kvcached_limit_t got, int result, uint32_t revision, uint64_t limit) {
  CHECK_EQ(got.result, result);
  CHECK_EQ(got.revision, revision);
  CHECK_EQ(got.limit, limit);
}
