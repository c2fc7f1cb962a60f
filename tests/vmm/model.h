/* A model of a context, which random calls of the library are compared with (test_property.c). */
#ifndef MODEL_H
#define MODEL_H

#include "support.h"

enum { REGIONS = 6, MAX_PAGES = 40, CAPACITY = 90 };
enum { ABSENT = -1, UNKNOWN = 1000 }; /* tags of pages not in use, and of such as hold who knows what */

typedef struct model_region {
  kvcached_region_t r; /* NULL: there is none */
  void *allocated;     /* what kvcached_alloc returned */
  int kind, asleep;
  size_t n, unit;
  int tag[MAX_PAGES]; /* content of a page in use, ABSENT or UNKNOWN */
} model_region;

typedef struct model {
  kvcached_ctx_t ctx;
  size_t page;
  uint64_t limit, host_limit;
  model_region region[REGIONS];
  uint32_t seed;
  unsigned refused, done;
  int faults, failed; /* calls of the backend fail; the last call of the library did */
} model;

/* A random number below n. */
uint32_t pick(model *m, uint32_t n);

/* Bytes of a page, and of all pages in use that have memory. */
uint64_t page_bytes(const model_region *q, size_t i);
uint64_t in_use(const model *m);

/* Whether so many bytes more are within the limit. */
int fits(const model *m, uint64_t more);

/* What the library says it has memory under or in its pool. */
uint64_t held(const model *m);

/* Before a call and after it: somewhere in it the backend fails, once or again and again. */
void arm(model *m);
int disarm(model *m, int err);

/* A call that finds room, or does not. Above a limit that was lowered nothing new fits, but pages that are
   idle have their memory still: a call that needs no more than these works, and then `ok` becomes 1. */
#define EXPECT(m, call, ok)                                                               \
  do {                                                                                    \
    uint64_t before_ = held(m);                                                           \
    arm(m);                                                                               \
    int err_ = disarm(m, (call));                                                         \
    if ((m)->failed) ok = 0;                                                              \
    if (err_ == KVCACHED_OK && !ok && before_ > (m)->limit && held(m) <= before_) ok = 1; \
    if (!(m)->failed && err_ != (ok ? KVCACHED_OK : KVCACHED_E_LIMIT))                    \
      check_failed(__FILE__, __LINE__, "%s returned %s", #call, kvcached_err_name(err_)); \
    (m)->refused += !ok && !(m)->failed;                                                  \
    (m)->done += ok != 0;                                                                 \
  } while (0)

/* One that works unless the backend fails. */
#define WORKS(m, call)                  \
  do {                                  \
    arm(m);                             \
    int works_ = disarm(m, (call));     \
    if (!(m)->failed) CHECK_OK(works_); \
  } while (0)

/* Puts a region to sleep, or wakes it. */
void set_asleep(model_region *q, int asleep);

/* Whether waking the regions of these kinds, or `only` that one, works; they are awake then. */
int wakes(model *m, unsigned kinds, const model_region *only);

/* Content as its owner would put it there. */
void set_tag(model_region *q, size_t i, int tag);

/* All of the model against the library, and the library's figures. */
void check_all(model *m);

#endif
