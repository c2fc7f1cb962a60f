/* The library's figures against the system's, the driver's and the ledger's. */
#include "context.h"
#include "fault.h"
#include "runner.h"
#include "support.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <unistd.h>

static void walk_smaps(const void *base, size_t size, size_t *huge, size_t *count) {
  uintptr_t lo = (uintptr_t)base, hi = lo + size;
  FILE *f = fopen("/proc/self/smaps", "re");
  CHECK(f != NULL);
  char line[512];
  int inside = 0;
  *huge = *count = 0;
  while (fgets(line, sizeof(line), f)) {
    uintptr_t a, b;
    size_t kb;
    if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " ", &a, &b) == 2) {
      inside = a < hi && b > lo;
      if (!inside) continue;
      CHECK(a >= lo && b <= hi);
      ++*count;
    } else if (inside && sscanf(line, "AnonHugePages: %zu kB", &kb) == 1) {
      *huge += kb * KIB;
    }
  }
  fclose(f);
}

size_t resident(const void *base, size_t size) {
  static int fd = -1;
  static pid_t owner;
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  if (owner != getpid()) { /* the file is of the process that opened it */
    fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    owner = getpid();
  }
  CHECK(fd >= 0);
  size_t sum = 0;
  uint64_t entry[512];
  for (size_t i = 0, n = size / page; i < n;) {
    size_t want = (n - i < 512 ? n - i : 512) * sizeof(entry[0]);
    ssize_t got = pread(fd, entry, want, (off_t)(((uintptr_t)base / page + i) * sizeof(entry[0])));
    CHECK_EQ(got, want);
    for (size_t k = 0; k < want / sizeof(entry[0]); k++) sum += (entry[k] >> 62) != 0 ? page : 0;
    i += want / sizeof(entry[0]);
  }
  return sum;
}

size_t huge_pages(const void *base, size_t size) {
  size_t huge, count;
  walk_smaps(base, size, &huge, &count);
  return huge;
}

size_t mappings(const void *base, size_t size) {
  size_t huge, count;
  walk_smaps(base, size, &huge, &count);
  return count;
}

int accessible(const void *p) {
  static int pipe_fd[2] = {-1, -1};
  if (pipe_fd[0] < 0) CHECK(pipe(pipe_fd) == 0);
  ssize_t n = write(pipe_fd[1], p, 1); /* the kernel reads the byte */
  if (n < 0) {
    CHECK_EQ(errno, EFAULT);
    return 0;
  }
  n = read(pipe_fd[0], (void *)(uintptr_t)p, 1); /* and writes it back */
  if (n < 0) {
    CHECK_EQ(errno, EFAULT);
    char c;
    CHECK(read(pipe_fd[0], &c, 1) == 1);
    return 0;
  }
  return 1;
}

kvcached_stats_t stats_of(kvcached_ctx_t ctx) {
  kvcached_stats_t s = {.struct_size = sizeof(s)};
  CHECK_OK(kvcached_stats(ctx, &s));
  return s;
}

kvcached_stats_t region_stats_of(kvcached_region_t r) {
  kvcached_stats_t s = {.struct_size = sizeof(s)};
  CHECK_OK(kvcached_region_stats(r, &s));
  return s;
}

/* The pages counted one by one against the counts that the library keeps. */
static void check_pages(kvcached_region_t r) {
  const kvc_pages *p = &r->pages;
  size_t count[KVC_STATES] = {0}, top = 0;
  CHECK_EQ(p->n, (r->space.size + r->unit - 1) / r->unit);
  for (size_t i = 0; i < p->n; i++) {
    CHECK(p->state[i] < KVC_STATES);
    count[p->state[i]]++;
    if (p->state[i] != KVC_UNMAPPED) top = i + 1;
  }
  CHECK_EQ(p->top, top);
  CHECK_EQ(count[KVC_BUSY] + count[KVC_WAKING], 0);
  for (int k = 0; k < KVC_STATES; k++) CHECK_EQ(p->count[k], count[k]);
}

void check_region(kvcached_region_t r) {
  kvcached_stats_t s = region_stats_of(r);
  size_t size = kvcached_region_size(r), ensured_bytes = 0;
  char *base = kvcached_region_base(r);
  if (on_host()) CHECK_EQ(resident(base, size), s.mapped);
  for (size_t off = 0, run; off < size; off += run) {
    int ensured;
    CHECK_OK(kvcached_mapped_run(r, off, size - off, &run, &ensured));
    CHECK(run > 0);
    if (!ensured) continue;
    if (on_host() && r->pages.count[KVC_ASLEEP] == 0)
      CHECK(accessible(base + off) && accessible(base + off + run - 1));
    ensured_bytes += run;
  }
  CHECK_EQ(ensured_bytes, s.mapped - s.idle + s.asleep);
  CHECK_EQ(s.kind_mapped[r->kind], s.mapped);
  CHECK_LE(s.ready, s.idle);
  CHECK_LE(s.mapped + s.asleep, s.reserved);
  pthread_mutex_lock(&r->ctx->mutex);
  check_pages(r);
  pthread_mutex_unlock(&r->ctx->mutex);
}

uint64_t memory_held(kvcached_ctx_t ctx) {
  if (on_host()) {
    uint64_t sum = 0;
    for (kvcached_region_t r = ctx->regions; r; r = r->next) sum += resident(r->space.base, r->space.size);
    return sum;
  }
  uint64_t free_bytes, total;
  CHECK_OK(kvcached_device_memory(ctx, &free_bytes, &total));
  uint64_t before;
  (void)support_used_before(&before);
  return total - free_bytes > before ? total - free_bytes - before : 0;
}

/* Whether the helper has nothing to do and is not in the middle of anything. */
static int is_settled(kvcached_ctx_t ctx) {
  pthread_mutex_lock(&ctx->mutex);
  uint64_t host = 0;
  int settled = !ctx->worker_region && ctx->sleep_ahead == 0;
  for (kvcached_region_t r = ctx->regions; r; r = r->next) {
    host += r->copy.capacity;
    settled &= !kvc_is_ahead(r);
  }
  settled &= ctx->host_claim == host; /* a piece on its way to a region belongs to none */
  pthread_mutex_unlock(&ctx->mutex);
  return settled;
}

void check_context(kvcached_ctx_t ctx) {
  WAIT_FOR(is_settled(ctx));
  kvcached_stats_t s = stats_of(ctx);
  uint64_t mapped = 0, idle = 0, ready = 0, asleep = 0, reserved = 0, host = 0, pinned = 0;
  for (kvcached_region_t r = ctx->regions; r; r = r->next) {
    check_region(r);
    kvcached_stats_t t = region_stats_of(r);
    mapped += t.mapped;
    idle += t.idle;
    ready += t.ready;
    asleep += t.asleep;
    reserved += t.reserved;
    host += t.host_bytes;
    pinned += t.host_pinned;
    CHECK_EQ(r->copy.capacity, t.host_bytes);
    size_t chunks = 0;
    for (size_t i = 0; i < r->copy.n; i++) chunks += r->copy.chunk[i].size;
    CHECK_EQ(chunks, r->copy.capacity);
  }
  CHECK_EQ(s.mapped, mapped);
  CHECK_EQ(s.idle, idle);
  CHECK_EQ(s.ready, ready);
  CHECK_EQ(s.asleep, asleep);
  CHECK_EQ(s.reserved, reserved);
  CHECK_EQ(s.host_bytes, host);
  CHECK_EQ(s.host_pinned, pinned);
  CHECK_EQ(s.kind_mapped[0] + s.kind_mapped[1] + s.kind_mapped[2], mapped);
  CHECK_EQ(s.pooled, kvc_pool_bytes(ctx));
  CHECK_LE(ctx->pool.n * s.page_size, ctx->options.pool_limit);
  CHECK_EQ(ctx->claim, s.mapped + s.pooled);
  CHECK_EQ(ctx->host_claim, s.host_bytes);
  if (ctx->ledger) {
    kvcached_slot_t slot = slot_in(kvcached_ledger_path(ctx->ledger), ctx->slot);
    CHECK_EQ(slot.claim, ctx->claim);
    CHECK_EQ(slot.host_bytes, s.host_bytes);
    CHECK_EQ(slot.idle, s.idle);
    CHECK_EQ(slot.pooled, s.pooled);
    CHECK_EQ(slot.asleep, s.asleep);
    CHECK_EQ(slot.reserved, s.reserved);
    for (int k = 0; k < 3; k++) CHECK_EQ(slot.kind_bytes[k], s.kind_mapped[k]);
  }
  if (support_is_one_context()) { /* the account of the backend's calls is this context's */
    fault_held h = fault_now();
    CHECK_EQ(h.mapped, s.mapped);
    CHECK_EQ(h.reserved, s.reserved);
    CHECK_EQ(h.host_bytes, s.host_bytes);
    if (!on_host()) CHECK_EQ(h.handle_bytes, s.mapped + s.pooled);
  }
  if (on_host()) {
    CHECK_EQ(memory_held(ctx), s.mapped);
    CHECK_EQ(s.pooled, 0);
  } else if (support_used_before(&(uint64_t){0})) {
    /* A real driver also counts what it needs for itself, for instance tables of pages. */
    uint64_t held = memory_held(ctx), slack = getenv("FAKE_CUDA_MEMORY") ? 0 : 64 * MIB;
    CHECK_LE(s.mapped + s.pooled, held + slack);
    CHECK_LE(held, s.mapped + s.pooled + slack);
  }
}
