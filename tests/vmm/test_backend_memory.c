/* What backend.h promises of memory, by the backend's table alone: addresses, handles, content, host memory.
 */
#include "backend_kit.h"

#include <pthread.h>

TEST(backend, addresses_are_aligned) {
  bench t = bench_begin();
  static const size_t pages[] = {1, 2, 3, 5, 8, 16};
  kvc_space s[6];
  for (size_t i = 0; i < 6; i++) {
    size_t align = pages[i] * t.page;
    CHECK_OK(t.b->reserve(t.d, 7 * t.page, align, &s[i]));
    CHECK_EQ((uintptr_t)s[i].base % align, 0);
    CHECK_EQ(s[i].size, 7 * t.page);
    CHECK((char *)s[i].base >= (char *)s[i].raw);
    CHECK((char *)s[i].base + s[i].size <
          (char *)s[i].raw + s[i].raw_size); /* what lies behind is ours too */
    for (size_t k = 0; k < i; k++) {         /* apart, with a gap that faults behind each */
      char *a = s[i].base, *b = s[k].base;
      CHECK(a + s[i].size < b || b + s[k].size < a);
    }
    if (on_host()) CHECK(!accessible(s[i].base));
  }
  /* The last page is as good as the others. */
  kvc_handle h = bench_fill(&t, &s[3], 6, 1);
  set_bytes(&t, KVC_LANE_CALLER, &s[3], 6 * t.page, 'x', t.page);
  CHECK(has_bytes(&t, KVC_LANE_CALLER, &s[3], 6 * t.page, 'x', t.page));
  bench_empty(&t, &s[3], 6, 1, h);
  for (size_t i = 0; i < 6; i++) {
    t.b->unreserve(t.d, &s[i]);
    CHECK(s[i].base == NULL && s[i].size == 0);
  }
  bench_end(&t);
}

TEST(backend, too_many_addresses) {
  bench t = bench_begin();
  kvc_space s;
  CHECK_IS(t.b->reserve(t.d, SIZE_MAX / t.page * t.page, t.page, &s), KVCACHED_E_NOMEM);
  CHECK(s.base == NULL);
  CHECK_DETAIL("addresses");
  int err = t.b->reserve(t.d, (size_t)1 << 60, 3 * t.page, &s);
  CHECK(err == KVCACHED_E_NOMEM || (!on_host() && err == KVCACHED_E_DEVICE));
  CHECK(s.base == NULL);
  bench_end(&t);
}

/* Copies and zeros at offsets and lengths that are multiples of nothing, on either lane. */
TEST(backend, content) {
  bench t = bench_begin();
  kvc_space s = bench_space(&t, 8);
  kvc_handle h = bench_fill(&t, &s, 2, 3);
  size_t base = 2 * t.page, len = 3 * t.page;
  for (int lane = 0; lane < KVC_LANES; lane++) {
    kvc_lane l = (kvc_lane)lane;
    set_bytes(&t, l, &s, base, 'a', len);
    set_bytes(&t, l, &s, base + 7, 'b', t.page + 1);
    CHECK(has_bytes(&t, l, &s, base, 'a', 7));
    CHECK(has_bytes(&t, l, &s, base + 7, 'b', t.page + 1));
    CHECK(has_bytes(&t, l, &s, base + 8 + t.page, 'a', len - 8 - t.page));
    CHECK_OK(t.b->zero(t.d, l, &s, base + 3, 2 * t.page + 5));
    CHECK_OK(t.b->finish(t.d, l));
    CHECK(has_bytes(&t, l, &s, base, 'a', 3));
    CHECK(has_bytes(&t, l, &s, base + 3, 0, 2 * t.page + 5));
    CHECK(has_bytes(&t, l, &s, base + 8 + 2 * t.page, 'a', t.page - 8));
  }
  /* Many in flight, one wait: in order. */
  char *buf = malloc(len);
  CHECK(buf != NULL);
  memset(buf, 'c', len);
  for (size_t i = 0; i < len; i += t.page / 4)
    CHECK_OK(t.b->write(t.d, KVC_LANE_CALLER, &s, base + i, buf + i, t.page / 4));
  CHECK_OK(t.b->zero(t.d, KVC_LANE_CALLER, &s, base, t.page));
  CHECK_OK(t.b->finish(t.d, KVC_LANE_CALLER));
  CHECK(has_bytes(&t, KVC_LANE_HELPER, &s, base, 0, t.page));
  CHECK(has_bytes(&t, KVC_LANE_HELPER, &s, base + t.page, 'c', 2 * t.page));
  free(buf);
  CHECK_OK(t.b->quiesce(t.d));
  bench_empty(&t, &s, 2, 3, h);
  t.b->unreserve(t.d, &s);
  bench_end(&t);
}

/* Several handles of several sizes: one access and one unmap for the run, and the neighbours stay. */
TEST(backend, runs) {
  bench t = bench_begin();
  kvc_space s = bench_space(&t, 16);
  static const size_t size[] = {1, 4, 2, 1};
  kvc_handle h[4];
  size_t at = 3;
  for (size_t i = 0; i < 4; i++) {
    CHECK_OK(t.b->create(t.d, size[i] * t.page, &h[i]));
    CHECK_OK(t.b->map(t.d, &s, at * t.page, size[i] * t.page, h[i]));
    at += size[i];
  }
  CHECK_OK(t.b->access(t.d, &s, 3 * t.page, 8 * t.page));
  kvc_handle left = bench_fill(&t, &s, 1, 1), right = bench_fill(&t, &s, 11, 1);
  set_bytes(&t, KVC_LANE_CALLER, &s, 3 * t.page, 'r', 8 * t.page);
  set_bytes(&t, KVC_LANE_CALLER, &s, t.page, 'n', t.page);
  set_bytes(&t, KVC_LANE_CALLER, &s, 11 * t.page, 'n', t.page);
  CHECK(has_bytes(&t, KVC_LANE_CALLER, &s, 3 * t.page, 'r', 8 * t.page));
  CHECK_OK(t.b->unmap(t.d, &s, 3 * t.page, 8 * t.page));
  for (size_t i = 0; i < 4; i++) bench_destroy(&t, size[i] * t.page, h[i]);
  CHECK(has_bytes(&t, KVC_LANE_CALLER, &s, t.page, 'n', t.page));
  CHECK(has_bytes(&t, KVC_LANE_CALLER, &s, 11 * t.page, 'n', t.page));
  if (on_host()) CHECK(!accessible((char *)s.base + 3 * t.page));
  bench_empty(&t, &s, 1, 1, left);
  bench_empty(&t, &s, 11, 1, right);

  /* A run without access can be taken out too. */
  kvc_handle none;
  CHECK_OK(t.b->create(t.d, 2 * t.page, &none));
  CHECK_OK(t.b->map(t.d, &s, 5 * t.page, 2 * t.page, none));
  CHECK_OK(t.b->unmap(t.d, &s, 5 * t.page, 2 * t.page));
  bench_destroy(&t, 2 * t.page, none);
  t.b->unreserve(t.d, &s);
  bench_end(&t);
}

/* pools: a handle keeps its content from one address to another. Else memory comes with access, zero. */
TEST(backend, handles) {
  bench t = bench_begin();
  kvc_space s = bench_space(&t, 4), other = bench_space(&t, 4);
  kvc_handle h = bench_fill(&t, &s, 0, 1);
  set_bytes(&t, KVC_LANE_CALLER, &s, 0, 'h', t.page);
  CHECK_OK(t.b->unmap(t.d, &s, 0, t.page));
  if (t.b->pools) {
    CHECK_OK(t.b->map(t.d, &other, 3 * t.page, t.page, h));
    CHECK_OK(t.b->access(t.d, &other, 3 * t.page, t.page));
    CHECK(has_bytes(&t, KVC_LANE_CALLER, &other, 3 * t.page, 'h', t.page));
  } else {
    h = bench_fill(&t, &other, 3, 1);
  }
  if (t.b->fresh_is_zero) {
    kvc_handle again = bench_fill(&t, &s, 0, 1);
    CHECK(has_bytes(&t, KVC_LANE_CALLER, &s, 0, 0, t.page));
    bench_empty(&t, &s, 0, 1, again);
  } else if (getenv("FAKE_CUDA_MEMORY")) { /* the fake driver's is dirty, or missing zeros would not show */
    kvc_handle again = bench_fill(&t, &s, 0, 1);
    CHECK(has_bytes(&t, KVC_LANE_CALLER, &s, 0, 0xA5, t.page));
    bench_empty(&t, &s, 0, 1, again);
  }
  bench_empty(&t, &other, 3, 1, h);
  t.b->unreserve(t.d, &s);
  t.b->unreserve(t.d, &other);
  bench_end(&t);
}

/* What the driver refuses is an error that changes nothing, and the device works on. */
TEST_CUDA(backend, refusals) {
  bench t = bench_begin();
  kvc_space s = bench_space(&t, 8);
  kvc_handle h = bench_fill(&t, &s, 0, 2), g = bench_fill(&t, &s, 3, 1), more;
  set_bytes(&t, KVC_LANE_CALLER, &s, 0, 'k', 2 * t.page);
  char *buf = malloc(4 * t.page);
  CHECK(buf != NULL);
  CHECK_IS(t.b->read(t.d, KVC_LANE_CALLER, &s, 5 * t.page, buf, t.page), KVCACHED_E_DEVICE); /* a hole */
  CHECK_DETAIL("CUDA_ERROR_INVALID_VALUE");
  CHECK_IS(t.b->zero(t.d, KVC_LANE_CALLER, &s, 5 * t.page, t.page), KVCACHED_E_DEVICE);
  CHECK_OK(t.b->create(t.d, 2 * t.page, &more));
  CHECK_IS(t.b->map(t.d, &s, 0, 2 * t.page, more), KVCACHED_E_DEVICE);           /* there is something */
  CHECK_IS(t.b->map(t.d, &s, 5 * t.page, t.page, more), KVCACHED_E_UNSUPPORTED); /* a part of it */
  CHECK_DETAIL("CUDA_ERROR_NOT_SUPPORTED");
  CHECK_IS(t.b->unmap(t.d, &s, 0, t.page), KVCACHED_E_DEVICE); /* half a handle */
  CHECK_OK(t.b->destroy(t.d, 2 * t.page, more));
  CHECK(has_bytes(&t, KVC_LANE_CALLER, &s, 0, 'k', 2 * t.page));
  free(buf);
  bench_empty(&t, &s, 0, 2, h);
  bench_empty(&t, &s, 3, 1, g);
  CHECK_OK(t.b->quiesce(t.d));
  t.b->unreserve(t.d, &s);
  bench_end(&t);
}

TEST(backend, host_memory) {
  bench t = bench_begin();
  kvc_space s = bench_space(&t, 4);
  kvc_handle h = bench_fill(&t, &s, 0, 4);
  void *p[3];
  static const size_t size[] = {4096, 3 * 4096, 5 * MIB};
  int pinned[3];
  for (size_t i = 0; i < 3; i++) {
    CHECK_OK(t.b->host_alloc(t.d, size[i], &p[i], &pinned[i]));
    CHECK_EQ(pinned[i], !on_host() && !getenv("FAKE_CUDA_NO_PINNED"));
    memset(p[i], 'p', size[i]);
  }
  size_t len = 4 * t.page < size[2] ? 4 * t.page : size[2];
  CHECK_OK(t.b->write(t.d, KVC_LANE_CALLER, &s, 0, p[2], len));
  CHECK_OK(t.b->finish(t.d, KVC_LANE_CALLER));
  memset(p[2], 0, size[2]);
  CHECK_OK(t.b->read(t.d, KVC_LANE_HELPER, &s, 0, p[2], len));
  CHECK_OK(t.b->finish(t.d, KVC_LANE_HELPER));
  CHECK(all_bytes(p[2], len, 'p'));
  for (size_t i = 0; i < 3; i++) CHECK_OK(t.b->host_free(t.d, p[i], size[i], pinned[i]));
  void *none = &t;
  int is_pinned;
  CHECK_IS(t.b->host_alloc(t.d, (size_t)1 << 60, &none, &is_pinned), KVCACHED_E_NOMEM);
  CHECK(none == NULL);
  bench_empty(&t, &s, 0, 4, h);
  t.b->unreserve(t.d, &s);
  bench_end(&t);
}

/* Two threads, each with its lane and its half of one space, and each with spaces of its own. */
typedef struct half {
  bench *t;
  kvc_space *s;
  kvc_lane lane;
} half;

static void *work(void *arg) {
  half *w = arg;
  bench *t = w->t;
  size_t first = w->lane == KVC_LANE_CALLER ? 0 : 8;
  for (int round = 0; round < 20; round++) {
    size_t at = first + (size_t)round % 5, n = 1 + (size_t)round % 3;
    int byte = 'A' + (int)w->lane * 32 + round;
    kvc_handle h = bench_fill(t, w->s, at, n);
    CHECK_OK(t->b->zero(t->d, w->lane, w->s, at * t->page, n * t->page));
    CHECK_OK(t->b->finish(t->d, w->lane));
    CHECK(has_bytes(t, w->lane, w->s, at * t->page, 0, n * t->page));
    set_bytes(t, w->lane, w->s, at * t->page, byte, n * t->page);
    kvc_space own = bench_space(t, 2);
    CHECK(has_bytes(t, w->lane, w->s, at * t->page, (unsigned char)byte, n * t->page));
    t->b->unreserve(t->d, &own);
    bench_empty(t, w->s, at, n, h);
  }
  return NULL;
}

TEST(backend, two_threads) {
  bench t = bench_begin();
  kvc_space s = bench_space(&t, 16);
  half caller = {&t, &s, KVC_LANE_CALLER}, helper = {&t, &s, KVC_LANE_HELPER};
  pthread_t thread;
  CHECK_EQ(pthread_create(&thread, NULL, work, &helper), 0);
  (void)work(&caller);
  CHECK_EQ(pthread_join(thread, NULL), 0);
  t.b->unreserve(t.d, &s);
  bench_end(&t);
}
