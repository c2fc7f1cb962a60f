// gpu.h on CUDA's runtime. It uses the device's primary context, as the library does.
#include "gpu.h"

#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>

namespace {

cudaStream_t stream;
cudaEvent_t mark[GPU_MARKS];
gpu_counts counts;
char name[320];

void check(cudaError_t err, const char *what) {
  if (err == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(err));
  std::exit(2);
}
#define CU(call) check((call), #call)

constexpr unsigned BLOCK = 256, BLOCKS = 1024;

// One block works on a part of a page; blockIdx.y is the page.
__global__ void fill_kernel(uint64_t *base, size_t words, const uint64_t *seed, size_t first) {
  size_t page = first + blockIdx.y;
  uint64_t s = seed[page];
  if (s == GPU_SKIP) return;
  uint64_t *p = base + page * words;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < words;
       i += size_t{blockDim.x} * gridDim.x)
    p[i] = gpu_word(s, i);
}

__global__ void check_kernel(const uint64_t *base, size_t words, const uint64_t *seed, size_t first,
                             unsigned long long *wrong) {
  size_t page = first + blockIdx.y;
  uint64_t s = seed[page];
  if (s == GPU_SKIP) return;
  const uint64_t *p = base + page * words;
  unsigned long long bad = 0;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < words;
       i += size_t{blockDim.x} * gridDim.x)
    bad += p[i] != gpu_word(s, i);
  if (bad) atomicAdd(wrong, bad);
}

__global__ void dirty_kernel(const uint64_t *base, size_t words, size_t first, unsigned *dirty) {
  size_t page = first + blockIdx.y;
  const uint64_t *p = base + page * words;
  uint64_t any = 0;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < words;
       i += size_t{blockDim.x} * gridDim.x)
    any |= p[i];
  if (any) dirty[page] = 1;
}

__global__ void mix_kernel(uint32_t *to, const uint32_t *a, const uint32_t *b, size_t words) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < words;
       i += size_t{blockDim.x} * gridDim.x)
    to[i] = to[i] * 1664525u + 1013904223u + (a[i] ^ b[i]);
}

__global__ void differ_kernel(const uint32_t *a, const uint32_t *b, size_t words, unsigned long long *wrong) {
  unsigned long long bad = 0;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < words;
       i += size_t{blockDim.x} * gridDim.x)
    bad += a[i] != b[i];
  if (bad) atomicAdd(wrong, bad);
}

// Device memory that grows with the largest use of it and is kept.
struct Buffer {
  void *p = nullptr;
  size_t size = 0;
  void *of(size_t want) {
    if (want > size) {
      if (p) CU(cudaFree(p));
      CU(cudaMalloc(&p, want));
      size = want;
    }
    return p;
  }
};
Buffer seeds, counter, flags;

const uint64_t *upload(const uint64_t *seed, size_t n) {
  void *p = seeds.of(n * sizeof(*seed));
  CU(cudaMemcpyAsync(p, seed, n * sizeof(*seed), cudaMemcpyHostToDevice, stream));
  return static_cast<const uint64_t *>(p);
}

unsigned long long *zero_counter() {
  void *p = counter.of(sizeof(unsigned long long));
  CU(cudaMemsetAsync(p, 0, sizeof(unsigned long long), stream));
  return static_cast<unsigned long long *>(p);
}

uint64_t read_counter() {
  unsigned long long n = 0;
  CU(cudaGetLastError());
  CU(cudaMemcpyAsync(&n, counter.p, sizeof(n), cudaMemcpyDeviceToHost, stream));
  CU(cudaStreamSynchronize(stream));
  return n;
}

constexpr size_t PAGES_AT_ONCE = 32768;  // of a grid's second dimension

// Blocks for a page: as many as a 2 MiB page needs for eight words a thread, more for larger ones.
unsigned blocks_for(size_t words) {
  size_t n = (words + BLOCK * 8 - 1) / (BLOCK * 8);
  return static_cast<unsigned>(n < BLOCKS ? n : BLOCKS);
}

}  // namespace

struct gpu_graph {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
};

void gpu_open(int device) {
  CU(cudaSetDevice(device));
  CU(cudaFree(nullptr));
  CU(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (cudaEvent_t &m : mark) CU(cudaEventCreate(&m));
  cudaDeviceProp prop;
  int version = 0;
  CU(cudaGetDeviceProperties(&prop, device));
  CU(cudaDriverGetVersion(&version));
  std::snprintf(name, sizeof(name), "%s, CUDA %d.%d", prop.name, version / 1000, version % 1000 / 10);
  // What a run needs of the runtime's own is there from now on, so that used memory can be compared.
  zero_counter();
  seeds.of(1 << 20);
  flags.of(1 << 20);
  gpu_wait();
}

const char *gpu_name(void) { return name; }

void gpu_wait(void) {
  CU(cudaGetLastError());
  CU(cudaDeviceSynchronize());
}

void *gpu_alloc(size_t size) {
  void *p = nullptr;
  CU(cudaMalloc(&p, size));
  return p;
}

void gpu_free(void *p) { CU(cudaFree(p)); }

void *gpu_pinned(size_t size) {
  void *p = nullptr;
  CU(cudaMallocHost(&p, size));
  return p;
}

void gpu_pinned_free(void *p) { CU(cudaFreeHost(p)); }

void gpu_fill_pages(void *base, size_t page_size, size_t n, const uint64_t *seed) {
  size_t words = page_size / sizeof(uint64_t);
  const uint64_t *device_seed = upload(seed, n);
  for (size_t first = 0; first < n; first += PAGES_AT_ONCE) {
    size_t pages = n - first < PAGES_AT_ONCE ? n - first : PAGES_AT_ONCE;
    dim3 grid(blocks_for(words), static_cast<unsigned>(pages));
    fill_kernel<<<grid, BLOCK, 0, stream>>>(static_cast<uint64_t *>(base), words, device_seed, first);
  }
  CU(cudaGetLastError());
  CU(cudaStreamSynchronize(stream));
}

uint64_t gpu_wrong_words(const void *base, size_t page_size, size_t n, const uint64_t *seed) {
  size_t words = page_size / sizeof(uint64_t);
  const uint64_t *device_seed = upload(seed, n);
  unsigned long long *wrong = zero_counter();
  for (size_t first = 0; first < n; first += PAGES_AT_ONCE) {
    size_t pages = n - first < PAGES_AT_ONCE ? n - first : PAGES_AT_ONCE;
    dim3 grid(blocks_for(words), static_cast<unsigned>(pages));
    check_kernel<<<grid, BLOCK, 0, stream>>>(static_cast<const uint64_t *>(base), words, device_seed, first,
                                             wrong);
  }
  return read_counter();
}

size_t gpu_dirty_pages(const void *base, size_t page_size, size_t n) {
  size_t words = page_size / sizeof(uint64_t), dirty = 0;
  unsigned *flag = static_cast<unsigned *>(flags.of(n * sizeof(unsigned)));
  CU(cudaMemsetAsync(flag, 0, n * sizeof(unsigned), stream));
  for (size_t first = 0; first < n; first += PAGES_AT_ONCE) {
    size_t pages = n - first < PAGES_AT_ONCE ? n - first : PAGES_AT_ONCE;
    dim3 grid(blocks_for(words), static_cast<unsigned>(pages));
    dirty_kernel<<<grid, BLOCK, 0, stream>>>(static_cast<const uint64_t *>(base), words, first, flag);
  }
  CU(cudaGetLastError());
  unsigned *host = static_cast<unsigned *>(std::malloc(n * sizeof(unsigned)));
  if (!host) std::exit(2);
  CU(cudaMemcpyAsync(host, flag, n * sizeof(unsigned), cudaMemcpyDeviceToHost, stream));
  CU(cudaStreamSynchronize(stream));
  for (size_t i = 0; i < n; i++) dirty += host[i] != 0;
  std::free(host);
  return dirty;
}

void gpu_set(void *to, int byte, size_t len) { CU(cudaMemsetAsync(to, byte, len, stream)); }

void gpu_copy(void *to, const void *from, size_t len) {
  CU(cudaMemcpyAsync(to, from, len, cudaMemcpyDeviceToDevice, stream));
}

void gpu_copy_to_host(void *to, const void *from, size_t len) {
  CU(cudaMemcpyAsync(to, from, len, cudaMemcpyDeviceToHost, stream));
}

void gpu_mix(uint32_t *to, const uint32_t *a, const uint32_t *b, size_t words) {
  mix_kernel<<<BLOCKS, BLOCK, 0, stream>>>(to, a, b, words);
  CU(cudaGetLastError());
}

uint64_t gpu_differ(const void *a, const void *b, size_t len) {
  unsigned long long *wrong = zero_counter();
  differ_kernel<<<BLOCKS, BLOCK, 0, stream>>>(
      static_cast<const uint32_t *>(a), static_cast<const uint32_t *>(b), len / sizeof(uint32_t), wrong);
  return read_counter();
}

void gpu_capture_begin(void) {
  // Other threads (the library's helper) may go on calling the driver meanwhile.
  CU(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  counts.captures++;
}

gpu_graph *gpu_capture_end(void) {
  gpu_graph *g = static_cast<gpu_graph *>(std::malloc(sizeof(gpu_graph)));
  if (!g) std::exit(2);
  CU(cudaStreamEndCapture(stream, &g->graph));
  CU(cudaGraphInstantiate(&g->exec, g->graph, 0));
  counts.instantiations++;
  return g;
}

void gpu_graph_launch(gpu_graph *graph) {
  CU(cudaGraphLaunch(graph->exec, stream));
  counts.launches++;
}

void gpu_graph_free(gpu_graph *graph) {
  CU(cudaGraphExecDestroy(graph->exec));
  CU(cudaGraphDestroy(graph->graph));
  std::free(graph);
}

gpu_nodes gpu_graph_nodes(const gpu_graph *graph) {
  gpu_nodes found = {};
  cudaGraphNode_t node[256];
  size_t n = sizeof(node) / sizeof(node[0]);
  CU(cudaGraphGetNodes(graph->graph, node, &n));
  for (size_t i = 0; i < n; i++) {
    cudaGraphNodeType type;
    CU(cudaGraphNodeGetType(node[i], &type));
    if (type == cudaGraphNodeTypeKernel)
      found.kernels++;
    else if (type == cudaGraphNodeTypeMemset)
      found.sets++;
    else if (type == cudaGraphNodeTypeMemcpy)
      found.copies++;
    else
      found.others++;
  }
  return found;
}

gpu_counts gpu_graph_counts(void) { return counts; }

void gpu_mark(int which) { CU(cudaEventRecord(mark[which], stream)); }

double gpu_marks_ms(void) {
  float ms = 0;
  CU(cudaEventSynchronize(mark[1]));
  CU(cudaEventElapsedTime(&ms, mark[0], mark[1]));
  return ms;
}
