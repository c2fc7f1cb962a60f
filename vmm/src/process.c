/*
 * Which process this is. getpid() is a system call, too dear for calls that are made around every piece of
 * work; so the number is kept in a page that the kernel wipes in whatever child gets a copy of it, by fork
 * or by a bare clone.
 */
#include "context.h"

#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18 /* since Linux 4.14 */
#endif

static _Atomic int *kept;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void make_page(void) {
  size_t size = (size_t)sysconf(_SC_PAGESIZE);
  void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return;
  if (madvise(p, size, MADV_WIPEONFORK) == 0)
    kept = p;
  else
    (void)munmap(p, size);
}

pid_t kvc_pid(void) {
  (void)pthread_once(&once, make_page);
  if (!kept) return getpid();
  int pid = atomic_load_explicit(kept, memory_order_relaxed);
  if (pid == 0) {
    pid = (int)getpid();
    atomic_store_explicit(kept, pid, memory_order_relaxed);
  }
  return (pid_t)pid;
}
