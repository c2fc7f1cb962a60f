/* What backend.h promises, of the backend under test, by its table alone. */
#include "support.h"

#include "backend.h"
#include "fault.h"
#include "runner.h"

#include <pthread.h>

typedef struct bench {
  const kvc_backend *b;
  kvc_device *d;
  size_t page;
  fault_held before;
} bench;

static kvc_device_options plain_options(void) {
  kvc_device_options o = {0};
  if (strcmp(test_backend_name(), "host-2m") == 0) o.page_size = 2 * MIB;
  return o;
}

static const kvc_backend *table(void) {
  const kvc_backend *b = kvc_backend_get(on_host() ? KVCACHED_BACKEND_HOST : KVCACHED_BACKEND_CUDA);
  CHECK(b != NULL);
  return b;
}

static bench begin(void) {
  bench t = {.b = table(), .before = fault_now()};
  kvc_device_options o = plain_options();
  CHECK_OK(t.b->open(&o, &t.d));
  t.page = t.d->page_size;
  return t;
}

/* Everything made has been given back. */
static void finish(bench *t) {
  t->b->close(t->d);
  fault_held now = fault_now();
  CHECK(memcmp(&now, &t->before, sizeof(now)) == 0);
}

static kvc_space space_of(bench *t, size_t pages) {
  kvc_space s;
  CHECK_OK(t->b->reserve(t->d, pages * t->page, t->page, &s));
  return s;
}

static kvc_handle fill(bench *t, kvc_space *s, size_t page, size_t pages) {
  kvc_handle h;
  CHECK_OK(t->b->create(t->d, pages * t->page, &h));
  CHECK_OK(t->b->map(t->d, s, page * t->page, pages * t->page, h));
  CHECK_OK(t->b->access(t->d, s, page * t->page, pages * t->page));
  return h;
}

/* Takes runs out again and ends the handles, which without pools the unmap does. */
static void end(bench *t, size_t size, kvc_handle h) {
  if (t->b->pools) CHECK_OK(t->b->destroy(t->d, size, h));
}
static void empty(bench *t, kvc_space *s, size_t page, size_t pages, kvc_handle h) {
  CHECK_OK(t->b->unmap(t->d, s, page * t->page, pages * t->page));
  end(t, pages * t->page, h);
}

static void set_bytes(bench *t, kvc_lane lane, kvc_space *s, size_t off, int byte, size_t len) {
  char *buf = malloc(len);
  CHECK(buf != NULL);
  memset(buf, byte, len);
  CHECK_OK(t->b->write(t->d, lane, s, off, buf, len));
  CHECK_OK(t->b->finish(t->d, lane));
  free(buf);
}

static int has_bytes(bench *t, kvc_lane lane, kvc_space *s, size_t off, unsigned char byte, size_t len) {
  char *buf = malloc(len);
  CHECK(buf != NULL);
  memset(buf, ~byte, len);
  CHECK_OK(t->b->read(t->d, lane, s, off, buf, len));
  CHECK_OK(t->b->finish(t->d, lane));
  int yes = all_bytes(buf, len, byte);
  free(buf);
  return yes;
}

TEST_HOST(backend, numbers) {
  CHECK(kvc_backend_get(KVCACHED_BACKEND_HOST) != NULL);
  CHECK(kvc_backend_get(KVCACHED_BACKEND_CUDA) != NULL);
  CHECK(kvc_backend_get(-1) == NULL && kvc_backend_get(2) == NULL);
  CHECK_TEXT(kvc_backend_get(KVCACHED_BACKEND_HOST)->name, "host");
  CHECK_TEXT(kvc_backend_get(KVCACHED_BACKEND_CUDA)->name, "cuda");
}

TEST(backend, description) {
  bench t = begin();
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
  finish(&t);
}

TEST(backend, page_sizes) {
  const kvc_backend *b = table();
  bench t = begin();
  kvc_device *d = t.d;
  size_t page = t.page;
  kvc_device_options o = plain_options();
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
  finish(&t);
}

TEST(backend, addresses_are_aligned) {
  bench t = begin();
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
  kvc_handle h = fill(&t, &s[3], 6, 1);
  set_bytes(&t, KVC_LANE_CALLER, &s[3], 6 * t.page, 'x', t.page);
  CHECK(has_bytes(&t, KVC_LANE_CALLER, &s[3], 6 * t.page, 'x', t.page));
  empty(&t, &s[3], 6, 1, h);
  for (size_t i = 0; i < 6; i++) {
    t.b->unreserve(t.d, &s[i]);
    CHECK(s[i].base == NULL && s[i].size == 0);
  }
  finish(&t);
}

TEST(backend, too_many_addresses) {
  bench t = begin();
  kvc_space s;
  CHECK_IS(t.b->reserve(t.d, SIZE_MAX / t.page * t.page, t.page, &s), KVCACHED_E_NOMEM);
  CHECK(s.base == NULL);
  CHECK_DETAIL("addresses");
  int err = t.b->reserve(t.d, (size_t)1 << 60, 3 * t.page, &s);
  CHECK(err == KVCACHED_E_NOMEM || (!on_host() && err == KVCACHED_E_DEVICE));
  CHECK(s.base == NULL);
  finish(&t);
}

/* Copies and zeros at offsets and lengths that are multiples of nothing, on either lane. */
TEST(backend, content) {
  bench t = begin();
  kvc_space s = space_of(&t, 8);
  kvc_handle h = fill(&t, &s, 2, 3);
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
  empty(&t, &s, 2, 3, h);
  t.b->unreserve(t.d, &s);
  finish(&t);
}

/* Several handles of several sizes: one access and one unmap for the run, and the neighbours stay. */
TEST(backend, runs) {
  bench t = begin();
  kvc_space s = space_of(&t, 16);
  static const size_t size[] = {1, 4, 2, 1};
  kvc_handle h[4];
  size_t at = 3;
  for (size_t i = 0; i < 4; i++) {
    CHECK_OK(t.b->create(t.d, size[i] * t.page, &h[i]));
    CHECK_OK(t.b->map(t.d, &s, at * t.page, size[i] * t.page, h[i]));
    at += size[i];
  }
  CHECK_OK(t.b->access(t.d, &s, 3 * t.page, 8 * t.page));
  kvc_handle left = fill(&t, &s, 1, 1), right = fill(&t, &s, 11, 1);
  set_bytes(&t, KVC_LANE_CALLER, &s, 3 * t.page, 'r', 8 * t.page);
  set_bytes(&t, KVC_LANE_CALLER, &s, t.page, 'n', t.page);
  set_bytes(&t, KVC_LANE_CALLER, &s, 11 * t.page, 'n', t.page);
  CHECK(has_bytes(&t, KVC_LANE_CALLER, &s, 3 * t.page, 'r', 8 * t.page));
  CHECK_OK(t.b->unmap(t.d, &s, 3 * t.page, 8 * t.page));
  for (size_t i = 0; i < 4; i++) end(&t, size[i] * t.page, h[i]);
  CHECK(has_bytes(&t, KVC_LANE_CALLER, &s, t.page, 'n', t.page));
  CHECK(has_bytes(&t, KVC_LANE_CALLER, &s, 11 * t.page, 'n', t.page));
  if (on_host()) CHECK(!accessible((char *)s.base + 3 * t.page));
  empty(&t, &s, 1, 1, left);
  empty(&t, &s, 11, 1, right);

  /* A run without access can be taken out too. */
  kvc_handle none;
  CHECK_OK(t.b->create(t.d, 2 * t.page, &none));
  CHECK_OK(t.b->map(t.d, &s, 5 * t.page, 2 * t.page, none));
  CHECK_OK(t.b->unmap(t.d, &s, 5 * t.page, 2 * t.page));
  end(&t, 2 * t.page, none);
  t.b->unreserve(t.d, &s);
  finish(&t);
}

/* pools: a handle keeps its content from one address to another. Else memory comes with access, zero. */
TEST(backend, handles) {
  bench t = begin();
  kvc_space s = space_of(&t, 4), other = space_of(&t, 4);
  kvc_handle h = fill(&t, &s, 0, 1);
  set_bytes(&t, KVC_LANE_CALLER, &s, 0, 'h', t.page);
  CHECK_OK(t.b->unmap(t.d, &s, 0, t.page));
  if (t.b->pools) {
    CHECK_OK(t.b->map(t.d, &other, 3 * t.page, t.page, h));
    CHECK_OK(t.b->access(t.d, &other, 3 * t.page, t.page));
    CHECK(has_bytes(&t, KVC_LANE_CALLER, &other, 3 * t.page, 'h', t.page));
  } else {
    h = fill(&t, &other, 3, 1);
  }
  if (t.b->fresh_is_zero) {
    kvc_handle again = fill(&t, &s, 0, 1);
    CHECK(has_bytes(&t, KVC_LANE_CALLER, &s, 0, 0, t.page));
    empty(&t, &s, 0, 1, again);
  } else if (getenv("FAKE_CUDA_MEMORY")) { /* the fake driver's is dirty, or missing zeros would not show */
    kvc_handle again = fill(&t, &s, 0, 1);
    CHECK(has_bytes(&t, KVC_LANE_CALLER, &s, 0, 0xA5, t.page));
    empty(&t, &s, 0, 1, again);
  }
  empty(&t, &other, 3, 1, h);
  t.b->unreserve(t.d, &s);
  t.b->unreserve(t.d, &other);
  finish(&t);
}

TEST(backend, figures) {
  bench t = begin();
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
  finish(&t);
}

TEST_CUDA(backend, more_than_there_is) {
  bench t = begin();
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
  finish(&t);
}

/* What the driver refuses is an error that changes nothing, and the device works on. */
TEST_CUDA(backend, refusals) {
  bench t = begin();
  kvc_space s = space_of(&t, 8);
  kvc_handle h = fill(&t, &s, 0, 2), g = fill(&t, &s, 3, 1), more;
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
  empty(&t, &s, 0, 2, h);
  empty(&t, &s, 3, 1, g);
  CHECK_OK(t.b->quiesce(t.d));
  t.b->unreserve(t.d, &s);
  finish(&t);
}

TEST(backend, host_memory) {
  bench t = begin();
  kvc_space s = space_of(&t, 4);
  kvc_handle h = fill(&t, &s, 0, 4);
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
  empty(&t, &s, 0, 4, h);
  t.b->unreserve(t.d, &s);
  finish(&t);
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
    kvc_handle h = fill(t, w->s, at, n);
    CHECK_OK(t->b->zero(t->d, w->lane, w->s, at * t->page, n * t->page));
    CHECK_OK(t->b->finish(t->d, w->lane));
    CHECK(has_bytes(t, w->lane, w->s, at * t->page, 0, n * t->page));
    set_bytes(t, w->lane, w->s, at * t->page, byte, n * t->page);
    kvc_space own = space_of(t, 2);
    CHECK(has_bytes(t, w->lane, w->s, at * t->page, (unsigned char)byte, n * t->page));
    t->b->unreserve(t->d, &own);
    empty(t, w->s, at, n, h);
  }
  return NULL;
}

TEST(backend, two_threads) {
  bench t = begin();
  kvc_space s = space_of(&t, 16);
  half caller = {&t, &s, KVC_LANE_CALLER}, helper = {&t, &s, KVC_LANE_HELPER};
  pthread_t thread;
  CHECK_EQ(pthread_create(&thread, NULL, work, &helper), 0);
  (void)work(&caller);
  CHECK_EQ(pthread_join(thread, NULL), 0);
  t.b->unreserve(t.d, &s);
  finish(&t);
}

/* Many opened one after the other and side by side: each is whole, nothing adds up. */
TEST(backend, devices_side_by_side) {
  bench t = begin();
  kvc_device_options o = plain_options();
  for (int round = 0; round < 10; round++) {
    kvc_device *d[4];
    for (int i = 0; i < 4; i++) {
      CHECK_OK(t.b->open(&o, &d[i]));
      CHECK_TEXT(d[i]->id, t.d->id);
    }
    for (int i = 0; i < 4; i++) t.b->close(d[(i + round) % 4]);
  }
  kvc_space s = space_of(&t, 1); /* the first still works */
  kvc_handle h = fill(&t, &s, 0, 1);
  set_bytes(&t, KVC_LANE_CALLER, &s, 0, 'z', t.page);
  CHECK(has_bytes(&t, KVC_LANE_CALLER, &s, 0, 'z', t.page));
  empty(&t, &s, 0, 1, h);
  t.b->unreserve(t.d, &s);
  finish(&t);
}

/* Calls fail when they are told to, and only then; what fails does nothing. */
TEST(backend, faults) {
  bench t = begin();
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
  finish(&t);
}
