/* mprotect and madvise of this program: the linker takes these before those of
 * the C library. */
#include "refuse.h"
#include "check.h"

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct {
  uintptr_t base, end;
  unsigned skip, n, refused;
} schedules[REFUSE_KINDS];

void refuse_calls(refuse_kind kind, const void *base, size_t size, unsigned skip, unsigned n) {
  pthread_mutex_lock(&mutex);
  schedules[kind].base = (uintptr_t)base;
  schedules[kind].end = (uintptr_t)base + size;
  schedules[kind].skip = skip;
  schedules[kind].n = n;
  schedules[kind].refused = 0;
  pthread_mutex_unlock(&mutex);
}

unsigned refuse_end(refuse_kind kind) {
  pthread_mutex_lock(&mutex);
  unsigned refused = schedules[kind].refused;
  schedules[kind].n = 0;
  pthread_mutex_unlock(&mutex);
  return refused;
}

static int refused(refuse_kind kind, const void *p, size_t len) {
  int hit = 0;
  pthread_mutex_lock(&mutex);
  if (schedules[kind].n > 0 && (uintptr_t)p < schedules[kind].end &&
      (uintptr_t)p + len > schedules[kind].base) {
    if (schedules[kind].skip > 0) {
      schedules[kind].skip--;
    } else {
      schedules[kind].n--;
      schedules[kind].refused++;
      hit = 1;
    }
  }
  pthread_mutex_unlock(&mutex);
  if (hit) errno = ENOMEM;
  return hit;
}

int mprotect(void *p, size_t len, int prot) {
  return refused(REFUSE_PROTECT, p, len) ? -1 : (int)syscall(SYS_mprotect, p, len, prot);
}

int madvise(void *p, size_t len, int advice) {
  if (advice == MADV_DONTNEED && refused(REFUSE_DISCARD, p, len)) return -1;
  return (int)syscall(SYS_madvise, p, len, advice);
}
