/*
 * The little of CUDA that the programs in this folder need. gpu.cu is the real thing; gpu_cpu.c does the same
 * on the CPU, for runs against the driver of tests/vmm/fake_cuda.c, whose device memory the CPU can read:
 * that checks the programs, not a GPU.
 *
 * A call that fails ends the program (exit 2). One thread.
 */
#ifndef GPU_H
#define GPU_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifdef __CUDACC__
#define GPU_BOTH __host__ __device__
#else
#define GPU_BOTH
#endif

void gpu_open(int device);
/* "NVIDIA H200, CUDA 13.0" */
const char *gpu_name(void);
/* Waits for all work; a fault in a kernel shows here. */
void gpu_wait(void);

void *gpu_alloc(size_t size); /* plain device memory, not from the library under test */
void gpu_free(void *p);
void *gpu_pinned(size_t size);
void gpu_pinned_free(void *p);

/* ---- pages with content that can be told ---- */

enum {
  GPU_SKIP = 0,
  GPU_ZERO = 1
}; /* as a seed: leave the page alone; the page is zero. Others: a pattern */

/* Word i (of 8 bytes) of a page with this seed. */
static inline GPU_BOTH uint64_t gpu_word(uint64_t seed, uint64_t i) {
  if (seed == GPU_ZERO) return 0;
  uint64_t x = seed * 0x9e3779b97f4a7c15u + i;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/* Pages of page_size bytes from base: writes each by its seed; counts the words that differ from it. Return
   when done. */
void gpu_fill_pages(void *base, size_t page_size, size_t n, const uint64_t *seed);
uint64_t gpu_wrong_words(const void *base, size_t page_size, size_t n, const uint64_t *seed);
/* Pages with any bit set. */
size_t gpu_dirty_pages(const void *base, size_t page_size, size_t n);

/* ---- work: queued on one stream, or made part of the graph while one is captured ---- */

void gpu_set(void *to, int byte, size_t len);
void gpu_copy(void *to, const void *from, size_t len);         /* device to device */
void gpu_copy_to_host(void *to, const void *from, size_t len); /* to pinned memory */
/* to[i] = to[i] * 1664525 + 1013904223 + (a[i] ^ b[i]); words of 4 bytes */
void gpu_mix(uint32_t *to, const uint32_t *a, const uint32_t *b, size_t words);

/* Words of 4 bytes that differ. Waits. */
uint64_t gpu_differ(const void *a, const void *b, size_t len);

typedef struct gpu_graph gpu_graph;
void gpu_capture_begin(void);
gpu_graph *gpu_capture_end(void); /* captured and instantiated */
void gpu_graph_launch(gpu_graph *graph);
void gpu_graph_free(gpu_graph *graph);
typedef struct gpu_nodes {
  size_t kernels, sets, copies, others;
} gpu_nodes;
gpu_nodes gpu_graph_nodes(const gpu_graph *graph);
/* Since the program began. */
typedef struct gpu_counts {
  uint64_t captures, instantiations, launches;
} gpu_counts;
gpu_counts gpu_graph_counts(void);

/* Marks a point between queued works, and tells the milliseconds that the device took between two. */
#define GPU_MARKS 2
void gpu_mark(int which);
double gpu_marks_ms(void);

#ifdef __cplusplus
}
#endif
#endif
