/* What backend.h promises, of the backend under test, by its table alone: devices, figures, faults.
   test_backend_memory.c: addresses, handles and content. */
#include "backend_kit.h"

TEST_HOST(backend, numbers) {
  CHECK(kvc_backend_get(KVCACHED_BACKEND_HOST) != NULL);
  CHECK(kvc_backend_get(KVCACHED_BACKEND_CUDA) != NULL);
  CHECK(kvc_backend_get(-1) == NULL && kvc_backend_get(2) == NULL);
  CHECK_TEXT(kvc_backend_get(KVCACHED_BACKEND_HOST)->name, "host");
  CHECK_TEXT(kvc_backend_get(KVCACHED_BACKEND_CUDA)->name, "cuda");
}

TEST(backend, description) {
  bench t = bench_begin();
  const kvc_device *d = t.d;
  CHECK_TEXT(t.b->name, on_host() ? "host" : "cuda");
  CHECK(d->name[0] != 0);
  CHECK(d->granularity > 0 && d->page_size % d->granularity == 0 && d->large_page % d->page_size == 0);
  if (on_host()) {
    CHECK_TEXT(d->id, "host");
    CHECK_EQ(d->page_size, test_page());
    CHECK_EQ(d->large_page, 2 * MIB);
    CHECK(d->edits_anytime);
  } else {
    /* 8-4-4-4-12 digits, lower case: what nvidia-smi prints behind "GPU-" */
    CHECK_EQ(strlen(d->id), 36);
    for (size_t i = 0; i < 36; i++) {
      int dash = i == 8 || i == 13 || i == 18 || i == 23;
      CHECK(dash ? d->id[i] == '-' : strchr("0123456789abcdef", d->id[i]) != NULL);
    }
    CHECK(d->large_page <= 256 * MIB);
  }
  bench_end(&t);
}

TEST(backend, page_sizes) {
  const kvc_backend *b = bench_table();
  bench t = bench_begin();
  kvc_device *d = t.d;
  size_t page = t.page;
  kvc_device_options o = bench_options();
  o.page_size = page + 512;
  CHECK_IS(b->open(&o, &d), KVCACHED_E_INVAL);
  CHECK(d == NULL);
  CHECK_DETAIL("page_size");
  o.page_size = page;
  o.large_page = page + 512;
  CHECK_IS(b->open(&o, &d), KVCACHED_E_INVAL);
  CHECK_DETAIL("large_page");
  o.large_page = 258 * MIB;
  CHECK_IS(b->open(&o, &d), KVCACHED_E_INVAL);
  CHECK_DETAIL("large_page");
  o.large_page = 3 * page; /* smaller than would be sensible, for tests */
  CHECK_OK(b->open(&o, &d));
  CHECK_EQ(d->page_size, page);
  CHECK_EQ(d->large_page, 3 * page);
  b->close(d);
  o.large_page = 256 * MIB;
  CHECK_OK(b->open(&o, &d));
  CHECK_EQ(d->large_page, 256 * MIB);
  b->close(d);
  bench_end(&t);
}

TEST(backend, figures) {
  bench t = bench_begin();
  uint64_t free_bytes = 0, total = 0, less = 0;
  CHECK_OK(t.b->memory(t.d, &free_bytes, &total));
  CHECK(free_bytes > 0);
  CHECK_LE(free_bytes, total);
  if (!on_host()) {
    kvc_handle h;
    size_t size = 16 * t.page;
    CHECK_OK(t.b->create(t.d, size, &h));
    CHECK_OK(t.b->memory(t.d, &less, &total));
    if (getenv("FAKE_CUDA_MEMORY")) CHECK_EQ(free_bytes - less, size);
    CHECK_LE(less, free_bytes);
    CHECK_OK(t.b->destroy(t.d, size, h));
  }
  bench_end(&t);
}

TEST_CUDA(backend, more_than_there_is) {
  bench t = bench_begin();
  uint64_t free_bytes, total, after;
  CHECK_OK(t.b->memory(t.d, &free_bytes, &total));
  kvc_handle h = 17;
  CHECK_IS(t.b->create(t.d, (size_t)total / t.page * t.page + t.page, &h), KVCACHED_E_NOMEM);
  CHECK_EQ(h, 17);
  CHECK_DETAIL("CUDA_ERROR_OUT_OF_MEMORY");
  CHECK_DETAIL(t.d->name);
  CHECK_OK(t.b->create(t.d, t.page, &h));
  CHECK_OK(t.b->destroy(t.d, t.page, h));
  CHECK_OK(t.b->memory(t.d, &after, &total));
  if (getenv("FAKE_CUDA_MEMORY")) CHECK_EQ(after, free_bytes);
  bench_end(&t);
}

/* Many opened one after the other and side by side: each is whole, nothing adds up. */
TEST(backend, devices_side_by_side) {
  bench t = bench_begin();
  kvc_device_options o = bench_options();
  for (int round = 0; round < 10; round++) {
    kvc_device *d[4];
    for (int i = 0; i < 4; i++) {
      CHECK_OK(t.b->open(&o, &d[i]));
      CHECK_TEXT(d[i]->id, t.d->id);
    }
    for (int i = 0; i < 4; i++) t.b->close(d[(i + round) % 4]);
  }
  kvc_space s = bench_space(&t, 1); /* the first still works */
  kvc_handle h = bench_fill(&t, &s, 0, 1);
  set_bytes(&t, KVC_LANE_CALLER, &s, 0, 'z', t.page);
  CHECK(has_bytes(&t, KVC_LANE_CALLER, &s, 0, 'z', t.page));
  bench_empty(&t, &s, 0, 1, h);
  t.b->unreserve(t.d, &s);
  bench_end(&t);
}

/* Calls fail when they are told to, and only then; what fails does nothing. */
TEST(backend, faults) {
  bench t = bench_begin();
  kvc_handle h = 5;
  fault_set(FAULT_CREATE, 2, KVCACHED_E_NOMEM);
  CHECK_OK(t.b->create(t.d, t.page, &h));
  CHECK_OK(t.b->destroy(t.d, t.page, h));
  unsigned calls = fault_calls(FAULT_CREATE), failures = fault_failures(FAULT_CREATE);
  CHECK_IS(t.b->create(t.d, t.page, &h), KVCACHED_E_NOMEM);
  CHECK_DETAIL("injected failure of create");
  CHECK_OK(t.b->create(t.d, t.page, &h)); /* once */
  CHECK_OK(t.b->destroy(t.d, t.page, h));
  CHECK_EQ(fault_calls(FAULT_CREATE) - calls, 2);
  CHECK_EQ(fault_failures(FAULT_CREATE) - failures, 1);
  fault_every(FAULT_QUIESCE, 3, KVCACHED_E_DEVICE);
  for (int i = 1; i <= 9; i++) CHECK_IS(t.b->quiesce(t.d), i % 3 ? KVCACHED_OK : KVCACHED_E_DEVICE);
  fault_clear();
  fault_set(FAULT_ANY, 3, KVCACHED_E_SYSTEM);
  CHECK_OK(t.b->quiesce(t.d));
  CHECK_OK(t.b->finish(t.d, KVC_LANE_CALLER));
  CHECK_IS(t.b->finish(t.d, KVC_LANE_HELPER), KVCACHED_E_SYSTEM);
  CHECK_OK(t.b->quiesce(t.d));
  fault_delay(FAULT_FINISH, 30);
  int64_t start = now_ms();
  CHECK_OK(t.b->finish(t.d, KVC_LANE_CALLER));
  CHECK_LE(30, now_ms() - start);
  fault_clear();
  bench_end(&t);
}
