/* gpu.h on the CPU: see there. A graph is the list of works that were queued while it was captured. */
#define _GNU_SOURCE
#include "gpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define WORKS 256

enum kind { SET, COPY, MIX };

typedef struct work {
  enum kind kind;
  void *to;
  const void *a, *b;
  int byte;
  size_t n;
} work;

struct gpu_graph {
  work works[WORKS];
  size_t n;
};

static gpu_graph *capturing;
static gpu_counts counts;
static double mark[GPU_MARKS];

static void fail(const char *what) {
  (void)fprintf(stderr, "gpu_cpu: %s\n", what);
  exit(2);
}

static void *must(void *p) {
  if (!p) fail("no memory");
  return p;
}

void gpu_open(int device) { (void)device; }
const char *gpu_name(void) { return "the CPU, in place of a GPU"; }
void gpu_wait(void) {}
void *gpu_alloc(size_t size) { return must(malloc(size)); }
void gpu_free(void *p) { free(p); }
void *gpu_pinned(size_t size) { return must(malloc(size)); }
void gpu_pinned_free(void *p) { free(p); }

void gpu_fill_pages(void *base, size_t page_size, size_t n, const uint64_t *seed) {
  size_t words = page_size / sizeof(uint64_t);
  for (size_t page = 0; page < n; page++) {
    if (seed[page] == GPU_SKIP) continue;
    uint64_t *p = (uint64_t *)base + page * words;
    for (size_t i = 0; i < words; i++) p[i] = gpu_word(seed[page], i);
  }
}

uint64_t gpu_wrong_words(const void *base, size_t page_size, size_t n, const uint64_t *seed) {
  size_t words = page_size / sizeof(uint64_t);
  uint64_t wrong = 0;
  for (size_t page = 0; page < n; page++) {
    if (seed[page] == GPU_SKIP) continue;
    const uint64_t *p = (const uint64_t *)base + page * words;
    for (size_t i = 0; i < words; i++) wrong += p[i] != gpu_word(seed[page], i);
  }
  return wrong;
}

size_t gpu_dirty_pages(const void *base, size_t page_size, size_t n) {
  size_t words = page_size / sizeof(uint64_t), dirty = 0;
  for (size_t page = 0; page < n; page++) {
    const uint64_t *p = (const uint64_t *)base + page * words;
    uint64_t any = 0;
    for (size_t i = 0; i < words; i++) any |= p[i];
    dirty += any != 0;
  }
  return dirty;
}

static void run(const work *w) {
  if (w->kind == SET) {
    memset(w->to, w->byte, w->n);
  } else if (w->kind == COPY) {
    memmove(w->to, w->a, w->n);
  } else {
    uint32_t *to = w->to;
    const uint32_t *a = w->a, *b = w->b;
    for (size_t i = 0; i < w->n; i++) to[i] = to[i] * 1664525u + 1013904223u + (a[i] ^ b[i]);
  }
}

static void queue(work w) {
  if (!capturing) {
    run(&w);
    return;
  }
  if (capturing->n == WORKS) fail("a graph of too many works");
  capturing->works[capturing->n++] = w;
}

void gpu_set(void *to, int byte, size_t len) { queue((work){.kind = SET, .to = to, .byte = byte, .n = len}); }

void gpu_copy(void *to, const void *from, size_t len) {
  queue((work){.kind = COPY, .to = to, .a = from, .n = len});
}

void gpu_copy_to_host(void *to, const void *from, size_t len) { gpu_copy(to, from, len); }

void gpu_mix(uint32_t *to, const uint32_t *a, const uint32_t *b, size_t words) {
  queue((work){.kind = MIX, .to = to, .a = a, .b = b, .n = words});
}

uint64_t gpu_differ(const void *a, const void *b, size_t len) {
  const uint32_t *x = a, *y = b;
  uint64_t wrong = 0;
  for (size_t i = 0; i < len / sizeof(*x); i++) wrong += x[i] != y[i];
  return wrong;
}

void gpu_capture_begin(void) {
  if (capturing) fail("a capture inside a capture");
  capturing = must(calloc(1, sizeof(*capturing)));
  counts.captures++;
}

gpu_graph *gpu_capture_end(void) {
  gpu_graph *g = capturing;
  if (!g) fail("no capture to end");
  capturing = NULL;
  counts.instantiations++;
  return g;
}

void gpu_graph_launch(gpu_graph *graph) {
  for (size_t i = 0; i < graph->n; i++) run(&graph->works[i]);
  counts.launches++;
}

void gpu_graph_free(gpu_graph *graph) { free(graph); }

gpu_nodes gpu_graph_nodes(const gpu_graph *graph) {
  gpu_nodes found = {0};
  for (size_t i = 0; i < graph->n; i++) {
    found.kernels += graph->works[i].kind == MIX;
    found.sets += graph->works[i].kind == SET;
    found.copies += graph->works[i].kind == COPY;
  }
  return found;
}

gpu_counts gpu_graph_counts(void) { return counts; }

void gpu_mark(int which) {
  struct timespec t;
  if (clock_gettime(CLOCK_MONOTONIC, &t) != 0) fail("no monotonic clock");
  mark[which] = (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

double gpu_marks_ms(void) { return mark[1] - mark[0]; }
