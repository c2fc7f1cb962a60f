/*
 * Preloaded into a server: makes memory calls of one library fail on a schedule, and counts them.
 *
 *   LD_PRELOAD=failing_calls.so FAILING_CALLS=FILE FAILING_CALLS_OF=libkvcached.so llama-server ...
 *
 * FILE is a page that the test maps too: it holds a `struct schedule` for each call, in the order of `enum call`. A call
 * is of the library if the instruction after it lies in that file; all others go through untouched and uncounted.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum call { CALL_MMAP, CALL_MPROTECT, CALL_MADVISE, CALLS };

struct schedule {
  _Atomic uint32_t calls;     /* made so far, failed ones included */
  _Atomic uint32_t failures;  /* of these */
  _Atomic uint32_t countdown; /* the call that fails next: 1 = the next one; 0 = none */
  _Atomic uint32_t again;     /* what the countdown starts from after a failure */
  _Atomic int32_t error;      /* errno of a failure */
};

static struct schedule *schedules;
static const char *library_base;

static void attach(void) {
  const char *path = getenv("FAILING_CALLS");
  int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
  if (fd < 0) return;
  /* not mmap(): it is the one below */
  void *page = (void *)syscall(SYS_mmap, NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (page != MAP_FAILED) schedules = page;
  (void)close(fd);
}

__attribute__((constructor)) static void start(void) { attach(); }

/* Whether an address is in the library. Its base is looked up once: the server loads it late, and never unloads it. */
static int ours(const void *from) {
  static const char *name;
  Dl_info info;
  if (!schedules || !dladdr(from, &info) || !info.dli_fname) return 0;
  if (library_base) return info.dli_fbase == library_base;
  if (!name && !(name = getenv("FAILING_CALLS_OF"))) return 0;
  const char *last = strrchr(info.dli_fname, '/');
  if (strcmp(last ? last + 1 : info.dli_fname, name) != 0) return 0;
  library_base = info.dli_fbase;
  return 1;
}

/* Whether this call is to fail; errno is then set. */
static int fails(enum call call, const void *from) {
  if (!ours(from)) return 0;
  struct schedule *s = &schedules[call];
  atomic_fetch_add(&s->calls, 1);
  uint32_t now = atomic_load(&s->countdown);
  while (now > 0) {
    if (!atomic_compare_exchange_weak(&s->countdown, &now, now > 1 ? now - 1 : atomic_load(&s->again))) continue;
    if (now > 1) return 0;
    atomic_fetch_add(&s->failures, 1);
    errno = atomic_load(&s->error);
    return 1;
  }
  return 0;
}

void *mmap(void *at, size_t size, int prot, int flags, int fd, off_t off) {
  if (fails(CALL_MMAP, __builtin_return_address(0))) return MAP_FAILED;
  return (void *)syscall(SYS_mmap, at, size, prot, flags, fd, off);
}

int mprotect(void *at, size_t size, int prot) {
  if (fails(CALL_MPROTECT, __builtin_return_address(0))) return -1;
  return (int)syscall(SYS_mprotect, at, size, prot);
}

int madvise(void *at, size_t size, int advice) {
  if (fails(CALL_MADVISE, __builtin_return_address(0))) return -1;
  return (int)syscall(SYS_madvise, at, size, advice);
}
