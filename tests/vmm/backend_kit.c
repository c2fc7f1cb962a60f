/* A device, opened by the backend's table alone, and memory of it. */
#include "backend_kit.h"

#include "runner.h"

kvc_device_options bench_options(void) {
  kvc_device_options o = {0};
  if (strcmp(test_backend_name(), "host-2m") == 0) o.page_size = 2 * MIB;
  return o;
}

const kvc_backend *bench_table(void) {
  const kvc_backend *b = kvc_backend_get(on_host() ? KVCACHED_BACKEND_HOST : KVCACHED_BACKEND_CUDA);
  CHECK(b != NULL);
  return b;
}

bench bench_begin(void) {
  bench t = {.b = bench_table(), .before = fault_now()};
  kvc_device_options o = bench_options();
  CHECK_OK(t.b->open(&o, &t.d));
  t.page = t.d->page_size;
  return t;
}

void bench_end(bench *t) {
  t->b->close(t->d);
  fault_held now = fault_now();
  CHECK(memcmp(&now, &t->before, sizeof(now)) == 0);
}

kvc_space bench_space(bench *t, size_t pages) {
  kvc_space s;
  CHECK_OK(t->b->reserve(t->d, pages * t->page, t->page, &s));
  return s;
}

kvc_handle bench_fill(bench *t, kvc_space *s, size_t page, size_t pages) {
  kvc_handle h;
  CHECK_OK(t->b->create(t->d, pages * t->page, &h));
  CHECK_OK(t->b->map(t->d, s, page * t->page, pages * t->page, h));
  CHECK_OK(t->b->access(t->d, s, page * t->page, pages * t->page));
  return h;
}

void bench_destroy(bench *t, size_t size, kvc_handle h) {
  if (t->b->pools) CHECK_OK(t->b->destroy(t->d, size, h));
}

void bench_empty(bench *t, kvc_space *s, size_t page, size_t pages, kvc_handle h) {
  CHECK_OK(t->b->unmap(t->d, s, page * t->page, pages * t->page));
  bench_destroy(t, pages * t->page, h);
}

void set_bytes(bench *t, kvc_lane lane, kvc_space *s, size_t off, int byte, size_t len) {
  char *buf = malloc(len);
  CHECK(buf != NULL);
  memset(buf, byte, len);
  CHECK_OK(t->b->write(t->d, lane, s, off, buf, len));
  CHECK_OK(t->b->finish(t->d, lane));
  free(buf);
}

int has_bytes(bench *t, kvc_lane lane, kvc_space *s, size_t off, unsigned char byte, size_t len) {
  char *buf = malloc(len);
  CHECK(buf != NULL);
  memset(buf, ~byte, len);
  CHECK_OK(t->b->read(t->d, lane, s, off, buf, len));
  CHECK_OK(t->b->finish(t->d, lane));
  int yes = all_bytes(buf, len, byte);
  free(buf);
  return yes;
}
