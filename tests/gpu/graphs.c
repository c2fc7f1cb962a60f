/*
 * A CUDA graph that was captured over a region replays correctly after the region's memory was replaced:
 * after sleep and wake, and after trim and ensure. The graph has kernel, memset and memcpy nodes. Beside it
 * the same works run on plain device memory, without a graph and without anything done to them; both must
 * agree in every word after every replay. Between taking memory away and giving it back, other memory is made
 * and filled
 * ("dirtied"), or made and kept, so that the region cannot get the pages back that it had.
 *
 * Then look-ahead: pages are prepared while the graph runs, step after step. Contents must be right, and a
 * step during which pages are being mapped must take no longer than others.
 *
 *   graphs [--cycles N] (240) [--size BYTES] (of each region, 64M) [--steps N] (of look-ahead, 960)
 *          [--judge-times 0|1] (1) [--spoil N] (change a word in cycle N: the program must fail)
 */
#define _GNU_SOURCE
#include "gpu.h"
#include "program.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One set of what the works work on. */
typedef struct buffers {
  char *state, *weights, *scratch;
  uint32_t *host; /* the first words of state, copied out by a node */
  size_t size;    /* of each, but host: HOST_BYTES */
} buffers;

#define HOST_BYTES 4096
#define WORK_KERNELS 2
#define WORK_SETS 1
#define WORK_COPIES 2

static void queue_work(const buffers *b) {
  size_t half = b->size / 2;
  uint32_t *state = (uint32_t *)(void *)b->state, *weights = (uint32_t *)(void *)b->weights,
           *scratch = (uint32_t *)(void *)b->scratch;
  gpu_set(b->scratch, 0x5A, b->size);
  gpu_mix(scratch, state, weights, b->size / sizeof(uint32_t));
  gpu_copy(b->state, b->scratch + half, half);
  gpu_mix(state, scratch, weights, b->size / sizeof(uint32_t));
  gpu_copy_to_host(b->host, b->state, HOST_BYTES);
}

static void fill_buffers(const buffers *b) {
  uint64_t seed = 77;
  gpu_fill_pages(b->state, b->size, 1, &seed);
  seed = 78;
  gpu_fill_pages(b->weights, b->size, 1, &seed);
}

static void compare(const buffers *region, const buffers *plain, size_t cycle, const char *after) {
  uint64_t state = gpu_differ(region->state, plain->state, plain->size);
  uint64_t weights = gpu_differ(region->weights, plain->weights, plain->size);
  uint64_t scratch = gpu_differ(region->scratch, plain->scratch, plain->size);
  int host = memcmp(region->host, plain->host, HOST_BYTES) != 0;
  EXPECT(!state && !weights && !scratch && !host,
         "cycle %zu, after %s: %ju words of the state, %ju of the weights, %ju of the scratch differ%s",
         cycle, after, (uintmax_t)state, (uintmax_t)weights, (uintmax_t)scratch,
         host ? ", and the host's copy" : "");
}

typedef struct setup {
  kvcached_ctx_t ctx;
  kvcached_region_t state, weights, scratch;
  raw_device *dev;
  buffers region, plain;
} setup;

static void open_setup(setup *s, size_t size) {
  s->ctx = open_gpu(16 * MIB);
  KVC(kvcached_reserve(s->ctx, KVCACHED_KV, size, &s->state));
  KVC(kvcached_reserve(s->ctx, KVCACHED_WEIGHTS, size, &s->weights));
  KVC(kvcached_reserve(s->ctx, KVCACHED_SCRATCH, size, &s->scratch));
  KVC(kvcached_ensure(s->state, 0, size));
  KVC(kvcached_ensure(s->weights, 0, size));
  KVC(kvcached_ensure(s->scratch, 0, size));
  RAW(raw_cuda.open(0, &s->dev));
  s->region = (buffers){.state = kvcached_region_base(s->state),
                        .weights = kvcached_region_base(s->weights),
                        .scratch = kvcached_region_base(s->scratch),
                        .host = gpu_pinned(HOST_BYTES),
                        .size = size};
  s->plain = (buffers){.state = gpu_alloc(size),
                       .weights = gpu_alloc(size),
                       .scratch = gpu_alloc(size),
                       .host = gpu_pinned(HOST_BYTES),
                       .size = size};
  memset(s->region.host, 0, HOST_BYTES);
  memset(s->plain.host, 0, HOST_BYTES);
  gpu_set(s->plain.scratch, 0, size);
  fill_buffers(&s->region);
  fill_buffers(&s->plain);
  gpu_wait();
}

static void close_setup(setup *s) {
  kvcached_shutdown(s->ctx);
  gpu_free(s->plain.state);
  gpu_free(s->plain.weights);
  gpu_free(s->plain.scratch);
  gpu_pinned_free(s->region.host);
  gpu_pinned_free(s->plain.host);
  s->dev->ops->close(s->dev);
}

/* ---- the physical memory under the graph is replaced ---- */

enum dirt { LEAVE, DIRTY, KEEP, DIRTS }; /* with the memory that the region has given back */

static void take_memory(const setup *s, raw_run *other, size_t size) {
  RAW(raw_run_reserve(s->dev, other, size, 2 * MIB));
  RAW(raw_run_create(s->dev, other));
  RAW(raw_run_map(s->dev, other));
  RAW(raw_run_access(s->dev, other));
  gpu_set(other->base, 0xA5, size);
  gpu_wait();
}

static void give_memory(const setup *s, raw_run *other) {
  RAW(raw_run_unmap(s->dev, other));
  RAW(raw_run_destroy(s->dev, other));
  RAW(raw_run_unreserve(s->dev, other));
}

static void drop(const setup *s, kvcached_region_t region, size_t off, size_t len) {
  size_t freed;
  gpu_wait(); /* work that touches pages has finished before they are released */
  KVC(kvcached_release(region, off, len));
  KVC(kvcached_trim(s->ctx, 0, &freed));
  EXPECT(freed >= len, "trim gave %zu bytes back, not %zu", freed, len);
}

enum edit { SLEEP, SCRATCH, STATE, HALF, EDITS };
static const char *const edit_name[EDITS] = {"sleep and wake", "trim and ensure of the scratch",
                                             "trim and ensure of the state",
                                             "trim and ensure of half the state"};

static void replace(const setup *s, enum edit edit, enum dirt dirt, raw_run *kept) {
  size_t size = s->plain.size, half = size / 2, freed, taken = size;
  if (edit == SLEEP) {
    gpu_wait();
    KVC(kvcached_sleep(s->ctx, KVCACHED_ALL_KINDS, 1000, &freed));
    EXPECT(freed >= 3 * size, "sleep gave %zu bytes back, not %zu", freed, 3 * size);
    EXPECT(stats_of(s->ctx).mapped == 0, "something is mapped in sleep");
    taken = 3 * size;
  } else if (edit == SCRATCH) {
    drop(s, s->scratch, 0, size);
  } else if (edit == STATE) {
    drop(s, s->state, 0, size);
  } else {
    drop(s, s->state, half, half);
    taken = half;
  }
  *kept = (raw_run){0};
  if (dirt != LEAVE) {
    take_memory(s, kept, taken);
    if (dirt == DIRTY) {
      give_memory(s, kept);
      *kept = (raw_run){0};
    }
  }
  if (edit == SLEEP) return; /* entering wakes */
  /* Ensured pages are zero: so is what the other side has instead. */
  if (edit == SCRATCH) {
    KVC(kvcached_ensure(s->scratch, 0, size));
    gpu_set(s->plain.scratch, 0, size);
  } else {
    size_t off = edit == STATE ? 0 : half;
    KVC(kvcached_ensure(s->state, off, size - off));
    gpu_set(s->plain.state + off, 0, size - off);
  }
}

/* spoil: the cycle whose state is changed behind the library's back, to see that this is noticed. */
static void replay_cycles(setup *s, gpu_graph *graph, size_t cycles, size_t spoil,
                          uint64_t done[EDITS][DIRTS]) {
  for (size_t cycle = 0; cycle < cycles; cycle++) {
    enum edit edit = (enum edit)(cycle % EDITS);
    enum dirt dirt = (enum dirt)(cycle / EDITS % DIRTS);
    raw_run kept;
    replace(s, edit, dirt, &kept);
    KVC(kvcached_enter(s->ctx));
    /* Before the replay: what has to be there is there. Sleep drops the scratch. */
    if (edit == SLEEP) gpu_set(s->plain.scratch, 0, s->plain.size);
    if (cycle == spoil) gpu_set(s->region.state + s->plain.size / 4, 0xEE, 4);
    gpu_wait();
    compare(&s->region, &s->plain, cycle, edit_name[edit]);
    gpu_graph_launch(graph);
    queue_work(&s->plain);
    gpu_wait();
    compare(&s->region, &s->plain, cycle, "the replay");
    KVC(kvcached_leave(s->ctx));
    if (kept.base) give_memory(s, &kept);
    done[edit][dirt]++;
  }
}

/* A difference of one word is seen, or all the above says nothing. */
static void control(const setup *s) {
  uint64_t before = gpu_differ(s->region.state, s->plain.state, s->plain.size);
  uint32_t word[2];
  KVC(kvcached_read(s->state, s->plain.size / 2, word, sizeof(word)));
  word[0] ^= 1;
  KVC(kvcached_write(s->state, s->plain.size / 2, word, sizeof(word)));
  uint64_t after = gpu_differ(s->region.state, s->plain.state, s->plain.size);
  EXPECT(before == 0 && after == 1, "one changed word is seen as %ju, none as %ju", (uintmax_t)after,
         (uintmax_t)before);
  word[0] ^= 1;
  KVC(kvcached_write(s->state, s->plain.size / 2, word, sizeof(word)));
}

/* ---- look-ahead ---- */

#define REPEAT 20      /* of the work in a step, to last some milliseconds */
#define AHEAD_PAGES 64 /* one growth step of a model of 32 layers */
#define BLOCK 16       /* steps; a block with look-ahead follows one without */

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

typedef struct times {
  double *host, *device; /* ms a step */
  size_t n;
} times;

static double at(double *v, size_t n, double share) {
  qsort(v, n, sizeof(*v), by_value);
  size_t i = (size_t)(share * (double)n);
  return v[i < n ? i : n - 1];
}

static void print_times(const char *name, times *t) {
  printf(
      "%-28s %5zu steps, ms seen by the host: median %.3f, 99 %% %.3f, longest %.3f; on the device: %.3f, "
      "%.3f, %.3f\n",
      name, t->n, at(t->host, t->n, 0.5), at(t->host, t->n, 0.99), at(t->host, t->n, 1),
      at(t->device, t->n, 0.5), at(t->device, t->n, 0.99), at(t->device, t->n, 1));
}

static void look_ahead(setup *s, size_t steps, int judge_times) {
  gpu_capture_begin();
  for (int i = 0; i < REPEAT; i++) queue_work(&s->region);
  gpu_graph *graph = gpu_capture_end();
  size_t page = kvcached_page_size(s->ctx), growth = AHEAD_PAGES * page, blocks = steps / BLOCK;
  size_t capacity = 4 * growth; /* four growth steps, then from the start again */
  uint64_t seeds[AHEAD_PAGES], device_calls = 0, unready = 0;
  kvcached_region_t kv;
  KVC(kvcached_reserve(s->ctx, KVCACHED_KV, capacity, &kv));
  char *base = kvcached_region_base(kv);
  size_t grown = 0, cap = steps + BLOCK;
  times quiet = {must_alloc(cap * sizeof(double)), must_alloc(cap * sizeof(double)), 0};
  times mapping = {must_alloc(cap * sizeof(double)), must_alloc(cap * sizeof(double)), 0};
  KVC(kvcached_enter(s->ctx));
  for (size_t block = 0; block < blocks; block++) {
    int ahead = block % 2 == 1;
    size_t off = grown % capacity;
    if (ahead && grown >= capacity) {
      /* Made room outside of the gate, before the block's steps. */
      KVC(kvcached_leave(s->ctx));
      KVC(kvcached_release(kv, off, growth));
      KVC(kvcached_trim(s->ctx, 0, NULL));
      KVC(kvcached_enter(s->ctx));
    }
    for (size_t step = 0; step < BLOCK; step++) {
      uint64_t ready = ahead ? stats_of(s->ctx).ready : 0;
      double t0 = now_s();
      gpu_mark(0);
      gpu_graph_launch(graph);
      gpu_mark(1);
      if (ahead && step == 1) KVC(kvcached_prepare(kv, off, growth));
      double device = gpu_marks_ms(), host = (now_s() - t0) * 1e3;
      for (int i = 0; i < REPEAT; i++) queue_work(&s->plain);
      gpu_wait();
      /* Steps during which pages were being made, and those of the other blocks; the first of a block warms
       * up.
       */
      int making = ahead && step >= 1 && ready < growth;
      times *t = making ? &mapping : !ahead && step > 0 ? &quiet : NULL;
      if (!t) continue;
      t->host[t->n] = host;
      t->device[t->n++] = device;
    }
    if (!ahead) continue;
    double waited = now_s();
    while (stats_of(s->ctx).ready < growth && now_s() - waited < 2) KVC(kvcached_prepare(kv, off, growth));
    unready += stats_of(s->ctx).ready < growth;
    uint64_t calls = stats_of(s->ctx).device_calls;
    KVC(kvcached_ensure(kv, off, growth));
    device_calls += stats_of(s->ctx).device_calls - calls;
    for (size_t i = 0; i < AHEAD_PAGES; i++) seeds[i] = GPU_ZERO;
    uint64_t bad = gpu_wrong_words(base + off, page, AHEAD_PAGES, seeds);
    EXPECT(bad == 0, "block %zu: %ju words of prepared pages are not zero", block, (uintmax_t)bad);
    for (size_t i = 0; i < AHEAD_PAGES; i++) seeds[i] = 2 + block * AHEAD_PAGES + i;
    gpu_fill_pages(base + off, page, AHEAD_PAGES, seeds);
    grown += growth;
    compare(&s->region, &s->plain, block, "steps with look-ahead");
  }
  KVC(kvcached_leave(s->ctx));
  compare(&s->region, &s->plain, blocks, "all steps");
  EXPECT(unready == 0, "%ju of %zu requests were not ready in time", (uintmax_t)unready, blocks / 2);
  EXPECT(device_calls == 0, "%ju driver calls were made by ensures of prepared pages",
         (uintmax_t)device_calls);
  if (!quiet.n || !mapping.n) fail("--steps %zu: two blocks of %d are the least", steps, BLOCK);
  print_times("while nothing is mapped", &quiet);
  print_times("while pages are mapped", &mapping);
  if (judge_times) {
    double median = at(mapping.host, mapping.n, 0.5) / at(quiet.host, quiet.n, 0.5);
    double tail = at(mapping.host, mapping.n, 0.99) - at(quiet.host, quiet.n, 0.99);
    EXPECT(median <= 1.05, "the median step takes %.3f times as long while pages are mapped", median);
    EXPECT(tail <= 1.0, "99 %% of the steps take %.3f ms longer while pages are mapped", tail);
  }
  gpu_graph_free(graph);
  kvcached_unreserve(kv);
  free(quiet.host), free(quiet.device), free(mapping.host), free(mapping.device);
}

int main(int argc, char **argv) {
  size_t cycles = argument(argc, argv, "--cycles", 240), size = argument(argc, argv, "--size", 64 * MIB);
  size_t steps = argument(argc, argv, "--steps", 960);
  size_t spoil = argument(argc, argv, "--spoil", SIZE_MAX);
  int judge_times = (int)argument(argc, argv, "--judge-times", 1);
  done_arguments(argc, argv);
  if (size < 4 * MIB || size % (4 * MIB)) fail("--size: a multiple of 4 MiB");
  gpu_open(0);
  printf("%s\n", gpu_name());
  setup s;
  open_setup(&s, size);

  gpu_capture_begin();
  queue_work(&s.region);
  gpu_graph *graph = gpu_capture_end();
  gpu_nodes nodes = gpu_graph_nodes(graph);
  printf("the graph has %zu kernel, %zu memset, %zu memcpy and %zu other nodes\n", nodes.kernels, nodes.sets,
         nodes.copies, nodes.others);
  EXPECT(nodes.kernels == WORK_KERNELS && nodes.sets == WORK_SETS && nodes.copies == WORK_COPIES,
         "the graph has not the nodes it was captured with");
  gpu_counts before = gpu_graph_counts();
  gpu_graph_launch(graph);
  queue_work(&s.plain);
  gpu_wait();
  compare(&s.region, &s.plain, 0, "the first replay");

  uint64_t done[EDITS][DIRTS] = {{0}};
  replay_cycles(&s, graph, cycles, spoil, done);
  gpu_counts after = gpu_graph_counts();
  for (int e = 0; e < EDITS; e++)
    printf("%-34s %4ju cycles, memory left alone %ju, dirtied %ju, kept by others %ju\n", edit_name[e],
           (uintmax_t)(done[e][LEAVE] + done[e][DIRTY] + done[e][KEEP]), (uintmax_t)done[e][LEAVE],
           (uintmax_t)done[e][DIRTY], (uintmax_t)done[e][KEEP]);
  EXPECT(after.captures == before.captures && after.instantiations == before.instantiations,
         "the graph was captured again");
  EXPECT(after.launches - before.launches == cycles + 1, "%ju replays, not %zu",
         (uintmax_t)(after.launches - before.launches), cycles + 1);
  control(&s);
  gpu_graph_free(graph);
  look_ahead(&s, steps, judge_times);
  close_setup(&s);
  return verdict("graphs", "%ju replays of one graph, %ju captures after the first", (uintmax_t)(cycles + 1),
                 (uintmax_t)(after.captures - before.captures));
}
