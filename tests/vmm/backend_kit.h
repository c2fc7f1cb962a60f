/* For the tests of backend.h: a device, opened by the backend's table alone, and memory of it. */
#ifndef BACKEND_KIT_H
#define BACKEND_KIT_H

#include "backend.h"
#include "fault.h"
#include "support.h"

/* The backend under test, and the options of a device with the test's pages. */
const kvc_backend *bench_table(void);
kvc_device_options bench_options(void);

typedef struct bench {
  const kvc_backend *b;
  kvc_device *d;
  size_t page;
  fault_held before;
} bench;
bench bench_begin(void);
void bench_end(bench *t); /* everything made has been given back */

/* Addresses of so many pages. */
kvc_space bench_space(bench *t, size_t pages);

/* One new handle under pages of them, with access; and takes it out again. */
kvc_handle bench_fill(bench *t, kvc_space *s, size_t page, size_t pages);
void bench_empty(bench *t, kvc_space *s, size_t page, size_t pages, kvc_handle h);

/* Ends a handle that was taken out, which without pools the unmap does. */
void bench_destroy(bench *t, size_t size, kvc_handle h);

/* Copies there and back, waited for. */
void set_bytes(bench *t, kvc_lane lane, kvc_space *s, size_t off, int byte, size_t len);
int has_bytes(bench *t, kvc_lane lane, kvc_space *s, size_t off, unsigned char byte, size_t len);

#endif
