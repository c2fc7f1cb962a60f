/*
 * The ledger's file.
 *
 * Locks are open-file-description record locks (F_OFD_SETLK): they belong to one open(), so that two contexts
 * of one process exclude each other as two processes do, and the kernel drops them when the last copy of the
 * descriptor goes, however the process ends. They lie on bytes far behind the end of the file, which have no
 * content and need none. A mapping keeps its open file, and with it the locks, alive wherever it lives on: in
 * a forked child, or in a dead process whose address space somebody still reads through /proc. So the file is
 * mapped through an open() of its own, which carries no locks.
 */
#include "ledger_file.h"
#include "ledger.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define LOCK_BASE ((off_t)1 << 30)
#define LOCK_CREATE LOCK_BASE       /* held while the file is filled in */
#define LOCK_SLOTS (LOCK_BASE + 64) /* two bytes a slot: lessor, user */
#define CREATE_WAIT_MS 1000

static int set_lock(int fd, short type, off_t start, off_t len) {
  struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = len};
  int rc;
  do rc = fcntl(fd, F_OFD_SETLK, &lock);
  while (rc != 0 && errno == EINTR);
  return rc;
}

static void hold_range(int slot, int holds, off_t *start, off_t *len) {
  *start = LOCK_SLOTS + (off_t)slot * 2 + (holds == KVC_HOLD_USER ? 1 : 0);
  *len = holds == KVC_HOLD_BOTH ? 2 : 1;
}

int kvc_ledger_file_hold(int fd, int slot, int holds) {
  off_t start, len;
  hold_range(slot, holds, &start, &len);
  if (set_lock(fd, F_WRLCK, start, len) == 0) return 1;
  if (errno == EAGAIN || errno == EACCES) return 0;
  return kvc_fail_errno(KVCACHED_E_SYSTEM, errno, "locking slot %d of the ledger", slot);
}

int kvc_ledger_file_drop(int fd, int slot, int holds) {
  off_t start, len;
  hold_range(slot, holds, &start, &len);
  if (set_lock(fd, F_UNLCK, start, len) == 0) return KVCACHED_OK;
  return kvc_fail_errno(KVCACHED_E_SYSTEM, errno, "unlocking slot %d of the ledger", slot);
}

/* Which of `holds` are in the way of this open file: bits, or negative. */
static int ask_holders(int fd, int slot, int holds) {
  off_t start, len;
  hold_range(slot, holds, &start, &len);
  struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = start, .l_len = len};
  if (fcntl(fd, F_OFD_GETLK, &lock) != 0)
    return kvc_fail_errno(KVCACHED_E_SYSTEM, errno, "asking for the holders of slot %d of the ledger", slot);
  if (lock.l_type == F_UNLCK) return 0;
  if (holds != KVC_HOLD_BOTH) return holds;
  /* One lock of possibly two is told, with its range. */
  off_t first = LOCK_SLOTS + (off_t)slot * 2, end = lock.l_start + lock.l_len;
  int found = 0;
  if (lock.l_start <= first && (lock.l_len == 0 || end > first)) found |= KVC_HOLD_LESSOR;
  if (lock.l_start <= first + 1 && (lock.l_len == 0 || end > first + 1)) found |= KVC_HOLD_USER;
  return found;
}

int kvc_ledger_file_holders(int fd, int slot) {
  int found = ask_holders(fd, slot, KVC_HOLD_BOTH);
  if (found <= 0 || found == KVC_HOLD_BOTH) return found;
  int other = ask_holders(fd, slot, KVC_HOLD_BOTH & ~found);
  return other < 0 ? other : found | other;
}

/* Who the file belongs to, and that nobody else can write it. */
static int check_owner(const char *path, const struct stat *st) {
  if (!S_ISREG(st->st_mode)) return kvc_fail(KVCACHED_E_LEDGER, "%s is not a plain file", path);
  if (st->st_uid != geteuid())
    return kvc_fail(KVCACHED_E_LEDGER, "%s belongs to uid %lu, this process runs as uid %lu", path,
                    (unsigned long)st->st_uid, (unsigned long)geteuid());
  if (st->st_mode & 077)
    return kvc_fail(KVCACHED_E_LEDGER, "%s has mode %04o: others must not have access, it has to be 0600",
                    path, (unsigned)(st->st_mode & 07777));
  if (st->st_nlink > 1)
    return kvc_fail(KVCACHED_E_LEDGER, "%s has %lu names (hard links), it may have one", path,
                    (unsigned long)st->st_nlink);
  return KVCACHED_OK;
}

static ssize_t read_at(int fd, void *buf, size_t len, off_t off) {
  ssize_t n;
  do n = pread(fd, buf, len, off);
  while (n < 0 && errno == EINTR);
  return n;
}

static int write_at(int fd, const void *buf, size_t len, off_t off) {
  ssize_t n;
  do n = pwrite(fd, buf, len, off);
  while (n < 0 && errno == EINTR);
  if (n >= 0 && (size_t)n != len) errno = ENOSPC;
  return n >= 0 && (size_t)n == len ? 0 : -1;
}

/* 1: a finished ledger of ours. 0: empty, or left unfinished by a creator that died. OLDER: of the version
 *older, before this library's. Negative: something else. */
#define OLDER 2
static int check_content(const char *path, int fd, off_t size, uint32_t *older) {
  struct {
    uint64_t magic;
    uint32_t version, slots, slot_size, header_size;
  } head;
  if (size == 0) return 0;
  if (size >= (off_t)sizeof(head)) {
    if (read_at(fd, &head, sizeof(head), 0) != (ssize_t)sizeof(head))
      return kvc_fail_errno(KVCACHED_E_LEDGER, errno, "reading %s", path);
    if (head.magic == 0 && size == (off_t)sizeof(kvc_ledger_map)) return 0;
    if (head.magic != KVC_LEDGER_MAGIC)
      return kvc_fail(KVCACHED_E_LEDGER, "%s is not a ledger of this library", path);
    if (head.version > 0 && head.version < KVC_LEDGER_VERSION) {
      *older = head.version;
      return OLDER;
    }
    if (head.version != KVC_LEDGER_VERSION)
      return kvc_fail(KVCACHED_E_LEDGER,
                      "%s is a ledger of version %u, this library has version %u: end the processes that use "
                      "it, then delete it",
                      path, head.version, KVC_LEDGER_VERSION);
    if (size == (off_t)sizeof(kvc_ledger_map) && head.slots == KVC_LEDGER_SLOTS &&
        head.slot_size == sizeof(kvc_ledger_slot) && head.header_size == offsetof(kvc_ledger_map, slot))
      return 1;
  }
  return kvc_fail(
      KVCACHED_E_LEDGER,
      "%s is damaged (%lld bytes, a ledger has %zu): end the processes that use it, then delete it", path,
      (long long)size, sizeof(kvc_ledger_map));
}

/* Gives an empty file its space and its header. The caller holds the creation lock. */
static int fill_in(const char *path, int fd) {
  const off_t size = (off_t)sizeof(kvc_ledger_map);
  /* Growing a file past this limit raises a signal that ends the process: look first. */
  struct rlimit lim;
  if (getrlimit(RLIMIT_FSIZE, &lim) == 0 && lim.rlim_cur != RLIM_INFINITY && lim.rlim_cur < (rlim_t)size)
    return kvc_fail(KVCACHED_E_LEDGER,
                    "%s needs %lld bytes, this process may write files of %llu (ulimit -f)", path,
                    (long long)size, (unsigned long long)lim.rlim_cur);
  int e;
  do e = posix_fallocate(fd, 0, size);
  while (e == EINTR);
  if (e != 0) {
    (void)ftruncate(fd, 0); /* or the next process would find a damaged file */
    return kvc_fail_errno(KVCACHED_E_LEDGER, e, "getting %lld bytes for %s", (long long)size, path);
  }
  struct {
    uint32_t version, slots, slot_size, header_size;
  } head = {KVC_LEDGER_VERSION, KVC_LEDGER_SLOTS, sizeof(kvc_ledger_slot), offsetof(kvc_ledger_map, slot)};
  uint64_t magic = KVC_LEDGER_MAGIC;
  if (fchmod(fd, 0600) != 0 || write_at(fd, &head, sizeof(head), offsetof(kvc_ledger_map, version)) != 0 ||
      write_at(fd, &magic, sizeof(magic), 0) != 0)
    return kvc_fail_errno(KVCACHED_E_LEDGER, errno, "writing %s", path);
  return KVCACHED_OK;
}

static int is_at(const char *path, int fd) {
  struct stat ours, there;
  return fstat(fd, &ours) == 0 && lstat(path, &there) == 0 && there.st_dev == ours.st_dev &&
         there.st_ino == ours.st_ino;
}

/* Takes an older version's file out of the way when nobody has a slot in it: 1 when it is gone and path is to
   be opened anew, 0 when it is in use. Whoever has it mapped keeps what it has: the name goes, the content
   does not. The lock on all its bytes keeps others from taking a slot meanwhile. */
static int replace_older(const char *path, int fd) {
  /* Two that replace it at once are in each other's way for a moment. */
  for (int tries = 0; set_lock(fd, F_WRLCK, LOCK_BASE, 0) != 0; tries++) {
    if (tries == 20) return 0;
    (void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
  }
  /* Another process may have been quicker: then the path names its new file. */
  int gone = !is_at(path, fd) || unlink(path) == 0 || errno == ENOENT;
  (void)set_lock(fd, F_UNLCK, LOCK_BASE, 0);
  return gone;
}

/* 0, negative, or OLDER: open the path anew. */
static int check_or_create(const char *path, int fd) {
  int locked = 0, err = KVCACHED_OK;
  const int64_t deadline = kvc_now_ns() + INT64_C(1000000) * CREATE_WAIT_MS;
  for (;;) {
    struct stat st;
    if (fstat(fd, &st) != 0) {
      err = kvc_fail_errno(KVCACHED_E_LEDGER, errno, "looking at %s", path);
      break;
    }
    err = check_owner(path, &st);
    if (err) break;
    /* A creator at work shows as an unfinished file; only with the lock in hand is it known to be a dead
     * one's. */
    uint32_t older = 0;
    err = check_content(path, fd, st.st_size, &older);
    if (err == OLDER && !replace_older(path, fd))
      err =
          kvc_fail(KVCACHED_E_LEDGER,
                   "%s is a ledger of version %u that other processes use, this library has version %u: end "
                   "them, the file is replaced then",
                   path, older, KVC_LEDGER_VERSION);
    if (err != 0) break;
    if (locked) {
      err = fill_in(path, fd);
      break;
    }
    if (set_lock(fd, F_WRLCK, LOCK_CREATE, 1) == 0) {
      locked = 1;
    } else if (errno != EAGAIN && errno != EACCES) {
      err = kvc_fail_errno(KVCACHED_E_LEDGER, errno, "locking %s", path);
      break;
    } else if (kvc_now_ns() >= deadline) {
      err = kvc_fail(KVCACHED_E_LEDGER, "%s has been under creation by another process for %d ms", path,
                     CREATE_WAIT_MS);
      break;
    } else {
      (void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
  }
  if (locked) (void)set_lock(fd, F_UNLCK, LOCK_CREATE, 1);
  return err == OLDER || err < 0 ? err : KVCACHED_OK;
}

static int open_file(const char *path, int flags, int *fd) {
  do *fd = open(path, O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NOCTTY | O_NONBLOCK | flags, 0600);
  while (*fd < 0 && errno == EINTR);
  if (*fd >= 0) return KVCACHED_OK;
  if (errno == ELOOP) return kvc_fail(KVCACHED_E_LEDGER, "%s is a symbolic link: not followed", path);
  return kvc_fail_errno(KVCACHED_E_LEDGER, errno, "opening %s", path);
}

/* Maps the file that fd has open, through another open(). */
static int map_file(const char *path, int fd, kvc_ledger_map **out) {
  int map_fd;
  int err = open_file(path, 0, &map_fd);
  if (err) return err;
  void *map = MAP_FAILED;
  struct stat a, b;
  if (fstat(fd, &a) != 0 || fstat(map_fd, &b) != 0) {
    err = kvc_fail_errno(KVCACHED_E_LEDGER, errno, "looking at %s", path);
  } else if (a.st_dev != b.st_dev || a.st_ino != b.st_ino) {
    err = kvc_fail(KVCACHED_E_LEDGER, "%s was replaced while it was being opened", path);
  } else {
    map = mmap(NULL, sizeof(kvc_ledger_map), PROT_READ | PROT_WRITE, MAP_SHARED, map_fd, 0);
    if (map == MAP_FAILED)
      err = kvc_fail_errno(KVCACHED_E_NOMEM, errno, "mapping %s", path);
    else if (madvise(map, sizeof(kvc_ledger_map), MADV_DONTFORK) != 0) /* a child has no business in it */
      err = kvc_fail_errno(KVCACHED_E_SYSTEM, errno, "keeping %s out of children", path);
  }
  if (err && map != MAP_FAILED) (void)munmap(map, sizeof(kvc_ledger_map));
  (void)close(map_fd);
  if (!err) *out = map;
  return err;
}

int kvc_ledger_file_open(const char *path, int *fd_out, kvc_ledger_map **map_out) {
  int fd, err;
  for (int tries = 0;; tries++) {
    err = open_file(path, O_CREAT, &fd);
    if (err) return err;
    err = check_or_create(path, fd);
    if (err != OLDER) break;
    (void)close(fd);
    /* Somebody puts old files there faster than they can be replaced. */
    if (tries == 9)
      return kvc_fail(KVCACHED_E_LEDGER, "%s keeps becoming a ledger of an older version", path);
  }
  if (!err) err = map_file(path, fd, map_out);
  if (err) {
    (void)close(fd);
    return err;
  }
  *fd_out = fd;
  return KVCACHED_OK;
}

int kvc_ledger_file_check_path(const char *path, int fd) {
  if (is_at(path, fd)) return KVCACHED_OK;
  return kvc_fail(KVCACHED_E_LEDGER,
                  "%s was deleted or replaced while this process used it, and a child would not find its "
                  "slot: start this process again",
                  path);
}

/* ---- the default path ---- */

/* Copies a UUID (8-4-4-4-12 hexadecimal digits) in lower case. 0 where the text is none. */
static int copy_uuid(const char *text, char out[37]) {
  for (int i = 0; i < 36; i++) {
    char c = text[i];
    if (c >= 'A' && c <= 'F') c = (char)(c - 'A' + 'a');
    int dash = i == 8 || i == 13 || i == 18 || i == 23;
    if (dash ? c != '-' : !((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'))) return 0;
    out[i] = c;
  }
  out[36] = 0;
  return text[36] == 0;
}

int kvcached_ledger_default_path(const char *device, char *out, size_t size) {
  if (!out || !size) return kvc_fail(KVCACHED_E_INVAL, "%s", out ? "size is 0" : "out is NULL");
  *out = 0;
  char id[37] = "host";
  if (device && strcmp(device, "host") != 0) {
    const char *uuid = device;
    if (strncasecmp(device, "GPU-", 4) == 0 || strncasecmp(device, "MIG-", 4) == 0) uuid += 4;
    if (!copy_uuid(uuid, id))
      return kvc_fail(KVCACHED_E_INVAL,
                      "device \"%.80s\": \"host\", or the UUID that nvidia-smi -L prints, such as "
                      "GPU-01234567-89ab-cdef-0123-456789abcdef",
                      device);
  }
  int len = snprintf(out, size, "/dev/shm/kvcached-%lu-%s", (unsigned long)geteuid(), id);
  if (len >= 0 && (size_t)len < size) return KVCACHED_OK;
  *out = 0;
  return kvc_fail(KVCACHED_E_INVAL, "a path of %d bytes does not fit %zu: KVCACHED_PATH_MAX is %d", len, size,
                  KVCACHED_PATH_MAX);
}
