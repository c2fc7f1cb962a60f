/*
 * Counts the driver calls that the library really makes. The library looks the driver's functions up with
 * dlsym; this program defines dlsym, so the dynamic linker gives the library this one, and what it gets for a
 * driver function counts and jumps on. Look-ups by anybody else go straight through: the raw side of the
 * benchmark is neither counted nor slowed.
 *
 * The functions in between take six words and pass them on. That fits every driver function with at most six
 * integer or pointer arguments on x86-64 and 64-bit Arm, which is all the library uses; a look-up of the one
 * with more that it might come to use (cuLaunchKernel) is passed through uncounted.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <dlfcn.h>
#include <stdatomic.h>
#include <string.h>

#define COUNTED_MAX 64

typedef uintptr_t word;
typedef int (*driver_fn)(word, word, word, word, word, word);
typedef void *(*dlsym_fn)(void *, const char *);

static driver_fn real[COUNTED_MAX];
static _Atomic unsigned used;
static _Atomic uint64_t calls;

#define BETWEEN(i)                                                         \
  static int between_##i(word a, word b, word c, word d, word e, word f) { \
    atomic_fetch_add_explicit(&calls, 1, memory_order_relaxed);            \
    return real[0##i](a, b, c, d, e, f);                                   \
  }
/* Numbered in octal, so that the digits can be counted through by a macro. */
#define EIGHT(XX, i) XX(i##0) XX(i##1) XX(i##2) XX(i##3) XX(i##4) XX(i##5) XX(i##6) XX(i##7)
#define ALL(XX) \
  EIGHT(XX, 0) EIGHT(XX, 1) EIGHT(XX, 2) EIGHT(XX, 3) EIGHT(XX, 4) EIGHT(XX, 5) EIGHT(XX, 6) EIGHT(XX, 7)
ALL(BETWEEN)

#define NAME(i) between_##i,
static const driver_fn between[COUNTED_MAX] = {ALL(NAME)};

uint64_t counted_calls(void) { return atomic_load_explicit(&calls, memory_order_relaxed); }

int counted_any(void) { return atomic_load(&used) > 0; }

static void *real_dlsym(void *handle, const char *name) {
  static dlsym_fn found;
  if (!found) {
    /* The versions under which the C library has it, on x86-64, 64-bit Arm, and since glibc 2.34. */
    static const char *const versions[] = {"GLIBC_2.34", "GLIBC_2.2.5", "GLIBC_2.17"};
    for (size_t i = 0; i < sizeof(versions) / sizeof(versions[0]) && !found; i++) {
      void *p = dlvsym(RTLD_NEXT, "dlsym", versions[i]);
      memcpy(&found, &p, sizeof(p));
    }
    if (!found) bench_fail("this C library has no dlsym that can be counted");
  }
  return found(handle, name);
}

/* Whether the code at this address is the library's. */
static int is_library(void *at) {
  Dl_info info;
  if (dladdr(at, &info) == 0 || !info.dli_fname) return 0;
  const char *slash = strrchr(info.dli_fname, '/');
  return strncmp(slash ? slash + 1 : info.dli_fname, "libkvcached", strlen("libkvcached")) == 0;
}

/* Sanitizers look functions up before any code of a program may run, so a build with one goes without. */
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define dlsym counted_dlsym
#endif
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define dlsym counted_dlsym
#endif
void *dlsym(void *restrict handle, const char *restrict name);

__attribute__((visibility("default"))) void *dlsym(void *restrict handle, const char *restrict name) {
  void *p = real_dlsym(handle, name);
  if (!p || strncmp(name, "cu", 2) != 0 || strcmp(name, "cuLaunchKernel") == 0) return p;
  if (!is_library(__builtin_return_address(0))) return p;
  for (unsigned i = 0, n = atomic_load(&used); i < n; i++) {
    if (memcmp(&real[i], &p, sizeof(p)) == 0) {
      memcpy(&p, &between[i], sizeof(p));
      return p;
    }
  }
  unsigned i = atomic_fetch_add(&used, 1);
  if (i >= COUNTED_MAX) bench_fail("the library uses more than %d driver functions", COUNTED_MAX);
  memcpy(&real[i], &p, sizeof(p));
  memcpy(&p, &between[i], sizeof(p));
  return p;
}
