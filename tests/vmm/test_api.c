/* The library's face: names, versions, the six functions of the simplest use, nothing of NULL, and a
   context's limits. test_api_options.c: options and ranges; test_api_process.c: what its host process notices
   of it. */
#include "context.h"
#include "support.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

TEST_HOST(api, names) {
  CHECK_EQ(kvcached_abi_version(), KVCACHED_ABI_VERSION);
  CHECK_TEXT(kvcached_version(), KVCACHED_VERSION);
#define XX(name, value, text)                                        \
  CHECK_TEXT(kvcached_strerror(KVCACHED_##name), text);              \
  CHECK_TEXT(kvcached_err_name(KVCACHED_##name), "KVCACHED_" #name); \
  CHECK_EQ(KVCACHED_##name, value);
  KVCACHED_ERROR_MAP(XX)
#undef XX
  CHECK_TEXT(kvcached_err_name(-99), "KVCACHED_E_UNKNOWN");
  CHECK_TEXT(kvcached_err_name(1), "KVCACHED_E_UNKNOWN");
  CHECK(*kvcached_strerror(-99));
  CHECK_TEXT(kvcached_last_error(), ""); /* a fresh process: the suite's first test */
}

static void *fail_once(void *arg) {
  (void)arg;
  CHECK_TEXT(kvcached_last_error(), ""); /* each thread has its own */
  CHECK_IS(kvcached_ensure(NULL, 0, 1), KVCACHED_E_INVAL);
  CHECK(*kvcached_last_error());
  return NULL;
}

TEST_HOST(api, last_error_is_the_threads_own) {
  kvcached_ctx_t ctx = NULL;
  CHECK_IS(kvcached_open(NULL, &ctx), KVCACHED_E_INVAL);
  char before[400];
  snprintf(before, sizeof(before), "%s", kvcached_last_error());
  pthread_t t;
  CHECK(pthread_create(&t, NULL, fail_once, NULL) == 0);
  pthread_join(t, NULL);
  CHECK_TEXT(kvcached_last_error(), before);
}

/* ---- the six ---- */

/* Removes a default ledger that nobody uses. */
static void remove_unused(const char *path) {
  int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return;
  struct flock all = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
  if (fcntl(fd, F_OFD_GETLK, &all) == 0 && all.l_type == F_UNLCK) (void)unlink(path);
  close(fd);
}

TEST(api, six_functions) {
  char path[KVCACHED_PATH_MAX];
  kvcached_ctx_t first = open_alone(0, UINT64_MAX);
  CHECK_OK(kvcached_ledger_default_path(first->device->id, path, sizeof(path)));
  kvcached_shutdown(first);
  kvcached_ledger_t left = NULL;
  if (kvcached_ledger_open(path, &left) != KVCACHED_OK) remove_unused(path); /* another version's */
  kvcached_ledger_close(left);
  kvcached_ctx_t ctx = kvcached_init(on_host() ? KVCACHED_DEVICE_HOST : 0);
  if (!ctx) check_failed(__FILE__, __LINE__, "kvcached_init failed");
  const size_t page = kvcached_page_size(ctx);
  size_t available = kvcached_available(ctx);
  uint64_t free_bytes, total;
  CHECK_OK(kvcached_device_memory(ctx, &free_bytes, &total));
  CHECK(free_bytes > 0);
  CHECK_LE(free_bytes, total);
  CHECK(available > 64 * page);
  CHECK_LE(available, total);

  void *p = kvcached_alloc(ctx, 3 * page);
  CHECK(p != NULL);
  if (on_host()) CHECK(all_bytes(p, 3 * page, 0));
  kvcached_set_limit(ctx, 10 * page);
  CHECK_EQ(stats_of(ctx).limit, 10 * page);
  CHECK_EQ(kvcached_available(ctx), 7 * page);
  CHECK(kvcached_alloc(ctx, 8 * page) == NULL);
  CHECK(*kvcached_last_error());
  void *q = kvcached_alloc(ctx, 7 * page);
  CHECK(q != NULL);
  CHECK_EQ(kvcached_available(ctx), 0);
  kvcached_set_limit(ctx, page); /* what is in use stays in use */
  CHECK_EQ(kvcached_available(ctx), 0);
  CHECK_EQ(stats_of(ctx).mapped, 10 * page);
  if (on_host()) memset(q, 'q', 7 * page);
  kvcached_free(ctx, q);
  kvcached_set_limit(ctx, SIZE_MAX);
  CHECK_EQ(stats_of(ctx).limit, UINT64_MAX);
  CHECK(kvcached_available(ctx) > 64 * page);
  q = kvcached_alloc(ctx, 20 * page);
  CHECK(q != NULL);
  kvcached_free(ctx, NULL);
  kvcached_shutdown(ctx); /* frees what is left */
  if (on_host()) CHECK(!accessible(q));
  kvcached_shutdown(NULL);
  if (!on_host() && getenv("FAKE_CUDA_MEMORY")) remove_unused(path); /* of a device that is none */
}

TEST(api, nothing_of_null) {
  CHECK_EQ(kvcached_available(NULL), 0);
  CHECK(kvcached_alloc(NULL, 1) == NULL);
  kvcached_free(NULL, NULL);
  kvcached_set_limit(NULL, 0);
  CHECK_EQ(kvcached_page_size(NULL), 0);
  CHECK(kvcached_region_base(NULL) == NULL);
  CHECK_EQ(kvcached_region_size(NULL) + kvcached_region_page_size(NULL), 0);
  kvcached_unreserve(NULL);
  kvcached_ledger_close(NULL);
  CHECK(kvcached_ledger_path(NULL) == NULL);
  size_t n;
  int ensured;
  kvcached_stats_t s = {.struct_size = sizeof(s)};
  uint64_t a, b;
  CHECK_IS(kvcached_enter(NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_leave(NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_set_queued(NULL, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_set_fixed(NULL, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ensure(NULL, 0, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_prepare(NULL, 0, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_release(NULL, 0, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_trim(NULL, 0, &n), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_mapped_run(NULL, 0, 1, &n, &ensured), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_read(NULL, 0, &n, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_write(NULL, 0, &n, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_clear(NULL, 0, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_set_reload(NULL, NULL, NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_prepare_sleep(NULL, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_sleep(NULL, 1, 0, NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_wake(NULL, 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_trim_host(NULL, 0, NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_stats(NULL, &s), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_region_stats(NULL, &s), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_device_memory(NULL, &a, &b), KVCACHED_E_INVAL);
}

/* ---- limits of a context ---- */

TEST(api, available_is_the_least_of_all) {
  const size_t page = test_page();
  kvcached_options_t o;
  test_options(&o);
  const char *path = scratch("available");
  o.ledger_path = path;
  o.group = "g";
  o.limit = 50 * page;
  kvcached_ctx_t a = open_with(&o);
  kvcached_ctx_t b = open_with(&o);
  kvcached_region_t r = reserve(a, KVCACHED_KV, 60 * page);
  CHECK_OK(kvcached_ensure(r, 0, 20 * page));
  CHECK_EQ(kvcached_available(a), 30 * page);
  CHECK_EQ(kvcached_available(b), 30 * page);
  kvcached_ledger_t l;
  CHECK_OK(kvcached_ledger_open(path, &l));
  CHECK_OK(kvcached_ledger_set_limit(l, NULL, 26 * page, 0, NULL)); /* the card */
  CHECK_EQ(kvcached_available(b), 6 * page);
  CHECK_OK(kvcached_ledger_set_limit(l, "g", 24 * page, 0, NULL));
  CHECK_EQ(kvcached_available(b), 4 * page);
  CHECK_EQ(stats_of(b).card_limit, 26 * page);
  CHECK_EQ(stats_of(b).card_charge, 20 * page);
  CHECK_EQ(stats_of(b).limit, 24 * page);
  kvcached_ledger_close(l);
  kvcached_shutdown(b);
  kvcached_shutdown(a);

  test_options(&o); /* the device's own memory, less the headroom */
  o.headroom = UINT64_MAX / 2;
  a = open_with(&o);
  CHECK_EQ(kvcached_available(a), 0);
  kvcached_shutdown(a);
}

TEST(api, set_limit_drains_what_is_idle) {
  const size_t page = test_page();
  for (int with_ledger = 0; with_ledger < 2; with_ledger++) {
    kvcached_options_t o;
    test_options(&o);
    if (with_ledger) o.ledger_path = scratch("drain");
    kvcached_ctx_t ctx = open_with(&o);
    kvcached_region_t r = reserve(ctx, KVCACHED_KV, 32 * page), gone = reserve(ctx, KVCACHED_KV, 8 * page);
    CHECK_OK(kvcached_ensure(r, 0, 20 * page));
    CHECK_OK(kvcached_ensure(gone, 0, 8 * page));
    put(r, 0, 'd', 20 * page);
    kvcached_unreserve(gone); /* pooled, where there is a pool */
    CHECK_OK(kvcached_release(r, 12 * page, 8 * page));
    kvcached_set_limit(ctx, 16 * page);
    kvcached_stats_t s = stats_of(ctx);
    CHECK_LE(s.mapped + s.pooled, 16 * page);
    CHECK_LE(12 * page, s.mapped);
    CHECK_EQ(s.limit, 16 * page);
    check_context(ctx);
    kvcached_set_limit(ctx, 0); /* all that is idle; what is in use stays */
    s = stats_of(ctx);
    CHECK_EQ(s.mapped, 12 * page);
    CHECK_EQ(s.idle + s.pooled, 0);
    CHECK(holds(r, 0, 'd', 12 * page));
    CHECK_IS(kvcached_ensure(r, 12 * page, 1), KVCACHED_E_LIMIT);
    check_context(ctx);
    CHECK_OK(kvcached_enter(ctx)); /* from inside the gate as well */
    kvcached_set_limit(ctx, SIZE_MAX);
    CHECK_OK(kvcached_ensure(r, 12 * page, 8 * page));
    CHECK_OK(kvcached_release(r, 12 * page, 8 * page));
    kvcached_set_limit(ctx, 13 * page);
    CHECK_LE(stats_of(ctx).mapped, 13 * page);
    CHECK_OK(kvcached_leave(ctx));
    check_context(ctx);
    kvcached_shutdown(ctx);
  }
}
