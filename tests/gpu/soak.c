/*
 * Many cycles of sleep and wake and of growing and shrinking, on regions of a GiB. Every word of every page
 * that has content is compared each time, on the device. What the device's driver reports as used has to be,
 * at the end, what it was after cycle 10, to 2 MiB.
 *
 *   soak [--sleeps N] (1000) [--grows N] (10000) [--size BYTES] (of a region, 1G)
 */
#define _GNU_SOURCE
#include "gpu.h"
#include "program.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WARM 10         /* cycles after which used memory is noted */
#define SLACK (2 * MIB) /* it may differ from that by so much */
#define MOST_PAGES 48   /* of an ordinary growth step */

/* A region and what each of its pages should hold. */
typedef struct model {
  kvcached_region_t region;
  char *base;
  size_t page, n;
  uint64_t *seed; /* GPU_SKIP: not ensured */
} model;

static uint64_t new_seed(void) { return next_random() | 2; } /* neither GPU_SKIP nor GPU_ZERO */

static model open_model(kvcached_ctx_t ctx, int kind, size_t size) {
  model m = {0};
  KVC(kvcached_reserve(ctx, kind, size, &m.region));
  m.base = kvcached_region_base(m.region);
  m.page = kvcached_region_page_size(m.region);
  m.n = size / m.page;
  if (m.n * m.page != size) fail("--size: a multiple of %zu", m.page);
  m.seed = must_alloc(m.n * sizeof(*m.seed));
  return m;
}

static void close_model(model *m) {
  kvcached_unreserve(m->region);
  free(m->seed);
}

static void check_model(const model *m, const char *what, size_t cycle) {
  uint64_t bad = gpu_wrong_words(m->base, m->page, m->n, m->seed);
  EXPECT(bad == 0, "cycle %zu: %" PRIu64 " words of the %s are wrong", cycle, bad, what);
}

/* New content for pages [first, first + n). */
static void write_pages(model *m, size_t first, size_t n) {
  for (size_t i = first; i < first + n; i++) m->seed[i] = new_seed();
  gpu_fill_pages(m->base + first * m->page, m->page, n, m->seed + first);
}

/* Ensures pages [first, first + n): those that were not hold zeros now. */
static void grow(model *m, size_t first, size_t n) {
  KVC(kvcached_ensure(m->region, first * m->page, n * m->page));
  for (size_t i = first; i < first + n; i++)
    if (m->seed[i] == GPU_SKIP) m->seed[i] = GPU_ZERO;
}

static void shrink(model *m, size_t first, size_t n) {
  KVC(kvcached_release(m->region, first * m->page, n * m->page));
  for (size_t i = first; i < first + n; i++) m->seed[i] = GPU_SKIP;
}

/* ---- used memory ---- */

typedef struct meter {
  const char *name;
  uint64_t noted, least, most;
  double began;
  size_t cycles;
} meter;

static void look(meter *m, kvcached_ctx_t ctx, size_t cycle) {
  uint64_t used = used_bytes(ctx);
  if (cycle == WARM) m->noted = m->least = m->most = used;
  if (cycle < WARM) return;
  if (used < m->least) m->least = used;
  if (used > m->most) m->most = used;
  if (cycle % (m->cycles / 5 ? m->cycles / 5 : 1) == 0)
    printf("%s: cycle %6zu, %.1f s, %.1f MiB used (%+.1f since cycle %d)\n", m->name, cycle,
           now_s() - m->began, (double)used / (double)MIB, ((double)used - (double)m->noted) / (double)MIB,
           WARM);
  (void)fflush(stdout);
}

static void judge(const meter *m, kvcached_ctx_t ctx) {
  uint64_t used = used_bytes(ctx), difference = used > m->noted ? used - m->noted : m->noted - used;
  printf("%s: %zu cycles in %.1f s; used: %.1f MiB after cycle %d, %.1f now, between %.1f and %.1f\n",
         m->name, m->cycles, now_s() - m->began, (double)m->noted / (double)MIB, WARM,
         (double)used / (double)MIB, (double)m->least / (double)MIB, (double)m->most / (double)MIB);
  EXPECT(difference <= SLACK, "%s: used memory differs by %" PRIu64 " bytes from what it was after cycle %d",
         m->name, difference, WARM);
}

/* ---- sleep and wake ---- */

static void rewrite_weights(model *weights, uint64_t *words) {
  size_t i = next_random() % weights->n;
  weights->seed[i] = new_seed();
  for (size_t k = 0; k < weights->page / sizeof(*words); k++) words[k] = gpu_word(weights->seed[i], k);
  KVC(kvcached_write(weights->region, i * weights->page, words, weights->page));
}

static void sleep_cycles(size_t cycles, size_t size) {
  kvcached_ctx_t ctx = open_gpu(64 * MIB);
  model kv = open_model(ctx, KVCACHED_KV, size), weights = open_model(ctx, KVCACHED_WEIGHTS, size),
        scratch = open_model(ctx, KVCACHED_SCRATCH, size);
  uint64_t *words = must_alloc(weights.page);
  grow(&kv, 0, kv.n);
  grow(&weights, 0, weights.n);
  grow(&scratch, 0, scratch.n);
  write_pages(&kv, 0, kv.n);
  write_pages(&weights, 0, weights.n);
  /* Weights are written by the device before their first sleep, and through the library from then on. */
  meter m = {.name = "sleep and wake", .began = now_s(), .cycles = cycles};
  for (size_t cycle = 1; cycle <= cycles; cycle++) {
    write_pages(&scratch, 0, scratch.n);
    size_t part = kv.n / 16, first = next_random() % (kv.n - part + 1), freed;
    write_pages(&kv, first, part);
    if (cycle % 100 == 0) rewrite_weights(&weights, words);
    if (cycle % 64 == 32) KVC(kvcached_prepare_sleep(ctx, KVCACHED_ALL_KINDS));
    KVC(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 1000, &freed));
    kvcached_stats_t s = stats_of(ctx);
    EXPECT(freed == 3 * size && s.mapped == 0 && s.pooled == 0 && s.asleep == 3 * size,
           "cycle %zu: asleep %" PRIu64 ", mapped %" PRIu64 ", pooled %" PRIu64 " bytes, %zu freed", cycle,
           s.asleep, s.mapped, s.pooled, freed);
    KVC(kvcached_enter(ctx));
    for (size_t i = 0; i < scratch.n; i++) scratch.seed[i] = GPU_ZERO;
    check_model(&kv, "KV", cycle);
    check_model(&weights, "weights", cycle);
    check_model(&scratch, "scratch", cycle);
    KVC(kvcached_leave(ctx));
    look(&m, ctx, cycle);
  }
  judge(&m, ctx);
  kvcached_stats_t s = stats_of(ctx);
  EXPECT(s.sleeps == cycles && s.wakes == cycles, "%" PRIu64 " sleeps, %" PRIu64 " wakes, not %zu", s.sleeps,
         s.wakes, cycles);
  free(words);
  close_model(&scratch), close_model(&weights), close_model(&kv);
  kvcached_shutdown(ctx);
}

/* ---- grow and shrink ---- */

static void grow_cycles(size_t cycles, size_t size) {
  kvcached_ctx_t ctx = open_gpu(64 * MIB);
  model kv = open_model(ctx, KVCACHED_KV, size), scratch = open_model(ctx, KVCACHED_SCRATCH, size);
  uint64_t pages = 0;
  meter m = {.name = "grow and shrink", .began = now_s(), .cycles = cycles};
  for (size_t cycle = 1; cycle <= cycles; cycle++) {
    size_t most = kv.n < MOST_PAGES ? kv.n : MOST_PAGES, n = 1 + next_random() % most;
    if (cycle % 100 == 0) n = kv.n; /* and now and then all of it */
    size_t first = next_random() % (kv.n - n + 1);
    if (cycle % 4 == 1) KVC(kvcached_prepare(kv.region, first * kv.page, n * kv.page));
    grow(&kv, first, n);
    check_model(&kv, "KV after growing", cycle);
    write_pages(&kv, first, n);
    check_model(&kv, "KV", cycle);
    pages += n;

    /* About as much goes as came, elsewhere; some of it is recycled while it is still mapped. */
    size_t gone = cycle % 100 == 0 ? kv.n : 1 + next_random() % most;
    shrink(&kv, next_random() % (kv.n - gone + 1), gone);
    if (cycle % 8 == 0) {
      grow(&scratch, 0, scratch.n);
      check_model(&scratch, "scratch after growing", cycle);
      write_pages(&scratch, 0, scratch.n);
      shrink(&scratch, 0, scratch.n);
    }
    if (cycle % 2 == 0) KVC(kvcached_trim(ctx, 0, NULL));
    check_model(&kv, "KV after shrinking", cycle);
    int measured = cycle == WARM || cycle == cycles || cycle % 100 == 0;
    if (cycle % 1000 == 500) { /* through the pool: new addresses, old pages */
      close_model(&kv);
      kv = open_model(ctx, KVCACHED_KV, size);
    }
    if (!measured) continue;
    /* Compared with nothing but the library's fixed part in use. */
    shrink(&kv, 0, kv.n);
    KVC(kvcached_trim(ctx, 0, NULL));
    kvcached_stats_t s = stats_of(ctx);
    EXPECT(s.mapped == 0 && s.pooled == 0, "cycle %zu: %" PRIu64 " bytes mapped, %" PRIu64 " pooled", cycle,
           s.mapped, s.pooled);
    look(&m, ctx, cycle);
  }
  judge(&m, ctx);
  printf("%s: %" PRIu64 " pages of %zu MiB were ensured\n", m.name, pages, kv.page / MIB);
  close_model(&scratch), close_model(&kv);
  kvcached_shutdown(ctx);
}

int main(int argc, char **argv) {
  size_t sleeps = argument(argc, argv, "--sleeps", 1000), grows = argument(argc, argv, "--grows", 10000);
  size_t size = argument(argc, argv, "--size", GIB);
  done_arguments(argc, argv);
  if (sleeps < WARM || grows < WARM) fail("%d cycles of each are the least", WARM);
  gpu_open(0);
  printf("%s; regions of %zu MiB\n", gpu_name(), size / MIB);
  grow_cycles(grows, size);
  sleep_cycles(sleeps, size);
  return verdict("soak", "%zu sleep and wake and %zu grow and shrink cycles on regions of %zu MiB", sleeps,
                 grows, size / MIB);
}
