/* The ledger's file: what is refused, and that nothing but a good file is ever used. */
#include "ledger_file.h"
#include "support.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static void check_refused(const char *path, const char *why) {
  kvcached_ledger_t l = (kvcached_ledger_t)1;
  CHECK_IS(kvcached_ledger_open(path, &l), KVCACHED_E_LEDGER);
  CHECK(l == NULL);
  CHECK_DETAIL(why);
  CHECK_DETAIL(path);
  kvcached_options_t o;
  kvcached_options_init(&o);
  o.ledger_path = path;
  kvcached_ctx_t ctx = (kvcached_ctx_t)1;
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_LEDGER);
  CHECK(ctx == NULL);
}

static const char *good_file(const char *name) {
  const char *path = scratch(name);
  kvcached_ledger_t l;
  CHECK_OK(kvcached_ledger_open(path, &l));
  CHECK(strcmp(kvcached_ledger_path(l), path) == 0);
  kvcached_ledger_close(l);
  return path;
}

static void write_file(const char *path, const void *data, size_t size, off_t off) {
  int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  CHECK(fd >= 0 && pwrite(fd, data, size, off) == (ssize_t)size);
  close(fd);
}

static void test_new_file(void) {
  mode_t mask = umask(0777);
  const char *path = good_file("new");
  umask(mask);
  struct stat st;
  CHECK(stat(path, &st) == 0);
  CHECK_EQ(st.st_mode & 07777, 0600);
  CHECK_EQ(st.st_size, sizeof(kvc_ledger_map));
  CHECK(st.st_blocks * 512 >= st.st_size); /* space is there, not promised */
  CHECK_EQ(live_slots(path), 0);
}

static void test_default_path(void) {
  char expected[64];
  snprintf(expected, sizeof(expected), "/dev/shm/kvcached-%lu-host", (unsigned long)geteuid());
  kvcached_ledger_t l;
  if (access("/dev/shm", W_OK) != 0) {
    SKIP("test_default_path", "no /dev/shm to write in");
    return;
  }
  CHECK_OK(kvcached_ledger_open(NULL, &l));
  CHECK(strcmp(kvcached_ledger_path(l), expected) == 0);
  kvcached_ledger_close(l);
}

static void test_not_plain(void) {
  const char *target = good_file("target"), *path = scratch("link");
  CHECK(symlink(target, path) == 0);
  check_refused(path, "symbolic link");
  path = scratch("dangling");
  CHECK(symlink(scratch("nothing-here"), path) == 0);
  check_refused(path, "symbolic link");
  path = scratch("fifo");
  CHECK(mkfifo(path, 0600) == 0);
  check_refused(path, "not a plain file");
  path = scratch("folder");
  CHECK(mkdir(path, 0700) == 0);
  check_refused(path, "opening");
  path = scratch("second-name");
  CHECK(link(target, path) == 0);
  check_refused(path, "hard links");
  check_refused("/nonexistent/folder/ledger", "No such file");
  kvcached_ledger_t l;
  CHECK_IS(kvcached_ledger_open("", &l), KVCACHED_E_INVAL);
}

static void test_permissions(void) {
  const char *path = good_file("open-to-others");
  CHECK(chmod(path, 0644) == 0);
  check_refused(path, "mode 0644");
  CHECK(chmod(path, 0620) == 0);
  check_refused(path, "mode 0620");
  if (geteuid() != 0) {
    SKIP("test_permissions (another owner)", "needs root");
    return;
  }
  CHECK(chmod(path, 0600) == 0 && chown(path, 12345, (gid_t)-1) == 0);
  check_refused(path, "belongs to uid 12345");
}

static void test_content(void) {
  const char *path = scratch("foreign");
  char text[8192];
  memset(text, 'x', sizeof(text));
  write_file(path, text, sizeof(text), 0);
  check_refused(path, "not a ledger");
  path = scratch("short");
  write_file(path, "short", 5, 0);
  check_refused(path, "5 bytes");

  path = good_file("truncated");
  CHECK(truncate(path, 5000) == 0);
  check_refused(path, "damaged");
  path = good_file("grown");
  CHECK(truncate(path, sizeof(kvc_ledger_map) + 1) == 0);
  check_refused(path, "damaged");
  path = good_file("magic");
  write_file(path, "y", 1, 0);
  check_refused(path, "not a ledger");
  path = good_file("version");
  uint32_t number = 99;
  write_file(path, &number, sizeof(number), offsetof(kvc_ledger_map, version));
  check_refused(path, "version 99");
  path = good_file("slots");
  write_file(path, &number, sizeof(number), offsetof(kvc_ledger_map, slots));
  check_refused(path, "damaged");
}

/* A creator that died half way leaves a file with no magic: it is finished by the next. */
static void test_unfinished(void) {
  const char *path = scratch("empty");
  write_file(path, "", 0, 0);
  CHECK_EQ(live_slots(path), 0);
  path = scratch("no-header");
  write_file(path, "", 0, 0);
  CHECK(truncate(path, sizeof(kvc_ledger_map)) == 0);
  CHECK_EQ(live_slots(path), 0);
  path = good_file("no-magic");
  uint64_t none = 0;
  write_file(path, &none, sizeof(none), 0);
  kvcached_ctx_t ctx = open_in(path, "g", 100);
  CHECK_EQ(live_slots(path), 1);
  kvcached_shutdown(ctx);
}

/* The signal for a file grown too large would end the process: it must not come. */
static void test_file_size_limit(void) {
  const char *path = scratch("ulimit");
  struct rlimit old, small;
  CHECK(getrlimit(RLIMIT_FSIZE, &old) == 0);
  small = old;
  small.rlim_cur = 4096;
  CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
  check_refused(path, "ulimit -f");
  CHECK(setrlimit(RLIMIT_FSIZE, &old) == 0);
  CHECK_EQ(live_slots(path), 0); /* nothing bad was left behind */
}

/* A full file system, for real: a tiny one in a mount namespace of a child. */
static void test_no_space(void) {
  const char *dir = scratch("tiny");
  CHECK(mkdir(dir, 0700) == 0);
  pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    if ((unshare(CLONE_NEWNS) != 0 && unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) ||
        mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 ||
        mount("tmpfs", dir, "tmpfs", 0, "size=16k,mode=0700") != 0)
      _exit(77);
    char path[600];
    struct stat st;
    snprintf(path, sizeof(path), "%s/ledger", dir);
    check_refused(path, "No space left");
    CHECK(stat(path, &st) == 0 && st.st_size == 0);
    CHECK(mount("tmpfs", dir, "tmpfs", MS_REMOUNT, "size=1m,mode=0700") == 0);
    CHECK_EQ(live_slots(path), 0); /* once there is room it works */
    _exit(0);
  }
  int status;
  CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status));
  if (WEXITSTATUS(status) == 77)
    SKIP("test_no_space", "no file systems can be mounted here");
  else
    CHECK_EQ(WEXITSTATUS(status), 0);
}

/* Descriptors are not for programs this one starts. */
static void test_close_on_exec(void) {
  const char *path = scratch("cloexec");
  int before[64], found = 0;
  for (int fd = 0; fd < 64; fd++) before[fd] = fcntl(fd, F_GETFD);
  kvcached_ctx_t ctx = open_in(path, "g", 100);
  for (int fd = 0; fd < 64; fd++) {
    int flags = fcntl(fd, F_GETFD);
    if (before[fd] >= 0 || flags < 0) continue;
    found++;
    CHECK(flags & FD_CLOEXEC);
  }
  CHECK_EQ(found, 1);
  kvcached_shutdown(ctx);
  for (int fd = 0; fd < 64; fd++) CHECK_EQ(fcntl(fd, F_GETFD), before[fd]); /* and none is lost */
}

/* A slot ends with its descriptor. Were the file mapped through that very one, the mapping would keep the
   slot alive wherever the address space outlives the process: while somebody reads its /proc/<pid>/smaps, for
   one. */
static void test_mapping_holds_no_lock(void) {
  const char *path = scratch("mapping");
  pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    int before[64];
    for (int fd = 0; fd < 64; fd++) before[fd] = fcntl(fd, F_GETFD);
    (void)open_in(path, "g", 100);
    CHECK_EQ(live_slots(path), 1);
    for (int fd = 0; fd < 64; fd++)
      if (before[fd] < 0) (void)close(fd);
    CHECK_EQ(live_slots(path), 0);
    _exit(0);
  }
  int status;
  CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status));
  CHECK_EQ(WEXITSTATUS(status), 0);
}

/* A child opens the ledger by its path: once that names another file, or none, it would not find its lease. */
static void test_lease_needs_the_file_at_its_path(void) {
  const char *path = scratch("deleted"), *aside = scratch("aside");
  kvcached_ledger_t l;
  CHECK_OK(kvcached_ledger_open(path, &l));
  int slot;
  CHECK_OK(kvcached_ledger_lease(l, "g", "first", 10, 0, 100, &slot));
  CHECK(rename(path, aside) == 0);
  int refused;
  CHECK_IS(kvcached_ledger_lease(l, "g", "second", 10, 0, 100, &refused), KVCACHED_E_LEDGER);
  CHECK_EQ(refused, -1);
  CHECK_DETAIL("deleted or replaced");
  CHECK_EQ(live_slots(path), 0); /* makes another file there */
  CHECK_IS(kvcached_ledger_lease(l, "g", "third", 10, 0, 100, &refused), KVCACHED_E_LEDGER);
  CHECK(rename(aside, path) == 0);
  CHECK_OK(kvcached_ledger_lease(l, "g", "fourth", 10, 0, 100, &refused));
  CHECK_OK(kvcached_ledger_unlease(l, refused));
  CHECK_OK(kvcached_ledger_unlease(l, slot));
  kvcached_ledger_close(l);
}

int main(void) {
  RUN(test_new_file);
  RUN(test_default_path);
  RUN(test_not_plain);
  RUN(test_permissions);
  RUN(test_content);
  RUN(test_unfinished);
  RUN(test_file_size_limit);
  RUN(test_no_space);
  RUN(test_close_on_exec);
  RUN(test_mapping_holds_no_lock);
  RUN(test_lease_needs_the_file_at_its_path);
  return 0;
}
