#include "fault.h"

#include "backend.h"

static const kvc_backend *real;
static kvc_backend table;
static unsigned calls[FAULT_KINDS], countdown[FAULT_KINDS];
static int error[FAULT_KINDS];

void fault_set(fault_kind kind, unsigned nth, int err) {
  countdown[kind] = nth;
  error[kind] = err;
}

void fault_clear(void) {
  for (int k = 0; k < FAULT_KINDS; k++) countdown[k] = 0;
}

unsigned fault_calls(fault_kind kind) { return calls[kind]; }

static int fails(fault_kind kind) {
  calls[kind]++;
  if (countdown[kind] == 0 || --countdown[kind] > 0) return KVCACHED_OK;
  return kvc_fail(error[kind], "injected failure");
}

static int reserve(size_t size, size_t page_size, kvc_space *space) {
  int err = fails(FAULT_RESERVE);
  return err ? err : real->reserve(size, page_size, space);
}
static int map(kvc_space *space, size_t off, size_t len) {
  int err = fails(FAULT_MAP);
  return err ? err : real->map(space, off, len);
}
static int unmap(kvc_space *space, size_t off, size_t len) {
  int err = fails(FAULT_UNMAP);
  return err ? err : real->unmap(space, off, len);
}
static int zero(kvc_space *space, size_t off, size_t len) {
  int err = fails(FAULT_ZERO);
  return err ? err : real->zero(space, off, len);
}

const kvc_backend *kvc_test_backend(const kvc_backend *backend) {
#if defined(__SANITIZE_THREAD__)
  return backend; /* the counters here are not for several threads */
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
  return backend;
#endif
#endif
  real = backend;
  table = *backend;
  table.reserve = reserve;
  table.map = map;
  table.unmap = unmap;
  table.zero = zero;
  return &table;
}
