/*
 * Host memory that keeps a region's content over sleep: a list of chunks, pinned where the backend can, and a
 * list of runs that says which pages lie where in them, one after the other. The context's mutex guards it;
 * every function here is called with the mutex held.
 */
#ifndef KVC_HOSTCOPY_H
#define KVC_HOSTCOPY_H

#include "backend.h"

#include <stddef.h>
#include <stdint.h>

struct kvcached_region;
struct kvcached_ctx;

/* Larger ones would make the helper's pieces long, smaller ones the copies slow. */
#define KVC_HOST_CHUNK ((size_t)64 << 20)

typedef struct kvc_host_chunk {
  void *p;
  size_t size;
  int pinned;
} kvc_host_chunk;

/* Pages [first, first + n) lie at `off` of the chunks' bytes. */
typedef struct kvc_host_run {
  size_t first, n, off;
} kvc_host_run;

typedef struct kvc_hostcopy {
  kvc_host_chunk *chunk;
  size_t n, capacity_chunks;
  size_t capacity;   /* bytes of all chunks, claimed of the host budget */
  size_t pinned;     /* the pinned part */
  kvc_host_run *run; /* sorted by page */
  size_t runs, capacity_runs;
  size_t used; /* bytes of all runs */
  size_t done; /* the first bytes of them that are copied; counted while a copy is being made */
  uint64_t
      generation; /* how often it was invalidated: who copies without the mutex looks whether it still holds
                   */
  int reading; /* the helper copies from the region's pages without the mutex: they may not lose their memory
                */
  int valid; /* the chunks hold the content of all runs. While pages sleep that is all ENSURED and ASLEEP ones
              */
  int wanted;   /* prepare_sleep was called since the content last changed: it is complete, and may be copied
                   ahead */
  int zero;     /* sleeping pages read as zero when they wake, whatever the kind: the region was cleared */
  size_t mark;  /* chunks there were before the sleep under way */
  int mixed;    /* some pages slept already before the sleep under way */
  int uncopied; /* the sleep under way does without a copy: the reload function restores the content */
} kvc_hostcopy;

/* The content of the region's pages is about to change, or which pages have content (write, clear, ensure of
   new pages, release): its copy holds no longer. Chunks stay. Nothing for a sleeping region: release needs no
   call there, since runs say where each page lies. */
void kvc_hostcopy_invalidate(struct kvcached_region *region);

/* A whole region that sleeps in full (no ENSURED page) was cleared: its pages wake as zeros, and
   the copy's memory goes back. */
void kvc_hostcopy_forget(struct kvcached_region *region);

/* Gives back all chunks. 0, or the first error; what could not be given back stays. */
int kvc_hostcopy_free(struct kvcached_region *region, uint64_t *freed);

/* Bytes that a copy of the region's ENSURED pages takes. */
size_t kvc_hostcopy_need(const struct kvcached_region *region);

/* One chunk more, of at most KVC_HOST_CHUNK bytes, until there are `need` in all: 1 when it was added, 0 when
   there is enough. The budget is not pressed for room. E_HOST_LIMIT, E_NOMEM. */
int kvc_hostcopy_grow(struct kvcached_region *region, size_t need);

/* Claims and allocates a chunk with the mutex let go of in between, for whichever region `region` names now.
   1: something changed, 0: there is enough. E_HOST_LIMIT, E_NOMEM. */
int kvc_hostcopy_grow_unlocked(struct kvcached_region *region, size_t need);

/* Gives back the last chunks until `n` remain. 0, or the first error: then more remain. */
int kvc_hostcopy_shrink(struct kvcached_region *region, size_t n, uint64_t *freed);

/* Notes the runs of ENSURED pages as what is about to be copied; done = 0. E_NOMEM. */
int kvc_hostcopy_begin(struct kvcached_region *region);

/* Queues reads of the noted bytes [from, end) into the chunks, one for each run and chunk. The one function
   here that needs no mutex: the caller sees to it that runs, chunks and pages stay (copy.reading). */
int kvc_hostcopy_read(struct kvcached_region *region, kvc_lane lane, size_t from, size_t end);

/* Queues writes of what the copy has of pages [first, first + n) into them. */
int kvc_hostcopy_write(struct kvcached_region *region, kvc_lane lane, size_t first, size_t n);

/* Gives back host memory that holds nothing the sleep of `kinds` under way needs, for about `bytes` of
   budget: buffers, and, if `copies`, the copies of awake regions that have a reload function. 1: there was
   some. */
int kvc_hostcopy_press(struct kvcached_ctx *ctx, unsigned kinds, int copies, uint64_t bytes);

#endif
