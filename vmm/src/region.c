/*
 * Regions: which of their pages have memory.
 *
 * The rule that every function here keeps: bytes claimed = bytes of ensured and idle pages. A claim is made
 * before memory is taken and dropped after it is given back, so a process killed anywhere in between leaves
 * nothing, and others never see less claimed than held.
 */
#include "context.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* Idle pages that may be taken: those of the context but [first, end) of one region (which is about to use
 * them itself). */
typedef struct keep_range {
  const struct kvcached_region *region;
  size_t first, end;
} keep_range;

static int check_range(const struct kvcached_region *r, size_t off, size_t len) {
  if (!r) return kvc_fail(KVCACHED_E_INVAL, "region is NULL");
  int err = kvc_check_process(r->ctx);
  if (err) return err;
  if (off > r->space.size || len > r->space.size - off)
    return kvc_fail(KVCACHED_E_INVAL, "%zu bytes at %zu: the region has %zu", len, off, r->space.size);
  return KVCACHED_OK;
}

static size_t idle_pages(const struct kvcached_ctx *ctx) {
  size_t n = 0;
  for (const struct kvcached_region *r = ctx->regions; r; r = r->next) n += r->pages.count[KVC_IDLE];
  return n;
}

/* Takes the memory of up to `want` idle pages; their claim stays for the caller to drop or use. *got: how
 * many. */
static int take_idle(struct kvcached_ctx *ctx, size_t want, keep_range keep, size_t *got) {
  *got = 0;
  for (struct kvcached_region *r = ctx->regions; r && *got < want; r = r->next) {
    size_t before = *got, end = r->pages.n, first, n;
    size_t skip_first = r == keep.region ? keep.first : 0, skip_end = r == keep.region ? keep.end : 0;
    int err = KVCACHED_OK;
    while (*got < want && r->pages.count[KVC_IDLE] > 0 &&
           (n = kvc_pages_last_idle(&r->pages, end, want - *got, skip_first, skip_end, &first)) > 0) {
      err = ctx->backend->unmap(&r->space, first * ctx->page_size, n * ctx->page_size);
      if (err) break;
      kvc_pages_set(&r->pages, first, n, KVC_UNMAPPED);
      *got += n;
      end = first;
    }
    if (*got > before) r->counters.trims++;
    if (err) return err;
  }
  return KVCACHED_OK;
}

/* Claims memory for `need` pages; where the limit leaves less, the claim of idle pages elsewhere is used for
   the rest, and they lose their memory. Nothing is taken from them unless that suffices. */
static int claim_pages(struct kvcached_ctx *ctx, size_t need, keep_range keep, size_t idle_elsewhere) {
  uint64_t page = ctx->page_size, excess;
  size_t take = 0; /* idle pages to use */
  for (;;) {
    size_t claimed = need > take ? need - take : 0;
    int err = KVCACHED_OK;
    if (claimed > 0) err = kvc_claim(ctx, claimed * page, &excess);
    if (err == KVCACHED_E_LIMIT) {
      uint64_t more = excess / page + (excess % page != 0);
      if (more > idle_elsewhere - take) return err;
      take += (size_t)more;
      continue;
    }
    if (err) return err;
    if (take == 0) return KVCACHED_OK;

    size_t got;
    err = take_idle(ctx, take, keep, &got);
    /* The claims of `got` pages have no memory now, and `need` of all that is claimed is what the caller
     * asked for. */
    if (err)
      kvc_unclaim(ctx, (claimed + got) * page);
    else if (take > need)
      kvc_unclaim(ctx, (take - need) * page);
    kvc_log(ctx, KVCACHED_LOG_DEBUG, "the limit is reached: %zu idle pages used for others", got);
    return err;
  }
}

/* Undoes the mapping of the runs of [first, end) that are still noted as unmapped. *stuck: pages that could
   not be unmapped, and are idle now. */
static void unmap_new(struct kvcached_region *r, size_t first, size_t end, size_t *stuck) {
  size_t page = r->ctx->page_size, n;
  *stuck = 0;
  for (size_t i = first; i < end; i += n) {
    n = kvc_pages_run(&r->pages, i, end);
    if (r->pages.state[i] != KVC_UNMAPPED) continue;
    if (r->ctx->backend->unmap(&r->space, i * page, n * page) == KVCACHED_OK) continue;
    kvc_pages_set(&r->pages, i, n, KVC_IDLE);
    *stuck += n;
  }
}

/* Memory under every unmapped page of [first, end), zeros in every idle one; states are the caller's to set.
 */
static int fill_range(struct kvcached_region *r, size_t first, size_t end, size_t *stuck) {
  const kvc_backend *backend = r->ctx->backend;
  size_t page = r->ctx->page_size, n, i;
  int err = KVCACHED_OK;
  *stuck = 0;
  for (i = first; i < end; i += n) {
    n = kvc_pages_run(&r->pages, i, end);
    if (r->pages.state[i] != KVC_UNMAPPED) continue;
    err = backend->map(&r->space, i * page, n * page);
    if (err) goto undo;
  }
  for (size_t k = first; k < end; k += n) {
    n = kvc_pages_run(&r->pages, k, end);
    if (r->pages.state[k] != KVC_IDLE) continue;
    err = backend->zero(&r->space, k * page, n * page);
    if (err) goto undo;
  }
  return KVCACHED_OK;

undo:
  unmap_new(r, first, i, stuck);
  return err;
}

static int ensure_once(struct kvcached_region *r, size_t first, size_t end) {
  struct kvcached_ctx *ctx = r->ctx;
  size_t count[KVC_STATES], stuck;
  kvc_pages_count(&r->pages, first, end, count);
  if (count[KVC_ENSURED] == end - first) return KVCACHED_OK;
  size_t need = count[KVC_UNMAPPED];
  keep_range keep = {r, first, end};
  if (need > 0) {
    int err = claim_pages(ctx, need, keep, idle_pages(ctx) - count[KVC_IDLE]);
    if (err) return err;
  }
  int err = fill_range(r, first, end, &stuck);
  if (err) {
    kvc_unclaim(ctx, (need - stuck) * (uint64_t)ctx->page_size);
    return err;
  }
  kvc_pages_set(&r->pages, first, end - first, KVC_ENSURED);
  r->counters.ensures++;
  ctx->counters.ensures++;
  return KVCACHED_OK;
}

int kvcached_ensure(kvcached_region_t r, size_t off, size_t len) {
  int err = check_range(r, off, len);
  if (err || len == 0) return err;
  struct kvcached_ctx *ctx = r->ctx;
  size_t first = off / ctx->page_size, end = (off + len - 1) / ctx->page_size + 1;
  (void)pthread_mutex_lock(&ctx->mutex);
  err = ensure_once(r, first, end);
  if (err == KVCACHED_E_NOMEM) {
    /* The system is short: what lies idle here goes back to it first, then once more. */
    size_t got = 0;
    (void)take_idle(ctx, SIZE_MAX, (keep_range){r, first, end}, &got);
    kvc_unclaim(ctx, got * (uint64_t)ctx->page_size);
    if (got > 0) {
      kvc_log(ctx, KVCACHED_LOG_WARN, "%s; %zu idle pages given back", kvcached_last_error(), got);
      err = ensure_once(r, first, end);
    }
  }
  if (err == KVCACHED_E_LIMIT) {
    r->counters.limit_failures++;
    ctx->counters.limit_failures++;
  }
  (void)pthread_mutex_unlock(&ctx->mutex);
  return err;
}

int kvcached_release(kvcached_region_t r, size_t off, size_t len) {
  int err = check_range(r, off, len);
  if (err) return err;
  struct kvcached_ctx *ctx = r->ctx;
  size_t first = off / ctx->page_size + (off % ctx->page_size != 0), end = (off + len) / ctx->page_size, n,
         changed = 0;
  (void)pthread_mutex_lock(&ctx->mutex);
  for (size_t i = first; i < end; i += n) {
    n = kvc_pages_run(&r->pages, i, end);
    if (r->pages.state[i] != KVC_ENSURED) continue;
    kvc_pages_set(&r->pages, i, n, KVC_IDLE);
    changed += n;
  }
  if (changed) {
    r->counters.releases++;
    ctx->counters.releases++;
  }
  (void)pthread_mutex_unlock(&ctx->mutex);
  return KVCACHED_OK;
}

int kvcached_trim(kvcached_ctx_t ctx, size_t keep_bytes, size_t *freed) {
  if (freed) *freed = 0;
  if (!ctx) return kvc_fail(KVCACHED_E_INVAL, "ctx is NULL");
  int err = kvc_check_process(ctx);
  if (err) return err;
  (void)pthread_mutex_lock(&ctx->mutex);
  size_t idle = idle_pages(ctx), keep = keep_bytes / ctx->page_size, got = 0;
  if (idle > keep) err = take_idle(ctx, idle - keep, (keep_range){0}, &got);
  kvc_unclaim(ctx, got * (uint64_t)ctx->page_size);
  if (got) ctx->counters.trims++;
  if (freed) *freed = got * ctx->page_size;
  (void)pthread_mutex_unlock(&ctx->mutex);
  return err;
}

int kvcached_mapped_run(kvcached_region_t r, size_t off, size_t len, size_t *run, int *ensured) {
  if (!run || !ensured) return kvc_fail(KVCACHED_E_INVAL, "%s is NULL", run ? "ensured" : "run");
  *run = 0;
  *ensured = 0;
  int err = check_range(r, off, len);
  if (err || len == 0) return err;
  struct kvcached_ctx *ctx = r->ctx;
  size_t first = off / ctx->page_size, end = (off + len - 1) / ctx->page_size + 1, i;
  (void)pthread_mutex_lock(&ctx->mutex);
  *ensured = r->pages.state[first] == KVC_ENSURED;
  for (i = first; i < end && (r->pages.state[i] == KVC_ENSURED) == *ensured;)
    i += kvc_pages_run(&r->pages, i, end);
  (void)pthread_mutex_unlock(&ctx->mutex);
  *run = i == end ? len : i * ctx->page_size - off;
  return KVCACHED_OK;
}

int kvcached_reserve(kvcached_ctx_t ctx, size_t size, kvcached_region_t *out) {
  if (!out) return kvc_fail(KVCACHED_E_INVAL, "out is NULL");
  *out = NULL;
  if (!ctx) return kvc_fail(KVCACHED_E_INVAL, "ctx is NULL");
  int err = kvc_check_process(ctx);
  if (err) return err;
  size_t page = ctx->page_size;
  if (size == 0) return kvc_fail(KVCACHED_E_INVAL, "a region of 0 bytes");
  if (size > SIZE_MAX - page)
    return kvc_fail(KVCACHED_E_NOMEM, "%zu bytes are more than there are addresses", size);
  size_t pages = (size + page - 1) / page;

  struct kvcached_region *r = calloc(1, sizeof(*r));
  if (!r) return kvc_fail(KVCACHED_E_NOMEM, "no memory for a region");
  r->ctx = ctx;
  /* The addresses first: a size that cannot be had is reported as that, rather than as the table for its
   * pages. */
  err = ctx->backend->reserve(pages * page, page, &r->space);
  if (err) goto fail;
  if (kvc_pages_init(&r->pages, pages) != 0) {
    err = kvc_fail(KVCACHED_E_NOMEM, "no memory for the states of %zu pages", pages);
    ctx->backend->release(&r->space);
    goto fail;
  }
  (void)pthread_mutex_lock(&ctx->mutex);
  r->next = ctx->regions;
  ctx->regions = r;
  ctx->reserved += r->space.size;
  if (ctx->ledger) kvc_ledger_set_reserved(ctx->ledger, ctx->slot, ctx->reserved);
  (void)pthread_mutex_unlock(&ctx->mutex);
  *out = r;
  return KVCACHED_OK;

fail:
  free(r);
  return err;
}

void kvc_region_free(struct kvcached_region *r) {
  struct kvcached_ctx *ctx = r->ctx;
  for (struct kvcached_region **p = &ctx->regions; *p; p = &(*p)->next) {
    if (*p == r) {
      *p = r->next;
      break;
    }
  }
  size_t mapped = r->pages.count[KVC_ENSURED] + r->pages.count[KVC_IDLE];
  ctx->reserved -= r->space.size;
  ctx->backend->release(&r->space);
  kvc_unclaim(ctx, mapped * (uint64_t)ctx->page_size);
  if (ctx->ledger) kvc_ledger_set_reserved(ctx->ledger, ctx->slot, ctx->reserved);
  kvc_pages_free(&r->pages);
  free(r);
}

void kvcached_unreserve(kvcached_region_t r) {
  if (!r || kvc_check_process(r->ctx)) return;
  struct kvcached_ctx *ctx = r->ctx;
  (void)pthread_mutex_lock(&ctx->mutex);
  kvc_region_free(r);
  (void)pthread_mutex_unlock(&ctx->mutex);
}

void *kvcached_region_base(kvcached_region_t r) { return r ? r->space.base : NULL; }

size_t kvcached_region_size(kvcached_region_t r) { return r ? r->space.size : 0; }

void kvc_region_add_stats(const struct kvcached_region *r, kvcached_stats_t *sum) {
  uint64_t page = r->ctx->page_size;
  sum->reserved += r->space.size;
  sum->mapped += (r->pages.count[KVC_ENSURED] + r->pages.count[KVC_IDLE]) * page;
  sum->idle += r->pages.count[KVC_IDLE] * page;
}

int kvcached_region_stats(kvcached_region_t r, kvcached_stats_t *out) {
  if (!r || !out) return kvc_fail(KVCACHED_E_INVAL, "%s is NULL", r ? "out" : "region");
  if (out->struct_size < sizeof(out->struct_size))
    return kvc_fail(KVCACHED_E_INVAL, "out->struct_size is %zu", out->struct_size);
  int err = kvc_check_process(r->ctx);
  if (err) return err;
  (void)pthread_mutex_lock(&r->ctx->mutex);
  kvcached_stats_t s = {0};
  kvc_region_add_stats(r, &s);
  s.ensures = r->counters.ensures;
  s.releases = r->counters.releases;
  s.trims = r->counters.trims;
  s.limit_failures = r->counters.limit_failures;
  err = kvc_stats_finish(r->ctx, &s, out);
  (void)pthread_mutex_unlock(&r->ctx->mutex);
  return err;
}
