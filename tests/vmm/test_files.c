/* The ledger's file: its name, what is refused, and that nothing but a good file is ever used. */
#include "ledger_kit.h"

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
  test_options(&o);
  o.ledger_path = path;
  kvcached_ctx_t ctx = (kvcached_ctx_t)1;
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_LEDGER);
  CHECK(ctx == NULL);
}

static void make_file(const char *path) {
  kvcached_ledger_t l;
  CHECK_OK(kvcached_ledger_open(path, &l));
  CHECK(strcmp(kvcached_ledger_path(l), path) == 0);
  kvcached_ledger_close(l);
}

static const char *good_file(const char *name) {
  const char *path = scratch(name);
  make_file(path);
  return path;
}

static void write_file(const char *path, const void *data, size_t size, off_t off) {
  int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  CHECK(fd >= 0 && pwrite(fd, data, size, off) == (ssize_t)size);
  close(fd);
}

TEST_HOST(files, new_file) {
  const char *path = scratch("new");
  mode_t mask = umask(0777);
  make_file(path);
  umask(mask);
  struct stat st;
  CHECK(stat(path, &st) == 0);
  CHECK_EQ(st.st_mode & 07777, 0600);
  CHECK_EQ(st.st_size, sizeof(kvc_ledger_map));
  CHECK(st.st_blocks * 512 >= st.st_size); /* space is there, not promised */
  CHECK_EQ(live_slots(path), 0);
}

TEST_HOST(files, default_path) {
  char expected[KVCACHED_PATH_MAX], path[KVCACHED_PATH_MAX];
  snprintf(expected, sizeof(expected), "/dev/shm/kvcached-%lu-host", (unsigned long)geteuid());
  CHECK_OK(kvcached_ledger_default_path(NULL, path, sizeof(path)));
  CHECK_TEXT(path, expected);
  CHECK_OK(kvcached_ledger_default_path("host", path, sizeof(path)));
  CHECK_TEXT(path, expected);
  kvcached_ledger_t l = NULL;
  if (access("/dev/shm", W_OK) == 0) { /* else its absence must be an error, no crash */
    CHECK_OK(kvcached_ledger_open(NULL, &l));
    CHECK_TEXT(kvcached_ledger_path(l), expected);
  } else {
    CHECK_IS(kvcached_ledger_open(NULL, &l), KVCACHED_E_LEDGER);
  }
  kvcached_ledger_close(l);
  CHECK(kvcached_ledger_path(NULL) == NULL);
}

/* All ways to write a device give one name. */
TEST_HOST(files, path_of_a_device) {
  static const char *const same[] = {
      "GPU-0a1B2c3D-4e5f-6789-aBcD-ef0123456789", "gpu-0A1b2c3d-4e5f-6789-abcd-EF0123456789",
      "MIG-0a1b2c3d-4e5f-6789-abcd-ef0123456789", "mIg-0a1b2c3d-4e5f-6789-abcd-ef0123456789",
      "0A1B2C3D-4E5F-6789-ABCD-EF0123456789",     "0a1b2c3d-4e5f-6789-abcd-ef0123456789"};
  char expected[KVCACHED_PATH_MAX], path[KVCACHED_PATH_MAX];
  snprintf(expected, sizeof(expected), "/dev/shm/kvcached-%lu-0a1b2c3d-4e5f-6789-abcd-ef0123456789",
           (unsigned long)geteuid());
  for (size_t i = 0; i < sizeof(same) / sizeof(same[0]); i++) {
    CHECK_OK(kvcached_ledger_default_path(same[i], path, sizeof(path)));
    CHECK_TEXT(path, expected);
  }
  static const char *const bad[] = {"",
                                    "cpu",
                                    "HOST",
                                    "host ",
                                    "GPU-",
                                    "MIG",
                                    "GPU-GPU-0a1b2c3d-4e5f-6789-abcd-ef0123456789",
                                    "UUID-0a1b2c3d-4e5f-6789-abcd-ef0123456789",
                                    "0a1b2c3d-4e5f-6789-abcd-ef012345678",
                                    "0a1b2c3d-4e5f-6789-abcd-ef01234567890",
                                    "0a1b2c3d-4e5f-6789-abcd-ef012345678g",
                                    "0a1b2c3d4e5f6789abcdef0123456789",
                                    "0a1b2c3d-4e5f-6789-abcd_ef0123456789",
                                    " 0a1b2c3d-4e5f-6789-abcd-ef0123456789",
                                    "0a1b2c3d-4e5f-6789-abcd-ef0123456789\n",
                                    "../../../tmp/0a1b2c3d-4e5f-6789-abcd",
                                    "MIG-GPU-0a1b2c3d-4e5f-6789-abcd-ef0123456789/1/0"};
  for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
    path[0] = 'x';
    CHECK_IS(kvcached_ledger_default_path(bad[i], path, sizeof(path)), KVCACHED_E_INVAL);
    CHECK_TEXT(path, "");
    CHECK_DETAIL("UUID");
  }
  CHECK_IS(kvcached_ledger_default_path(NULL, path, 10), KVCACHED_E_INVAL);
  CHECK_TEXT(path, "");
  CHECK_DETAIL("does not fit 10");
  CHECK_IS(kvcached_ledger_default_path(NULL, path, strlen(expected) - 40), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_default_path(NULL, path, 0), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_default_path(NULL, NULL, 100), KVCACHED_E_INVAL);
  CHECK_OK(kvcached_ledger_default_path(same[0], path, strlen(expected) + 1)); /* exactly */
  CHECK_IS(kvcached_ledger_default_path(same[0], path, strlen(expected)), KVCACHED_E_INVAL);
}

TEST_HOST(files, not_plain) {
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

TEST_HOST(files, permissions) {
  const char *path = good_file("open-to-others");
  CHECK(chmod(path, 0644) == 0);
  check_refused(path, "mode 0644");
  CHECK(chmod(path, 0620) == 0);
  check_refused(path, "mode 0620");
  if (geteuid() != 0) return; /* only root can give a file away */
  CHECK(chmod(path, 0600) == 0 && chown(path, 12345, (gid_t)-1) == 0);
  check_refused(path, "belongs to uid 12345");
}

TEST_HOST(files, content) {
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

/* An older version's file that nobody uses is replaced: otherwise a new release would not start before the
   machine does. One in use is left alone and said to be. */
TEST_HOST(files, older_version) {
  const char *path = good_file("older");
  uint32_t number = 1;
  write_file(path, &number, sizeof(number), offsetof(kvc_ledger_map, version));
  CHECK(truncate(path, 36864) == 0); /* as large as that version's was */
  int fd = open(path, O_RDWR | O_CLOEXEC);
  CHECK(fd >= 0);
  /* a slot's lock, where that version had it too */
  struct flock slot = {
      .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = ((off_t)1 << 30) + 64 + 5, .l_len = 1};
  CHECK(fcntl(fd, F_OFD_SETLK, &slot) == 0);
  check_refused(path, "version 1 that other processes use, this library has version 3");
  struct stat before, after;
  CHECK(stat(path, &before) == 0 && before.st_size == 36864);

  slot.l_type = F_UNLCK;
  CHECK(fcntl(fd, F_OFD_SETLK, &slot) == 0);
  kvcached_ctx_t ctx = open_in(path, "g", 100);
  CHECK_EQ(live_slots(path), 1);
  CHECK(stat(path, &after) == 0 && after.st_ino != before.st_ino);
  CHECK(fstat(fd, &before) == 0 && before.st_size == 36864); /* whoever had it mapped keeps it */
  close(fd);
  kvcached_shutdown(ctx);
}

/* A creator that died half way leaves a file with no magic: it is finished by the next. */
TEST_HOST(files, unfinished) {
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

/* The creator is stopped in the middle: waiting for it has an end, and the file is good once it went on. */
TEST_HOST(files, creator_stopped) {
  const char *path = scratch("creating");
  int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  CHECK(fd >= 0);
  struct flock all = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
  CHECK(fcntl(fd, F_OFD_SETLK, &all) == 0);
  kvcached_ledger_t l;
  int64_t start = now_ms();
  CHECK_IS(kvcached_ledger_open(path, &l), KVCACHED_E_LEDGER);
  CHECK_LE(now_ms() - start, 3000);
  CHECK_DETAIL("under creation");
  close(fd);
  CHECK_EQ(live_slots(path), 0);
}

/* The signal for a file grown too large would end the process: it must not come. */
TEST_HOST(files, file_size_limit) {
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
TEST_SYSTEM(files, no_space) {
  const char *dir = scratch("tiny");
  CHECK(mkdir(dir, 0700) == 0);
  pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    if (!enter_namespaces(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 ||
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
  if (WEXITSTATUS(status) == 77) SKIP("no file systems can be mounted here");
  CHECK_EQ(WEXITSTATUS(status), 0);
}

/* Descriptors are not for programs this one starts. */
TEST_HOST(files, close_on_exec) {
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
TEST_HOST(files, mapping_holds_no_lock) {
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

/* A child opens the ledger by its path: once that names another file, or none, it would not find its lease.
 */
TEST_HOST(files, lease_needs_the_file_at_its_path) {
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
