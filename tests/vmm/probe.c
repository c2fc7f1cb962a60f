/* The test program as another process that opens a CUDA device: KVCACHED_PROBE names what it is to do in
   place of tests (test_driver.c). It answers with lines on its standard output. */
#include "support.h"

#include "backend.h"
#include "cuda_driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

static kvc_device_options from_environment(void) {
  const char *v;
  kvc_device_options o = {.pci_bus_id = getenv("PROBE_PCI")};
  if ((v = getenv("PROBE_DEVICE"))) o.ordinal = atoi(v);
  if ((v = getenv("PROBE_PAGE"))) o.page_size = strtoull(v, NULL, 0);
  if ((v = getenv("PROBE_LARGE"))) o.large_page = strtoull(v, NULL, 0);
  return o;
}

static const kvc_backend *const b = &kvc_backend_cuda;
static kvc_device
    *volatile kept; /* what is left open on purpose: the fake driver's find, not a sanitizer's */

static kvc_device *probe_open(void) {
  kvc_device_options o = from_environment();
  kvc_device *d = NULL;
  int err = b->open(&o, &d);
  if (err) {
    printf("%s %s\n", kvcached_err_name(err), kvcached_last_error());
    exit(0);
  }
  return d;
}

static void say_device(const kvc_device *d) {
  printf("OK name=%s id=%s granularity=%zu page=%zu large=%zu edits=%d\n", d->name, d->id, d->granularity,
         d->page_size, d->large_page, d->edits_anytime);
}

/* What is held beside: before and after memory was taken. */
static void probe_beside(void) {
  kvc_device *d = probe_open();
  kvc_handle handle;
  for (int i = 0; i < 2; i++) {
    uint64_t bytes = 0;
    int err = b->beside(d, &bytes);
    printf("%s %llu%s\n", kvcached_err_name(err), (unsigned long long)bytes,
           err ? kvcached_last_error() : "");
    if (i == 0) CHECK_OK(b->create(d, d->page_size, &handle));
  }
  CHECK_OK(b->destroy(d, d->page_size, handle));
  b->close(d);
}

/* An entry point of the driver, found apart from the library's own loading. */
static void *entry(const char *name) {
  void *driver = dlopen(KVC_CUDA_LIBRARY, RTLD_NOW | RTLD_LOCAL);
  CHECK(driver != NULL);
  void *p = dlsym(driver, name);
  CHECK(p != NULL);
  CHECK_EQ(dlclose(driver), 0); /* the library has it open as well */
  return p;
}
#define ENTRY(type, variable, name)     \
  type variable;                        \
  do {                                  \
    void *p_ = entry(name);             \
    memcpy(&variable, &p_, sizeof(p_)); \
  } while (0)

typedef cu_result (*get_current_fn)(cu_context *);
typedef cu_result (*set_current_fn)(cu_context);
typedef cu_result (*create_fn)(cu_context *, unsigned, cu_device);
typedef cu_result (*destroy_fn)(cu_context);

static cu_context current(void) {
  ENTRY(get_current_fn, get, "cuCtxGetCurrent");
  cu_context c = NULL;
  CHECK_EQ(get(&c), CU_OK);
  return c;
}

/* Every function of the table, with a check after each that the caller's context is what it was. */
static void use_all(kvc_device *d) {
  cu_context before = current();
#define STILL(call)                                                                    \
  do {                                                                                 \
    CHECK_OK(call);                                                                    \
    if (current() != before) check_failed(__FILE__, __LINE__, "%s changed it", #call); \
  } while (0)
  size_t page = d->page_size;
  kvc_space s;
  kvc_handle h;
  void *p;
  int pinned;
  uint64_t free_bytes, total;
  char byte = 'q', back = 0;
  STILL(b->reserve(d, 2 * page, page, &s));
  STILL(b->create(d, page, &h));
  STILL(b->map(d, &s, 0, page, h));
  STILL(b->access(d, &s, 0, page));
  STILL(b->zero(d, KVC_LANE_CALLER, &s, 0, page));
  STILL(b->write(d, KVC_LANE_CALLER, &s, 5, &byte, 1));
  STILL(b->finish(d, KVC_LANE_CALLER));
  STILL(b->read(d, KVC_LANE_HELPER, &s, 5, &back, 1));
  STILL(b->finish(d, KVC_LANE_HELPER));
  CHECK_EQ(back, 'q');
  STILL(b->quiesce(d));
  STILL(b->host_alloc(d, 1 << 16, &p, &pinned));
  STILL(b->host_free(d, p, 1 << 16, pinned));
  STILL(b->memory(d, &free_bytes, &total));
  CHECK(b->read(d, KVC_LANE_HELPER, &s, page, &back, 1) != KVCACHED_OK); /* a failure too */
  CHECK(current() == before);
  STILL(b->unmap(d, &s, 0, page));
  STILL(b->destroy(d, page, h));
  b->unreserve(d, &s);
  CHECK(current() == before);
#undef STILL
}

static void *use_all_thread(void *d) {
  CHECK(current() == NULL);
  use_all(d);
  return NULL;
}

static void probe_contexts(void) {
  ENTRY(set_current_fn, set_current, "cuCtxSetCurrent");
  ENTRY(create_fn, create, "cuCtxCreate_v2");
  ENTRY(destroy_fn, destroy, "cuCtxDestroy_v2");
  kvc_device *d = probe_open();
  CHECK(current() == NULL); /* none */
  use_all(d);
  pthread_t thread;
  CHECK_EQ(pthread_create(&thread, NULL, use_all_thread, d), 0);
  CHECK_EQ(pthread_join(thread, NULL), 0);

  cu_context other; /* another, of the same device */
  CHECK_EQ(create(&other, 0, 0), CU_OK);
  use_all(d);
  kvc_device *second = probe_open();
  CHECK(current() == other);
  b->close(second);
  CHECK(current() == other);
  CHECK_EQ(destroy(other), CU_OK);

  const kvc_cuda_driver *driver; /* the library's own */
  CHECK_OK(kvc_cuda_load(&driver));
  cu_context own;
  CHECK_EQ(driver->primary_retain(&own, 0), CU_OK);
  CHECK_EQ(set_current(own), CU_OK);
  use_all(d);
  CHECK(current() == own);
  CHECK_EQ(driver->primary_release(0), CU_OK);
  CHECK_EQ(set_current(NULL), CU_OK);
  b->close(d);
  CHECK(current() == NULL);
  printf("OK\n");
}

/* One driver call an operation, and a look at the current context where one is needed. */
static void probe_calls(void) {
  typedef unsigned long (*calls_fn)(void);
  ENTRY(calls_fn, calls, "fake_cuda_calls");
  ENTRY(set_current_fn, set_current, "cuCtxSetCurrent");
  kvc_device *d = probe_open();
  size_t page = d->page_size;
  kvc_space s;
  kvc_handle h;
  char byte = 1;
  unsigned long n;
  const kvc_cuda_driver *driver;
  CHECK_OK(kvc_cuda_load(&driver));
  cu_context own;
  CHECK_EQ(driver->primary_retain(&own, 0), CU_OK);
#define COSTS(number, call)        \
  do {                             \
    n = calls();                   \
    CHECK_OK(call);                \
    CHECK_EQ(calls() - n, number); \
  } while (0)
  for (int is_current = 0; is_current < 2; is_current++) {
    CHECK_EQ(set_current(is_current ? own : NULL), CU_OK);
    unsigned long more = is_current ? 1 : 3; /* look; or look, push, pop */
    COSTS(1, b->reserve(d, 4 * page, page, &s));
    COSTS(1, b->create(d, page, &h));
    COSTS(1, b->map(d, &s, 0, page, h));
    COSTS(1, b->access(d, &s, 0, page));
    COSTS(1 + more, b->zero(d, KVC_LANE_CALLER, &s, 0, page));
    COSTS(1 + more, b->write(d, KVC_LANE_CALLER, &s, 0, &byte, 1));
    COSTS(1 + more, b->read(d, KVC_LANE_CALLER, &s, 0, &byte, 1));
    COSTS(1 + more, b->finish(d, KVC_LANE_CALLER));
    COSTS(1 + more, b->quiesce(d));
    COSTS(1, b->unmap(d, &s, 0, page));
    COSTS(1, b->destroy(d, page, h));
    b->unreserve(d, &s);
  }
#undef COSTS
  CHECK_EQ(driver->primary_release(0), CU_OK);
  b->close(d);
  printf("OK\n");
}

static pthread_barrier_t barrier;

static void *open_and_close(void *arg) {
  kvc_device_options o = {0};
  (void)pthread_barrier_wait(&barrier);
  for (int i = 0; i < 50; i++) {
    kvc_device *d;
    CHECK_OK(b->open(&o, &d));
    use_all(d);
    b->close(d);
  }
  return arg;
}

static void probe_threads(void) {
  enum { THREADS = 8 };
  pthread_t thread[THREADS];
  CHECK_EQ(pthread_barrier_init(&barrier, NULL, THREADS), 0);
  for (int i = 0; i < THREADS; i++) CHECK_EQ(pthread_create(&thread[i], NULL, open_and_close, NULL), 0);
  for (int i = 0; i < THREADS; i++) CHECK_EQ(pthread_join(thread[i], NULL), 0);
  printf("OK\n");
}

static void probe_fork(void) {
  kvc_device *d = probe_open();
  fflush(stdout);
  pid_t pid = fork();
  if (pid == 0) {
    (void)probe_open(); /* prints why not */
    _exit(0);
  }
  int status;
  CHECK(waitpid(pid, &status, 0) == pid && status == 0);
  b->close(d);
}

/* Work is done once it is waited for; memory that goes before that is lost. */
static void probe_streams(void) {
  kvc_device *d = probe_open();
  size_t page = d->page_size;
  kvc_space s;
  kvc_handle h;
  char byte = 'q', back = 0;
  CHECK_OK(b->reserve(d, page, page, &s));
  CHECK_OK(b->create(d, page, &h));
  CHECK_OK(b->map(d, &s, 0, page, h));
  CHECK_OK(b->access(d, &s, 0, page));
  CHECK_OK(b->write(d, KVC_LANE_CALLER, &s, 9, &byte, 1));
  CHECK_OK(b->read(d, KVC_LANE_CALLER, &s, 9, &back, 1));
  CHECK_EQ(back, 0);
  CHECK_OK(b->finish(d, KVC_LANE_HELPER)); /* the other one's */
  CHECK_EQ(back, 0);
  CHECK_OK(b->finish(d, KVC_LANE_CALLER));
  CHECK_EQ(back, 'q');
  CHECK_OK(b->zero(d, KVC_LANE_HELPER, &s, 0, page));
  CHECK_OK(b->quiesce(d)); /* waits for all */
  CHECK_OK(b->read(d, KVC_LANE_CALLER, &s, 9, &back, 1));
  CHECK_OK(b->finish(d, KVC_LANE_CALLER));
  CHECK_EQ(back, 0);
  CHECK_OK(b->zero(d, KVC_LANE_CALLER, &s, 0, page));
  int err = b->unmap(d, &s, 0, page);
  CHECK_IS(b->finish(d, KVC_LANE_CALLER), err); /* and it stays so */
  kept = d;
  printf("%s %s\n", kvcached_err_name(err), kvcached_last_error());
}

/* Takes memory, says how much is left, then again for each byte of its input; gives it back at its end. */
static void probe_hold(void) {
  kvc_device *d = probe_open();
  uint64_t free_bytes, total;
  kvc_handle h = 0;
  size_t size = strtoull(getenv("PROBE_HOLD"), NULL, 0);
  int err = b->create(d, size, &h);
  char c;
  do {
    CHECK_OK(b->memory(d, &free_bytes, &total));
    printf("%s %llu of %llu\n", kvcached_err_name(err), (unsigned long long)free_bytes,
           (unsigned long long)total);
    fflush(stdout);
  } while (read(0, &c, 1) > 0);
  if (!err) CHECK_OK(b->destroy(d, size, h));
  b->close(d);
}

static void probe_pinned(void) {
  kvc_device *d = probe_open();
  void *p;
  int pinned;
  int64_t start = now_ms();
  CHECK_OK(b->host_alloc(d, 3 * MIB, &p, &pinned));
  memset(p, 1, 3 * MIB);
  printf("OK pinned=%d slow=%d\n", pinned, now_ms() - start >= 50);
  CHECK_OK(b->host_free(d, p, 3 * MIB, pinned));
  b->close(d);
}

/* Before main: the test program's arguments are another matter. */
__attribute__((constructor)) static void probe(void) {
  const char *what = getenv("KVCACHED_PROBE");
  if (!what) return;
  if (strcmp(what, "open") == 0) {
    kvc_device *d = probe_open();
    say_device(d);
    b->close(d);
  } else if (strcmp(what, "leak") == 0) {
    kept = probe_open();
    say_device(kept);
  } else if (strcmp(what, "contexts") == 0) {
    probe_contexts();
  } else if (strcmp(what, "calls") == 0) {
    probe_calls();
  } else if (strcmp(what, "threads") == 0) {
    probe_threads();
  } else if (strcmp(what, "fork") == 0) {
    probe_fork();
  } else if (strcmp(what, "streams") == 0) {
    probe_streams();
  } else if (strcmp(what, "hold") == 0) {
    probe_hold();
  } else if (strcmp(what, "beside") == 0) {
    probe_beside();
  } else if (strcmp(what, "pinned") == 0) {
    probe_pinned();
  } else {
    printf("no such probe: %s\n", what);
  }
  exit(0);
}
