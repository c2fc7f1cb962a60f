/*
 * Contexts and regions as the library sees them.
 *
 *   context.c   options, life, claims                 gate.c      who is inside, and who wants to be alone
 *   figures.c   stats, the slot's figures, limits     sleep.c     sleep, and preparing it
 *   region.c    the public calls on pages             wake.c      memory and content for sleepers
 *   ensure.c    making pages usable, own room         hostcopy.c  host memory that keeps sleeping content
 *   fill.c      memory under runs of pages, undoing   room.c      own idle memory, then other processes
 *   pool.c      handles without an address            ahead.c     look-ahead
 *   access.c    read, write, clear; alloc and free    worker.c    the helper thread, idle time
 *   process.c   which process this is                 control.c   the thread that answers commands
 *   park.c      waiting for the lessor to make room
 *   measure.c   what the process holds on the device beside the pages
 *
 * Locks, in the order they are taken: the gate (shared or alone), then ctx->mutex, then those of the ledger.
 * Whoever holds the mutex never waits for the gate. Driver calls are made with the mutex held, but those of
 * the helper thread: it marks its pages BUSY, lets go of the mutex, works, and takes it again to publish; who
 * needs a BUSY page waits on ctx->busy_cond. Waits for other processes are made without the mutex
 * (kvc_make_room lets go of it).
 *
 * The rule that everything keeps: bytes claimed = bytes of pages with memory (ENSURED, READY, IDLE, BUSY,
 * WAKING, and stuck ones that are ASLEEP) + bytes of the pool. A claim is made before memory is taken and
 * dropped after it is given back, so a process killed anywhere in between leaves nothing, and others never
 * see less claimed than held.
 */
#ifndef KVC_CONTEXT_H
#define KVC_CONTEXT_H

#include "backend.h"
#include "gate.h"
#include "hostcopy.h"
#include "ledger.h"
#include "pages.h"
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

typedef struct kvc_counters {
  uint64_t ensures, releases, trims, limit_failures, sleeps, wakes, last_sleep_ns, last_wake_ns, parks;
} kvc_counters;

/* Pages asked for by prepare: [first, end) now, then the spans of `rest` from `at` on. first >= end: nothing,
   and there is no rest either. */
typedef struct kvc_ahead {
  size_t first, end;
  kvc_span *rest;
  size_t at, n;
} kvc_ahead;

/* A call that may have to wait for room, and what it needs to go on. Zero but for the first part: nothing was
   waited for yet. */
typedef struct kvc_parking {
  struct kvcached_region *region; /* what is unmapped in these spans of it is missing */
  kvc_spans spans;
  uint64_t more;                /* bytes that are missing beside pages */
  unsigned kinds;               /* regions that have to be awake ... */
  struct kvcached_region *only; /* ... or this one alone */
  struct kvc_parking *next;     /* of the context */
  int64_t since_ns, until_ns, fitted_ns;
  uint32_t refusals;
  int wakes;  /* all that the call does: if it fails nobody counts on anything being awake */
  int noted;  /* it was counted */
  int device; /* the device was short, rather than a limit */
} kvc_parking;

struct kvcached_region {
  struct kvcached_ctx *ctx;
  struct kvcached_region *next; /* older */
  int kind;                     /* kvcached_kind */
  int allocated;                /* made by kvcached_alloc */
  kvc_space space;
  size_t unit; /* bytes of a page of this region; the last one may be shorter */
  kvc_pages pages;
  kvc_hostcopy copy;
  kvcached_reload_fn reload;
  void *reload_user;
  int waking;      /* wake.c: how far a wake under way has come with it */
  int dead;        /* unreserved, but some of its memory could not be taken yet */
  kvc_ahead ahead; /* asked for by prepare, and not looked at yet */
  kvc_counters counters;
};

struct kvcached_ctx {
  pid_t pid; /* of the process that opened it */
  const kvc_backend *backend;
  kvc_device *device;
  kvc_gate gate;

  pthread_mutex_t mutex;      /* guards everything below but what is atomic */
  pthread_cond_t busy_cond;   /* a BUSY page is no longer so */
  pthread_cond_t work_cond;   /* there is work for the helper, or it shall stop */
  kvcached_options_t options; /* as given; its pointers are not to be used after open */
  uint64_t limit;             /* the caller's own; without a ledger, the one in force */
  kvcached_ledger_t ledger;   /* NULL = none */
  int slot;
  uint64_t fixed;                  /* bytes held outside the library, charged beside the pages */
  uint64_t said, measured;         /* of them: by kvcached_set_fixed, by NVML (measure.c) */
  uint64_t claim;                  /* bytes claimed on the device */
  uint64_t host_claim;             /* bytes claimed of the host budget */
  struct kvcached_region *regions; /* newest first */
  kvc_pool pool;
  kvc_counters counters;
  _Atomic size_t asleep; /* pages asleep in all regions: enter looks at it without the mutex */
  _Atomic uint64_t device_calls;
  _Atomic uint64_t last_inside_ns; /* of the last enter or leave */

  pthread_t worker, control;
  int worker_runs, control_runs; /* the threads exist */
  _Atomic int stopping;
  kvc_parking *parkings;     /* calls that wait for room, or try after they did */
  uint32_t parked;           /* threads that wait */
  uint32_t away;             /* threads that wait so elsewhere, and have left this gate for it */
  uint64_t wants;            /* bytes that they lack */
  _Atomic uint32_t refusals; /* how often the lessor refused */
  int fell;                  /* the claim has fallen since kvc_ring_fallen */
  int told;                  /* its lessor had it sleep while calls waited: it sleeps on until told to wake */
  unsigned sleep_ahead;      /* kinds that prepare_sleep asked for, still to be done by the helper */
  struct kvcached_region *worker_region; /* the region the helper works on without the mutex, or NULL */
  unsigned worker_waiters; /* threads in kvc_wait_worker: the helper begins nothing while there are any */
  int64_t changed_ns;      /* when pages last changed, for idle_trim_ms */
  uint64_t changes;        /* how often they did */
  uint64_t trim_tried; /* `changes` when the helper last trimmed: what it could not take waits for the next */
  int worker_rests; /* the helper waits without an end, and is to be told when there is something to trim */

  void (*log)(int level, const char *msg, void *user);
  void *log_user;
};

/* ---- context.c ---- */

void kvc_log(const struct kvcached_ctx *ctx, int level, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* getpid(), which is a system call, for next to nothing. */
pid_t kvc_pid(void);
/* E_FORKED when this process is not the context's own; E_INVAL for NULL. */
int kvc_check_ctx(const struct kvcached_ctx *ctx);

/* Adds bytes to the context's claim, within the limits; the mutex is held. On E_LIMIT *shortage says by how
   much they pass each. */
int kvc_claim(struct kvcached_ctx *ctx, uint64_t bytes, uint32_t wait_ms, kvc_shortage *shortage);
void kvc_unclaim(struct kvcached_ctx *ctx, uint64_t bytes);
/* The same for host memory. E_HOST_LIMIT. */
int kvc_claim_host(struct kvcached_ctx *ctx, uint64_t bytes, uint32_t wait_ms);
void kvc_unclaim_host(struct kvcached_ctx *ctx, uint64_t bytes);

/* Rings the ledger's bell if the claim has fallen since the last time. */
void kvc_ring_fallen(struct kvcached_ctx *ctx);

/* Tells the ledger what has changed, and begins the idle time anew; the mutex is held. */
void kvc_publish(struct kvcached_ctx *ctx);

/* A call of the backend that is counted: kvc_call(ctx)->map(ctx->device, ...). */
static inline const kvc_backend *kvc_call(struct kvcached_ctx *ctx) {
  atomic_fetch_add_explicit(&ctx->device_calls, 1, memory_order_relaxed);
  return ctx->backend;
}

/* Around the event function: calls that this thread makes in between are refused, they would wait for their
   own caller. */
void kvc_enter_event(void);
void kvc_leave_event(void);
/* Calls the event function with the context's figures; the mutex is held. The thread's error detail stays. */
void kvc_event(struct kvcached_ctx *ctx, int event);

/* Tells the ledger how many threads are inside, after one has gone in or out (gate.c). */
void kvc_mark_inside(struct kvcached_ctx *ctx, uint32_t inside);

/* ---- region.c ---- */

int kvc_reserve(struct kvcached_ctx *ctx, int kind, size_t size, size_t unit, struct kvcached_region **out);
/* Frees a region, its pages, copy and claims; the mutex is held. Where the device is not idle its memory
   stays for a later trim. */
void kvc_region_free(struct kvcached_region *region, int idle);
/* The pages of all spans ensured or none, waking the region if it sleeps; the mutex is held, and let go of
   while waiting for room. */
int kvc_ensure_spans(struct kvcached_region *region, kvc_spans spans);
/* The same for pages [first, end). */
int kvc_ensure(struct kvcached_region *region, size_t first, size_t end);
/* The same; `before` (end - first bytes) has the states that the pages had just before. */
int kvc_ensure_noting(struct kvcached_region *region, size_t first, size_t end, uint8_t *before);
/* E_INVAL, E_FORKED. */
int kvc_check_range(const struct kvcached_region *region, size_t off, size_t len);
/* The same for a list of ranges. */
int kvc_check_ranges(const struct kvcached_region *region, const kvcached_range_t *ranges, size_t n);
/* The pages that a range (len > 0) touches. */
static inline kvc_span kvc_touched(const struct kvcached_region *r, size_t off, size_t len) {
  return (kvc_span){off / r->unit, (off + len - 1) / r->unit + 1};
}
/* Where pages [first, first + n) begin and end in the region: its last page may be short. */
static inline size_t kvc_off(const struct kvcached_region *r, size_t first) { return first * r->unit; }
static inline size_t kvc_bytes(const struct kvcached_region *r, size_t first, size_t n) {
  return (first + n < r->pages.n ? (first + n) * r->unit : r->space.size) - first * r->unit;
}
/* Bytes of all pages in a state; of all that have memory. */
static inline uint64_t kvc_state_bytes(const struct kvcached_region *r, uint8_t state) {
  uint64_t bytes = (uint64_t)r->pages.count[state] * r->unit;
  return r->pages.state[r->pages.n - 1] == state ? bytes - r->pages.n * r->unit + r->space.size : bytes;
}
uint64_t kvc_mapped_bytes(const struct kvcached_region *r);
/* The same, waiting for the helper and the device first; the mutex is held, and let go of meanwhile. */
void kvc_unreserve(struct kvcached_region *region);
/* The end of a region whose memory the driver does not give back, at shutdown. */
void kvc_region_abandon(struct kvcached_region *region);
/* Frees dead regions whose memory has been taken meanwhile; the mutex is held. */
void kvc_reap(struct kvcached_ctx *ctx);
/* Counts a call that ends with E_LIMIT; returns err. The mutex is held. */
int kvc_note_limit(struct kvcached_region *r, int err);
/* The device idle before mappings change, where it has to be. */
int kvc_quiesce(struct kvcached_ctx *ctx);
/* After a failure: whether nothing runs any more that was queued on the lane. Memory that is still copied or
   zeroed must not be unmapped, a GPU's context does not survive it. The thread's error detail stays. */
int kvc_settle(struct kvcached_ctx *ctx, kvc_lane lane);

/* ---- fill.c: the mutex held, unless it says otherwise; states are set by them ---- */

/* Memory under the runs of `from` pages in [first, end) (UNMAPPED or ASLEEP), zeroed if `zero`, which become
   `to`. Zeros are queued on the caller's lane and not waited for: *queued becomes 1 where there are any. The
   claim for all pages but stuck ones (kvc_without) has been made; what handles from the pool bring along is
   dropped. All or none: on failure handles made are destroyed or pooled, and *kept says how
   many bytes of the claim are still held by memory. Pages that could not be unmapped again are stuck then:
   IDLE, or ASLEEP where they were so. */
int kvc_fill(struct kvcached_region *r, size_t first, size_t end, uint8_t from, uint8_t to, int zero,
             int *queued, uint64_t *kept);

/* The same for several spans, all or none, and a claim of kvc_missing() bytes made since the mutex was taken.
   queued: there is work on the caller's lane already that has to be finished too. */
int kvc_fill_missing(struct kvcached_region *r, kvc_spans spans, uint8_t from, uint8_t to, int zero,
                     int queued, uint64_t *kept);

/* Bytes of the `from` pages of [first, end) that have no memory: all but stuck ones. */
uint64_t kvc_without(const struct kvcached_region *r, size_t first, size_t end, uint8_t from);
/* The same of several spans, without what the pool has for them. */
uint64_t kvc_missing(const struct kvcached_region *r, kvc_spans spans, uint8_t from);

/* Takes the memory of a run of pages of one state, which become `to`. Handles go to the pool as far as
   `to_pool` bytes allow and the rest is destroyed. *freed: bytes whose claim the caller has to drop
   (destroyed). On failure the run is as before or, where it cannot even have its access back, stuck: ASLEEP
   if it was to be so, else IDLE. Callers have no use for its content any more, or have it elsewhere. */
int kvc_empty(struct kvcached_region *r, size_t first, size_t n, uint8_t to, uint64_t to_pool,
              uint64_t *freed);

/* One run of pages that get memory, for who does not hold the mutex meanwhile. */
typedef struct kvc_run {
  struct kvcached_region *r;
  size_t first, n; /* pages */
  kvc_lane lane;
  int zero;
  size_t given;  /* handles from the pool, in the table already: those of the first pages */
  size_t made;   /* handles in the table */
  size_t mapped; /* pages mapped */
  int queued;    /* work on the lane may not be finished */
  int running;   /* and cannot be waited for: what is mapped has to stay so */
} kvc_run;

/* Puts as many handles of the pool in the table as the run can use. */
void kvc_run_begin(kvc_run *run);
/* Makes the rest, maps, gives access and queues the zeroing; on failure to be undone. The mutex need not be
   held: nobody else may touch the run's pages. */
int kvc_run_make(kvc_run *run);
/* Waits for the zeroing; the mutex need not be held. */
int kvc_run_finish(kvc_run *run);
/* Undoes all of it; the pages become `from`, but stuck ones IDLE or ASLEEP. Adds the bytes that still have
   memory (stuck, pooled) to *held. The thread's error detail stays. */
void kvc_run_undo(kvc_run *run, uint8_t from, uint64_t *held);

/* Bytes that the pool may take up to its bound. */
uint64_t kvc_pool_room(const struct kvcached_ctx *ctx);
/* Bytes of the pool, and of handles that could not be destroyed. */
uint64_t kvc_pool_bytes(const struct kvcached_ctx *ctx);

/* The thread's error detail, kept over calls that may fail too. */
typedef struct kvc_detail {
  char text[1024];
} kvc_detail;
kvc_detail kvc_detail_keep(void);
int kvc_detail_again(int err, const kvc_detail *detail);

/* ---- room.c ---- */

/* Progress of one call that looks for room. Zero it before. */
typedef struct kvc_room {
  int64_t deadline_ns;  /* 0: not begun */
  uint64_t asked[2][2]; /* slots asked to trim, to sleep */
  int late;             /* one of them did not answer in time and may still be at it */
  int charged;          /* the card's limit is short, rather than its memory */
} kvc_room;

/* Bytes that a trim would give back. */
uint64_t kvc_spare_bytes(const struct kvcached_ctx *ctx);
/* Gives up ready, idle and pooled memory of the context for about `bytes` of it, but the spans of `keep`
   (NULL: all may go); the mutex is held throughout. Returns bytes unclaimed. The thread's error detail stays.
 */
uint64_t kvc_give_up_idle(struct kvcached_ctx *ctx, uint64_t bytes, const struct kvcached_region *keep,
                          kvc_spans spans);
/* Lets go of the mutex, has another process make room, takes the mutex again. 1: something may have changed,
   try again. 0: nobody is left to ask, or the time is up. The thread's error detail stays. */
int kvc_make_room(struct kvcached_ctx *ctx, kvc_room *room);
/* Bytes of kvc_spare_bytes that these spans use themselves: their idle and ready pages, and what the pool has
   for them. */
uint64_t kvc_own_use(const struct kvcached_region *region, kvc_spans spans);
/* What the process holds on the device beside the context's pages, as it was measured; on a leased slot it is
   charged, in place of what the lessor thought. The mutex is held. */
void kvc_set_measured(struct kvcached_ctx *ctx, uint64_t bytes);
/* Gives back pool, ready and idle memory until at most keep bytes remain; the mutex is held, the device idle.
 */
int kvc_trim(struct kvcached_ctx *ctx, uint64_t keep, uint64_t *freed);

/* ---- park.c: all with the mutex held ---- */

/* After a claim that failed with err, nothing kept of it: waits for room where the call may, letting go of
   the mutex and leaving the gate meanwhile. 1: there is some, try again. 0: fail, with the detail that is
   set. */
int kvc_park(struct kvcached_ctx *ctx, kvc_parking *parking, int err);
/* To be called at the end of the call. err: what came of it; if it failed, what slept meanwhile is woken
   first inside the gate. May let go of the mutex. Returns err. */
int kvc_park_end(struct kvcached_ctx *ctx, kvc_parking *parking, int err);
/* Whether the calling thread has to wait for the lessor to have the context wake. */
int kvc_must_sleep_on(const struct kvcached_ctx *ctx);
/* Tells the ledger what all calls that wait lack. */
void kvc_publish_wants(struct kvcached_ctx *ctx);
/* The calling thread is the library's own: it never waits so. */
void kvc_never_park(void);

/* ---- measure.c: the mutex is not held ---- */

/* Measures what the process holds on the device beside the pages, where that can be known. */
void kvc_measure(struct kvcached_ctx *ctx);
/* The same, if it was known before, and the context was used since *last_ns and is idle. */
void kvc_measure_again(struct kvcached_ctx *ctx, uint64_t *last_ns);

/* ---- sleep.c: all with the mutex held ---- */

/* Puts the regions of `kinds` to sleep; alone in the gate, the device idle. */
int kvc_sleep(struct kvcached_ctx *ctx, unsigned kinds, uint64_t *freed);
/* The same from the start: waits for the helper and the device first; alone in the gate. May let go of the
   mutex, before anything has changed. */
int kvc_sleep_alone(struct kvcached_ctx *ctx, unsigned kinds, uint64_t *freed);
/* The helper's part of prepare_sleep: does a bounded piece of it, letting go of the mutex meanwhile. 1: there
 * is more. */
int kvc_prepare_sleep_step(struct kvcached_ctx *ctx);

/* ---- wake.c: all with the mutex held ---- */

/* Whether a region has to be woken before its content may be touched. */
static inline int kvc_sleeps(const struct kvcached_region *r) { return r->pages.count[KVC_ASLEEP] > 0; }
/* Brings ctx->asleep, and what awake regions note of their sleep, up to date: to be called after anything
   that changed what kvc_sleeps says. */
void kvc_count_asleep(struct kvcached_ctx *ctx);
/* Whether the calling thread is inside this region's reload function: it holds the mutex already then, all
   pages that were asleep are ENSURED, and writes go straight to the backend. Asked before taking the mutex.
 */
int kvc_reloading(const struct kvcached_region *region);
/* Whether it is inside any. */
int kvc_in_reload(void);

/* Wakes one region, or all of `kinds`. May let go of the mutex while waiting for room. */
int kvc_wake_region(struct kvcached_region *region);
int kvc_wake(struct kvcached_ctx *ctx, unsigned kinds);
/* The same for a call that may wait, for what its parking says. */
int kvc_wake_for(struct kvcached_ctx *ctx, kvc_parking *parking);
/* Memory and content for a region's sleeping pages, all or none. *held: bytes claimed that no memory is under
   yet; what remains of it is the caller's to drop. E_NOMEM, E_DEVICE, E_RELOAD ... */
int kvc_refill(struct kvcached_region *region, uint64_t *held);

/* ---- ahead.c, worker.c, control.c (kvc_control_start, kvc_stop_threads) ---- */

/* Forgets what prepare asked for; the mutex is held. */
void kvc_forget_ahead(struct kvcached_region *region);
/* Whether there is something of it. */
static inline int kvc_is_ahead(const struct kvcached_region *r) { return r->ahead.first < r->ahead.end; }
/* One bounded piece of look-ahead by the helper; the mutex is held, and let go of meanwhile. */
void kvc_look_ahead(struct kvcached_region *region);
/* The part of kvc_publish for the idle time. */
void kvc_note_change(struct kvcached_ctx *ctx);
/* Starts the helper if it does not run; the mutex is held. */
int kvc_worker_start(struct kvcached_ctx *ctx);
/* Waits until the helper works neither on these pages nor on the region's copy; the mutex is held, and let go
   of meanwhile. */
void kvc_wait_worker(struct kvcached_region *region);
/* The same for all regions; what prepare asked for and has not been begun is forgotten. */
void kvc_wait_all(struct kvcached_ctx *ctx);
/* Waits for pages that the helper is making ready: 1 when there were some. */
int kvc_wait_busy(struct kvcached_ctx *ctx);
int kvc_control_start(struct kvcached_ctx *ctx);
/* Ends both threads; the mutex is not held. */
void kvc_stop_threads(struct kvcached_ctx *ctx);
/* Starts a thread of the library, all signals blocked. E_SYSTEM. */
int kvc_thread_start(pthread_t *thread, void *(*body)(void *), void *arg, const char *name);

#endif
