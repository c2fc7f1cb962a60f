/*
 * Are pages that the driver makes anew zero? Nothing promises it, so the library zeroes them all the same;
 * this counts. Much of the card's memory is made into pages, filled, given back and made anew: in this
 * process, after another one that gave its memory back, after one that was killed with its memory in use, and
 * after plain device memory. What is found is printed and is no verdict, but what the library hands out has
 * to be zero each time.
 *
 *   fresh [--percent N] (of free memory, 80) [--size BYTES] (at most, 32G)
 */
#define _GNU_SOURCE
#include "gpu.h"
#include "program.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define DIRT 0xAB

static size_t size_now(raw_device *dev, uint64_t percent, size_t unit, uint64_t most) {
  uint64_t free_now, total;
  RAW(dev->ops->memory(dev, &free_now, &total));
  uint64_t bytes = free_now / 100 * percent, units = (bytes < most ? bytes : most) / unit;
  if (units == 0)
    fail("%ju bytes of device memory are free, %ju are asked for: not one page of %zu", (uintmax_t)free_now,
         (uintmax_t)most, unit);
  return (size_t)units * unit;
}

static void make(raw_device *dev, raw_run *run, size_t size, size_t unit) {
  RAW(raw_run_reserve(dev, run, size, unit));
  RAW(raw_run_create(dev, run));
  RAW(raw_run_map(dev, run));
  RAW(raw_run_access(dev, run));
}

static void unmake(raw_device *dev, raw_run *run) {
  RAW(raw_run_unmap(dev, run));
  RAW(raw_run_destroy(dev, run));
  RAW(raw_run_unreserve(dev, run));
}

/* Makes `size` bytes of pages anew, counts those that are dirty, leaves them all so. */
static void look(raw_device *dev, size_t size, size_t unit, const char *when) {
  raw_run run;
  make(dev, &run, size, unit);
  size_t dirty = gpu_dirty_pages(run.base, unit, run.n);
  printf("%6zu of %6zu pages of %3zu MiB are dirty %s\n", dirty, run.n, unit / MIB, when);
  gpu_set(run.base, DIRT, size);
  gpu_wait();
  size_t all = gpu_dirty_pages(run.base, unit, run.n);
  EXPECT(all == run.n, "of %zu pages filled, %zu are seen as dirty: the count does not work", run.n, all);
  unmake(dev, &run);
}

/* Another process: fills pages, and ends after giving them back ("free") or waits to be killed ("kill"). */
static int other_process(int argc, char **argv) {
  if (argc != 5) fail("--other is for this program's own use");
  size_t size = strtoull(argv[3], NULL, 10), unit = strtoull(argv[4], NULL, 10);
  gpu_open(0);
  raw_device *dev;
  RAW(raw_cuda.open(0, &dev));
  raw_run run;
  make(dev, &run, size, unit);
  gpu_set(run.base, DIRT, size);
  gpu_wait();
  if (strcmp(argv[2], "free") == 0) {
    unmake(dev, &run);
    return 0;
  }
  if (write(STDOUT_FILENO, "f", 1) != 1) fail("the pipe broke");
  for (;;) (void)pause();
}

static void run_other(const char *how, size_t size, size_t unit) {
  char size_text[32], unit_text[32], byte;
  (void)snprintf(size_text, sizeof(size_text), "%zu", size);
  (void)snprintf(unit_text, sizeof(unit_text), "%zu", unit);
  int out[2], status = 0;
  if (pipe(out) != 0) fail("no pipe");
  (void)fflush(stdout);
  pid_t pid = fork();
  if (pid < 0) fail("no process");
  if (pid == 0) {
    (void)dup2(out[1], STDOUT_FILENO);
    (void)close(out[0]);
    (void)close(out[1]);
    (void)execl("/proc/self/exe", "fresh", "--other", how, size_text, unit_text, (char *)NULL);
    _exit(127);
  }
  (void)close(out[1]);
  int killed = strcmp(how, "kill") == 0;
  if (killed && read(out[0], &byte, 1) != 1) fail("the other process did not fill its pages");
  if (killed) (void)kill(pid, SIGKILL);
  (void)close(out[0]);
  if (waitpid(pid, &status, 0) != pid || (!killed && status != 0)) fail("the other process failed");
}

static void raw_part(raw_device *dev, uint64_t percent, size_t unit, uint64_t most) {
  size_t size = size_now(dev, percent, unit, most);
  look(dev, size, unit, "as found");
  look(dev, size, unit, "after this process filled and freed them");
  run_other("free", size, unit);
  look(dev, size, unit, "after another process filled and freed them");
  run_other("kill", size, unit);
  look(dev, size, unit, "after another process filled them and was killed");
  void *plain = gpu_alloc(size / 2);
  gpu_set(plain, DIRT, size / 2);
  gpu_wait();
  gpu_free(plain);
  look(dev, size, unit, "after plain device memory was filled and freed (half as much)");
}

static void library_part(raw_device *dev, uint64_t percent, uint64_t most) {
  kvcached_ctx_t ctx = open_gpu(64 * MIB);
  size_t page = kvcached_page_size(ctx), size = size_now(dev, percent, page, most), n = size / page;
  for (int round = 0; round < 3; round++) {
    kvcached_region_t region;
    KVC(kvcached_reserve(ctx, KVCACHED_KV, size, &region));
    KVC(kvcached_ensure(region, 0, size));
    char *base = kvcached_region_base(region);
    size_t dirty = gpu_dirty_pages(base, page, n);
    EXPECT(dirty == 0, "%zu of %zu pages that the library ensured are dirty", dirty, n);
    gpu_set(base, DIRT, size);
    gpu_wait();
    KVC(kvcached_release(region, 0, size));
    KVC(kvcached_ensure(region, 0, size));
    dirty = gpu_dirty_pages(base, page, n);
    EXPECT(dirty == 0, "%zu of %zu recycled pages that the library ensured are dirty", dirty, n);
    gpu_set(base, DIRT, size);
    gpu_wait();
    kvcached_unreserve(region); /* some of them stay in the pool */
  }
  kvcached_shutdown(ctx);
}

int main(int argc, char **argv) {
  if (argc > 1 && strcmp(argv[1], "--other") == 0) return other_process(argc, argv);
  uint64_t percent = argument(argc, argv, "--percent", 80), most = argument(argc, argv, "--size", 32 * GIB);
  done_arguments(argc, argv);
  gpu_open(0);
  printf("%s\n", gpu_name());
  raw_device *dev;
  RAW(raw_cuda.open(0, &dev));
  library_part(dev, percent, most); /* first: the card may still hold what others left */
  raw_part(dev, percent, 2 * MIB, most);
  raw_part(dev, percent, 64 * MIB, most);
  library_part(dev, percent, most);
  dev->ops->close(dev);
  return verdict("fresh", "counts above; pages from the library are always zero");
}
