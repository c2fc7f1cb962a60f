/*
 * Host memory for sleeping content. Chunks are only ever added and taken at the end of a region's list, and
 * each is claimed of the host budget from before it is allocated until after it is freed.
 */
#include "context.h"

#include <inttypes.h>
#include <stdlib.h>

/* Room for one entry more in an array that grows by doubling: the array, or NULL. */
static void *roomier(void *array, size_t n, size_t *capacity, size_t entry) {
  if (n < *capacity) return array;
  size_t more = *capacity ? *capacity * 2 : 16;
  void *grown = realloc(array, more * entry);
  if (grown) *capacity = more;
  return grown;
}

/* ---- chunks ---- */

static int reserve_entry(kvc_hostcopy *c) {
  kvc_host_chunk *list = roomier(c->chunk, c->n, &c->capacity_chunks, sizeof(*list));
  if (!list) return kvc_fail(KVCACHED_E_NOMEM, "no memory for the list of %zu host chunks", c->n + 1);
  c->chunk = list;
  return KVCACHED_OK;
}

static void append(kvc_hostcopy *c, kvc_host_chunk chunk) {
  c->chunk[c->n++] = chunk;
  c->capacity += chunk.size;
  if (chunk.pinned) c->pinned += chunk.size;
}

/* Size of the chunk to add, in whole pages of the host; 0: there is enough. */
static size_t next_size(const kvc_hostcopy *c, size_t need) {
  if (need <= c->capacity) return 0;
  size_t size = (need - c->capacity + 4095) & ~(size_t)4095;
  return size < KVC_HOST_CHUNK ? size : KVC_HOST_CHUNK;
}

int kvc_hostcopy_grow(struct kvcached_region *r, size_t need) {
  struct kvcached_ctx *ctx = r->ctx;
  kvc_host_chunk chunk = {.size = next_size(&r->copy, need)};
  if (chunk.size == 0) return 0;
  int err = reserve_entry(&r->copy);
  if (!err) err = kvc_claim_host(ctx, chunk.size, ctx->options.room_wait_ms);
  if (err) return err;
  err = kvc_call(ctx)->host_alloc(ctx->device, chunk.size, &chunk.p, &chunk.pinned);
  if (err) {
    kvc_unclaim_host(ctx, chunk.size);
    return err;
  }
  append(&r->copy, chunk);
  return 1;
}

/* Whether `region` is (still) one of the context's. */
static int is_region(const struct kvcached_ctx *ctx, const struct kvcached_region *region) {
  const struct kvcached_region *r = ctx->regions;
  while (r && r != region) r = r->next;
  return r != NULL;
}

/* Frees a chunk that has no region. One that cannot be freed now becomes some region's, and goes with it. */
static void discard(struct kvcached_ctx *ctx, kvc_host_chunk chunk) {
  if (kvc_call(ctx)->host_free(ctx->device, chunk.p, chunk.size, chunk.pinned) == KVCACHED_OK) {
    kvc_unclaim_host(ctx, chunk.size);
    return;
  }
  kvc_log(ctx, KVCACHED_LOG_WARN, "%zu bytes of host memory stay for now: %s", chunk.size,
          kvcached_last_error());
  if (ctx->regions && reserve_entry(&ctx->regions->copy) == KVCACHED_OK) append(&ctx->regions->copy, chunk);
}

int kvc_hostcopy_grow_unlocked(struct kvcached_region *r, size_t need) {
  struct kvcached_ctx *ctx = r->ctx;
  kvc_host_chunk chunk = {.size = next_size(&r->copy, need)};
  if (chunk.size == 0) return 0;
  int err = kvc_claim_host(ctx, chunk.size, 0); /* nobody waits for the helper, who holds the mutex */
  if (err) return err;
  (void)pthread_mutex_unlock(&ctx->mutex);
  err = kvc_call(ctx)->host_alloc(ctx->device, chunk.size, &chunk.p, &chunk.pinned);
  (void)pthread_mutex_lock(&ctx->mutex);
  if (err) {
    kvc_unclaim_host(ctx, chunk.size);
    return err;
  }
  /* Meanwhile the region may have been freed, or another made at its place, or put to sleep with memory that
     it got itself: the chunk goes to a region that lacks as much, or back. */
  if (is_region(ctx, r) && !r->copy.valid && !kvc_sleeps(r) &&
      kvc_hostcopy_need(r) >= r->copy.capacity + chunk.size) {
    err = reserve_entry(&r->copy);
    if (!err) {
      append(&r->copy, chunk);
      return 1;
    }
  }
  discard(ctx, chunk);
  return err ? err : 1;
}

int kvc_hostcopy_shrink(struct kvcached_region *r, size_t n, uint64_t *freed) {
  struct kvcached_ctx *ctx = r->ctx;
  kvc_hostcopy *c = &r->copy;
  while (c->n > n) {
    kvc_host_chunk chunk = c->chunk[c->n - 1];
    /* What is copied so far may end in this chunk. */
    if (c->used > c->capacity - chunk.size) kvc_hostcopy_invalidate(r);
    int err = kvc_call(ctx)->host_free(ctx->device, chunk.p, chunk.size, chunk.pinned);
    if (err) return err;
    c->n--;
    c->capacity -= chunk.size;
    if (chunk.pinned) c->pinned -= chunk.size;
    kvc_unclaim_host(ctx, chunk.size);
    *freed += chunk.size;
  }
  return KVCACHED_OK;
}

int kvc_hostcopy_free(struct kvcached_region *r, uint64_t *freed) {
  kvc_hostcopy *c = &r->copy;
  int err = kvc_hostcopy_shrink(r, 0, freed);
  if (err) return err;
  free(c->chunk);
  free(c->run);
  c->chunk = NULL;
  c->run = NULL;
  c->capacity_chunks = c->capacity_runs = 0;
  return KVCACHED_OK;
}

/* ---- what the chunks hold ---- */

static void drop_content(kvc_hostcopy *c) {
  c->valid = 0;
  c->runs = 0;
  c->used = c->done = 0;
  c->generation++;
}

void kvc_hostcopy_invalidate(struct kvcached_region *r) {
  if (kvc_sleeps(r)) return;
  drop_content(&r->copy);
  r->copy.wanted = 0; /* what is being written now is not complete before its owner says so again */
}

void kvc_hostcopy_forget(struct kvcached_region *r) {
  uint64_t freed = 0;
  drop_content(&r->copy);
  r->copy.zero = 1;
  if (kvc_hostcopy_free(r, &freed))
    kvc_log(r->ctx, KVCACHED_LOG_WARN, "%zu bytes of host memory of a cleared region stay: %s",
            r->copy.capacity, kvcached_last_error());
}

size_t kvc_hostcopy_need(const struct kvcached_region *r) { return (size_t)kvc_state_bytes(r, KVC_ENSURED); }

int kvc_hostcopy_begin(struct kvcached_region *r) {
  kvc_hostcopy *c = &r->copy;
  drop_content(c);
  for (size_t i = 0, n; i < r->pages.top; i += n) {
    n = kvc_pages_run(&r->pages, i, r->pages.top);
    if (r->pages.state[i] != KVC_ENSURED) continue;
    kvc_host_run *list = roomier(c->run, c->runs, &c->capacity_runs, sizeof(*list));
    if (!list) {
      drop_content(c);
      return kvc_fail(KVCACHED_E_NOMEM, "no memory for the list of what is copied of a region of %zu bytes",
                      r->space.size);
    }
    c->run = list;
    c->run[c->runs++] = (kvc_host_run){.first = i, .n = n, .off = c->used};
    c->used += kvc_bytes(r, i, n);
  }
  return KVCACHED_OK;
}

/* ---- copying ---- */

/* Copies between `len` bytes of the region at space_off and the chunks' bytes from copy_off on. */
static int transfer(struct kvcached_region *r, kvc_lane lane, int to_region, size_t space_off,
                    size_t copy_off, size_t len) {
  struct kvcached_ctx *ctx = r->ctx;
  size_t begin = 0; /* of the chunk, in the chunks' bytes */
  for (const kvc_host_chunk *k = r->copy.chunk; len > 0; begin += k->size, k++) {
    if (copy_off >= begin + k->size) continue;
    size_t room = begin + k->size - copy_off, piece = len < room ? len : room;
    char *host = (char *)k->p + (copy_off - begin);
    int err = to_region ? kvc_call(ctx)->write(ctx->device, lane, &r->space, space_off, host, piece)
                        : kvc_call(ctx)->read(ctx->device, lane, &r->space, space_off, host, piece);
    if (err) return err;
    space_off += piece;
    copy_off += piece;
    len -= piece;
  }
  return KVCACHED_OK;
}

int kvc_hostcopy_read(struct kvcached_region *r, kvc_lane lane, size_t from, size_t end) {
  const kvc_hostcopy *c = &r->copy;
  for (const kvc_host_run *run = c->run; run < c->run + c->runs && run->off < end; run++) {
    size_t run_end = run->off + kvc_bytes(r, run->first, run->n);
    if (run_end <= from) continue;
    size_t begin = run->off > from ? run->off : from, stop = run_end < end ? run_end : end;
    int err = transfer(r, lane, 0, run->first * r->unit + (begin - run->off), begin, stop - begin);
    if (err) return err;
  }
  return KVCACHED_OK;
}

int kvc_hostcopy_write(struct kvcached_region *r, kvc_lane lane, size_t first, size_t n) {
  const kvc_hostcopy *c = &r->copy;
  size_t low = 0, high = c->runs, end = first + n;
  while (low < high) { /* the first run that ends after `first` */
    size_t mid = low + (high - low) / 2;
    if (c->run[mid].first + c->run[mid].n <= first)
      low = mid + 1;
    else
      high = mid;
  }
  for (const kvc_host_run *run = c->run + low; run < c->run + c->runs && run->first < end; run++) {
    size_t a = run->first > first ? run->first : first;
    size_t b = run->first + run->n < end ? run->first + run->n : end;
    int err = transfer(r, lane, 1, a * r->unit, run->off + kvc_bytes(r, run->first, a - run->first),
                       kvc_bytes(r, a, b - a));
    if (err) return err;
  }
  return KVCACHED_OK;
}

/* ---- giving back ---- */

/* Chunks at the end of the list that hold nothing of the first `need` bytes. */
static size_t chunks_for(const kvc_hostcopy *c, size_t need) {
  size_t n = 0, bytes = 0;
  while (n < c->n && bytes < need) bytes += c->chunk[n++].size;
  return n;
}

int kvc_hostcopy_press(struct kvcached_ctx *ctx, unsigned kinds, int copies, uint64_t bytes) {
  uint64_t freed = 0;
  for (int dear = 0; dear <= (copies != 0); dear++) { /* buffers first */
    for (struct kvcached_region *r = ctx->regions; r && freed < bytes; r = r->next) {
      kvc_hostcopy *c = &r->copy;
      if (c->reading) continue;
      int asked = (kinds & KVCACHED_KIND_BIT(r->kind)) != 0 && !c->uncopied;
      size_t keep = c->n;
      if (kvc_sleeps(r) || c->valid)
        keep = chunks_for(c, c->used);
      else
        keep = asked ? chunks_for(c, kvc_hostcopy_need(r)) : 0;
      if (dear && c->valid && !kvc_sleeps(r) && r->reload && r->kind == KVCACHED_WEIGHTS) keep = 0;
      if (kvc_hostcopy_shrink(r, keep, &freed))
        kvc_log(ctx, KVCACHED_LOG_WARN, "host memory of a region stays: %s", kvcached_last_error());
    }
  }
  return freed > 0;
}

int kvcached_trim_host(kvcached_ctx_t ctx, int weights, size_t *freed) {
  if (freed) *freed = 0;
  int err = kvc_check_ctx(ctx);
  if (err) return err;
  uint64_t got = 0;
  (void)pthread_mutex_lock(&ctx->mutex);
  /* What prepare_sleep asked for would only be allocated again. */
  ctx->sleep_ahead &= weights ? 0u : ~KVCACHED_KIND_BIT(KVCACHED_KV);
  for (struct kvcached_region *r = ctx->regions; r;) {
    if (r->copy.reading) {
      kvc_wait_all(ctx); /* the list may be another one after */
      r = ctx->regions;
      continue;
    }
    const kvc_hostcopy *c = &r->copy;
    size_t keep = 0;
    if (kvc_sleeps(r))
      keep = chunks_for(c, c->used);
    else if (r->kind == KVCACHED_WEIGHTS && !weights)
      keep = c->n;
    int e = kvc_hostcopy_shrink(r, keep, &got);
    if (e && !err) err = e;
    r = r->next;
  }
  kvc_reap(ctx);
  kvc_publish(ctx);
  (void)pthread_mutex_unlock(&ctx->mutex);
  if (freed) *freed = (size_t)got;
  return err;
}
