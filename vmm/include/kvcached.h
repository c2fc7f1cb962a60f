/*
 * libkvcached: device memory that is reserved in full and occupied only where it is in use.
 *
 * A context (kvcached_ctx_t) owns the pages of one device under the limits of its group and of the card. A
 * region is a range of addresses reserved from it: its base never changes, and each of its pages is in one of
 * these states:
 *
 *               ensure                        release
 *   unmapped ------------> ensured (in use) ------------> idle (content dropped, memory kept for reuse)
 *    ^  ^  |                ^  ^  |    ^                   |  |
 *    |  |  | prepare        |  |  |    +------ ensure -----+  |
 *    |  |  v                |  |  | sleep                     |
 *    |  | ready ---ensure---+  |  v                           |
 *    |  |  |                   | asleep (no memory; content in host memory, reloadable or dropped)
 *    |  +--+-- trim, pressure  +--- wake: enter, ensure, read, write ...
 *    +------------------------------- trim, pressure ---------+
 *
 * Ensured, ready and idle pages have memory and count as `mapped`; an unmapped or sleeping page has none, and
 * touching it is a fault (host: SIGSEGV; a kernel on a GPU: the context is lost, so enter the gate first).
 *
 * The ledger is one small shared file a user and device. Every process using the library has a slot in it and
 * claims there what it takes, before taking it; so processes keep common limits with no server between them.
 *
 * Conventions
 * - Units: sizes, offsets and limits are bytes, times are milliseconds unless the name says _ns.
 * - Errors: functions returning int return KVCACHED_OK (0) or a negative kvcached_error. What went wrong in
 *   detail (numbers, names, errno) is in kvcached_last_error(). A call that fails leaves states, counts,
 *   claims and memory as they were, save that idle pages may have been given back to make room; and that
 *   pages which the system neither takes nor gives access to again are idle after, or asleep if they were to
 *   sleep, and keep their memory and its claim. The next ensure or wake gives them access, or fails; a trim
 *   takes them.
 * - Threads: any function may be called from any thread unless it says otherwise. Calls on one context are
 *   serialised, but the library's own helper thread works beside them. No handle may be used while or after
 *   it is being closed (shutdown, unreserve, ledger_close).
 * - Order: reading and writing the memory is the caller's to order against release and unreserve, which drop
 *   content. Work on a GPU that touches pages must have finished before they are released.
 * - Waiting: nothing waits without a bound. A wait for another process ends after room_wait_ms at the latest
 *   (about one second by default), whether that process answers, hangs or is stopped; that for a lessor after
 *   group_wait_ms, where that was asked for.
 * - The host process: the library never exits, aborts, prints or changes signal handling; its threads block
 *   all signals, its descriptors are close-on-exec, the caller's current CUDA context is what it was.
 * - Fork: a child made by fork without exec has no part in its parent's handles. Functions returning int
 *   return KVCACHED_E_FORKED, void ones do nothing, and host regions are not in its address space. The child
 *   drops its copies of the ledger's descriptors inside fork(); one made by a bare clone system call keeps
 *   its parent's slots alive until it execs or exits, unless the parent closes its handles first.
 * - Growth: structures that callers allocate begin with struct_size = sizeof(the structure); older and newer
 *   callers are told apart by it.
 */
#ifndef KVCACHED_H
#define KVCACHED_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVCACHED_ABI_VERSION 4
#define KVCACHED_VERSION "0.4.0"

#if defined(_WIN32)
#error "libkvcached needs Linux"
#else
#define KVCACHED_API __attribute__((visibility("default")))
#endif

/* Every error there is: XX(name, value, sentence). */
#define KVCACHED_ERROR_MAP(XX)                                                                  \
  XX(OK, 0, "success")                                                                          \
  XX(E_INVAL, -1, "an argument is not valid")                                                   \
  XX(E_NOMEM, -2, "the system or the device has no memory, address space or mappings for this") \
  XX(E_LIMIT, -3, "the memory limit of the group or of the card leaves no room for this")       \
  XX(E_UNSUPPORTED, -4, "the device, the kernel or this build does not support this")           \
  XX(E_SYSTEM, -5, "a system call failed")                                                      \
  XX(E_LEDGER, -6, "the ledger file cannot be used")                                            \
  XX(E_FULL, -7, "the ledger has no free slot")                                                 \
  XX(E_SLOT, -8, "the ledger slot is not live, not leased, of another group, or in use")        \
  XX(E_FORKED, -9, "the handle belongs to the process this one was forked from")                \
  XX(E_BUSY, -10, "the memory is in use: the gate could not be had in time")                    \
  XX(E_TIMEOUT, -11, "another process did not answer in time")                                  \
  XX(E_DEVICE, -12, "the device's driver reported a failure")                                   \
  XX(E_HOST_LIMIT, -13, "the budget of host memory for sleeping content leaves no room")        \
  XX(E_RELOAD, -14, "the reload function could not restore a region's content")

enum kvcached_error {
#define KVCACHED_XX(name, value, text) KVCACHED_##name = value,
  KVCACHED_ERROR_MAP(KVCACHED_XX)
#undef KVCACHED_XX
};

typedef struct kvcached_ctx *kvcached_ctx_t;
typedef struct kvcached_region *kvcached_region_t;
typedef struct kvcached_ledger *kvcached_ledger_t;

/* ---- the library, and errors ---- */

/* KVCACHED_ABI_VERSION the library was built with: compare it to the header's before any other call. */
KVCACHED_API uint32_t kvcached_abi_version(void);
KVCACHED_API const char *kvcached_version(void);

/* The sentence of an error, and its name ("KVCACHED_E_LIMIT"). Never NULL; static storage. */
KVCACHED_API const char *kvcached_strerror(int err);
KVCACHED_API const char *kvcached_err_name(int err);

/* What the last failing call on this thread ran into; "" before the first. Valid until the thread's next
   failing call. */
KVCACHED_API const char *kvcached_last_error(void);

/* ---- the six functions of the simplest use ---- */

#define KVCACHED_DEVICE_HOST (-1)

/* Opens a context with default options: device_id is a CUDA ordinal (as cuDeviceGet counts), or
   KVCACHED_DEVICE_HOST for ordinary memory. NULL on failure, with kvcached_last_error() saying why; a device
   without virtual memory management fails. kvcached_open says more. */
KVCACHED_API kvcached_ctx_t kvcached_init(int device_id);

/* Ends the library's threads, frees all regions and allocations of the context, gives its slot back and ends
   it. Waits for the device to be idle. NULL is allowed. */
KVCACHED_API void kvcached_shutdown(kvcached_ctx_t ctx);

/* `size` bytes (> 0, rounded up to whole pages) of device memory, mapped in full and zero; NULL when there is
   none, with kvcached_last_error() saying why. Content survives sleep. For a context on the host the pointer
   can be used by the CPU, else by the device. */
KVCACHED_API void *kvcached_alloc(kvcached_ctx_t ctx, size_t size);

/* Frees what kvcached_alloc returned. NULL is allowed; any other pointer is refused with a log line. */
KVCACHED_API void kvcached_free(kvcached_ctx_t ctx, void *ptr);

/* Bytes that could be had now without asking others to give any back: the least of what the group's limit,
   the card's limit, and the device's free memory less the headroom leave. 0 on failure. */
KVCACHED_API size_t kvcached_available(kvcached_ctx_t ctx);

/* Sets the limit of the context's group, at the next revision, as kvcached_ledger_set_limit does; SIZE_MAX
   removes it. The context's own idle and pooled memory above it is given back at once (0: all of it). What is
   in use stays in use. A context without a ledger keeps the limit for itself. What fails is said in the log.
 */
KVCACHED_API void kvcached_set_limit(kvcached_ctx_t ctx, size_t limit);

/* ---- contexts ---- */

enum kvcached_backend {
  KVCACHED_BACKEND_HOST = 0, /* ordinary memory of this machine */
  KVCACHED_BACKEND_CUDA = 1  /* an NVIDIA GPU, through libcuda.so.1, which is loaded at run time */
};

enum kvcached_log_level {
  KVCACHED_LOG_ERROR = 0,
  KVCACHED_LOG_WARN = 1,
  KVCACHED_LOG_INFO = 2,
  KVCACHED_LOG_DEBUG = 3
};

enum kvcached_lookahead {
  KVCACHED_LOOKAHEAD_AUTO = 0,   /* THREAD where mappings may change under running kernels, else INLINE */
  KVCACHED_LOOKAHEAD_THREAD = 1, /* prepare() hands over to a helper thread */
  KVCACHED_LOOKAHEAD_INLINE = 2, /* prepare() works on the calling thread, a few pages a call */
  KVCACHED_LOOKAHEAD_OFF = 3     /* prepare() does nothing */
};

enum kvcached_flags {
  KVCACHED_NO_CONTROL = 1 /* no control thread: commands to this context's slot are not answered */
};

/* What the event function hears of; whoever brings it about: a call, a command, the need of room, a limit,
   the idle time. Each comes after the fact, save SLEEPING. */
enum kvcached_event {
  /* Memory is about to be unmapped by a sleep, everything that outlives it has been copied. The gate is held
     alone and the device is idle: the last moment for what holds on to addresses or to device memory of its
     own. SLEPT comes next, or WOKE where the sleep failed and was undone. */
  KVCACHED_EVENT_SLEEPING = 1,
  KVCACHED_EVENT_SLEPT = 2,
  KVCACHED_EVENT_WOKE = 3,   /* one or more regions have memory and content again */
  KVCACHED_EVENT_TRIMMED = 4 /* pooled, ready or idle memory went back to the device */
};

struct kvcached_stats;

#define KVCACHED_NAME_MAX 63  /* bytes of a slot's name, without the end */
#define KVCACHED_GROUP_MAX 31 /* bytes of a group id, without the end */

typedef struct kvcached_options {
  size_t struct_size;
  int backend; /* kvcached_backend */
  /* Bytes of a KV page; 0 = the backend's default. Host: the system's page (4096; the default) or 2 MiB.
     CUDA: a multiple of the device's granularity (2 MiB; the default). */
  size_t page_size;
  /* What the group may be charged in all, unless a limit was set for the group in the ledger, which then
     holds instead; UINT64_MAX = no limit. */
  uint64_t limit;
  /* Shown in the ledger (a model's file name); cut after KVCACHED_NAME_MAX bytes. NULL = "". A name that the
     lessor gave a slot stays. */
  const char *name;
  /* Group id, 1 to KVCACHED_GROUP_MAX bytes. NULL = the leased slot's, else "pid-<pid>". */
  const char *group;
  /* NULL = the device's default (kvcached_ledger_default_path); "" = no ledger: the limit is this context's
     alone. */
  const char *ledger_path;
  /* The slot a parent leased for this process, or -1 = take a free one. */
  int slot;
  /* Bytes held outside the library (a CUDA context) and charged to the slot; ignored when slot >= 0: the
     lease says it. kvcached_set_fixed changes it. */
  uint64_t fixed;
  /* Level: kvcached_log_level. Called inside calls on the context, its lock held, and from the library's
     threads: it must not call the library. May be NULL. */
  void (*log)(int level, const char *msg, void *user);
  void *log_user;
  /* -- since ABI 2 -- */
  int device;             /* CUDA ordinal, where pci_bus_id is NULL */
  const char *pci_bus_id; /* "0000:1b:00.0"; NULL = by ordinal */
  size_t large_page; /* bytes of a WEIGHTS or SCRATCH page (32 to 256 MiB on a GPU); 0 = 64 MiB, host 2 MiB */
  uint64_t pool_limit; /* bytes of unmapped KV pages kept for reuse (CUDA); default 64 MiB */
  int lookahead;       /* kvcached_lookahead */
  uint64_t host_limit; /* host memory for sleeping content, all contexts of the group together; UINT64_MAX =
                          none */
  uint64_t headroom;   /* bytes of free device memory that kvcached_available leaves for others; default 0 */
  uint32_t room_wait_ms; /* bound of a wait for room at other processes; default 1000 */
  uint32_t flags;        /* kvcached_flags */
  /* -- since ABI 3 -- */
  /* Event: kvcached_event; now: the context's figures at that moment, gone when the function returns. Called
     on any thread, the library's own too, with locks of the context held: no call of the library on a handle
     of this process from in there, kvcached_strerror and kvcached_err_name apart. A lock that it takes must
     not be held by anybody who calls the library meanwhile, or both wait forever. Calls of CUDA are fine, no
     CUDA context is current on the library's own threads; work launched there is waited for before memory
     goes. May be NULL. */
  void (*event)(int event, const struct kvcached_stats *now, void *user);
  void *event_user;
  /* Once nobody was inside the gate for so long, and nothing was mapped, released or made ready meanwhile,
     pooled, ready and idle memory is given back, by a thread of the library; 0 = never. */
  uint32_t idle_trim_ms;
  /* -- since ABI 4 -- */
  /* How long a claim that the group's limit or the device refuses waits for the lessor to make room (see
     kvcached_enter); 0 = not at all. Only on a leased slot. */
  uint32_t group_wait_ms;
} kvcached_options_t;

/* Defaults: host, default page sizes, no limits, no name, own group, default ledger, no slot. */
KVCACHED_API void kvcached_options_init(kvcached_options_t *options);

/* Opens a context and takes its slot. On failure *out is NULL.
   E_INVAL a field, named in the detail; E_UNSUPPORTED no driver, no such device, no virtual memory
   management; E_LIMIT `fixed` alone does not fit; E_SLOT, E_FULL, E_LEDGER the ledger; E_NOMEM, E_SYSTEM,
   E_DEVICE. */
KVCACHED_API int kvcached_open(const kvcached_options_t *options, kvcached_ctx_t *out);

/* Bytes of a KV page of this context; 0 for NULL. */
KVCACHED_API size_t kvcached_page_size(kvcached_ctx_t ctx);

/* Says what this process holds on the device outside the library, in all: the CUDA context, buffers of other
   allocators. It is charged beside the pages from now on, in place of what was before: `fixed` of the
   options, or of the lease, which a child that has loaded knows better than whoever leased the slot. More of
   it needs room, which is made as kvcached_ensure makes it; where there is none the old figure holds, and the
   memory is for the caller to do without. Less of it never fails. What NVML has measured (context_bytes) is
   the least that is charged on a leased slot. E_LIMIT; E_SYSTEM; E_INVAL ctx is NULL; E_FORKED. */
KVCACHED_API int kvcached_set_fixed(kvcached_ctx_t ctx, uint64_t bytes);

/* ---- the gate ---- */

/*
 * kvcached_enter and kvcached_leave bracket everything that may touch the memory, on the CPU or by work
 * launched on the device: sleep, trim and commands of others happen only while nobody is inside, and then
 * only after the device is idle. So what a thread does between enter and leave, and the device work launched
 * there, never meets a page in use that goes away; addresses stay, and captured CUDA graphs stay valid. Idle
 * pages, whose content was released, also go while threads are inside, once the device is idle: where this
 * context itself needs their room, or where its kvcached_set_limit could not have the gate in time.
 */

/*
 * Parking: with group_wait_ms, on a leased slot, a call that needs memory (ensure, alloc, write, and waking
 * in enter, wake, read ...) and is refused by a limit or by the device does not fail at once. It says in its
 * slot what it lacks (`wants`), rings the ledger's bell for the lessor, and leaves the gate for as long as it
 * waits, however often its thread has entered: so the lessor may have this very context trim or sleep
 * meanwhile. It tries again when there is room, older ones of the group first, and is inside again as before
 * with everything awake by then. A context that its lessor had sleep while calls of it waited sleeps on until
 * the lessor has it wake, whoever enters, or until a call inside it fails. A call fails with E_LIMIT
 * (E_NOMEM) after group_wait_ms, on KVCACHED_CMD_REFUSE, when the lessor is gone, when the context is shut
 * down, and at once where what the context has and lacks is more than the limit alone. A call that fails
 * inside the gate first has everything awake again, which may take that time once more; if that fails too,
 * the last error says so, and regions sleep until the next enter. The gates of other
 * contexts with a group_wait_ms that the thread is inside are left and entered again in the same way. The
 * library's own threads never wait so, nor does a reload function.
 */

/* Enters, shared with other threads, and wakes whatever sleeps. Waits for a sleep or trim under way. A thread
   may enter again inside. On failure the thread is not inside, and the region that could not be woken still
   sleeps. E_LIMIT, E_NOMEM no room to wake; E_RELOAD; E_DEVICE; E_FORKED. */
KVCACHED_API int kvcached_enter(kvcached_ctx_t ctx);

/* Leaves, on the thread that entered. E_INVAL: it is not inside. */
KVCACHED_API int kvcached_leave(kvcached_ctx_t ctx);

/* Says how many requests wait for this context: while there are any it is nobody's victim. */
KVCACHED_API int kvcached_set_queued(kvcached_ctx_t ctx, uint32_t requests);

/* ---- regions ---- */

enum kvcached_kind {
  KVCACHED_KV = 0,      /* small pages; sleep keeps the content in host memory */
  KVCACHED_WEIGHTS = 1, /* large pages; written once, then immutable: one host copy, made once and kept */
  KVCACHED_SCRATCH = 2  /* large pages; sleep drops the content, which reads as zero after */
};
#define KVCACHED_KIND_BIT(kind) (1u << (kind))
#define KVCACHED_ALL_KINDS 7u

/* Restores the content of a WEIGHTS region whose pages are mapped and zero again, on a thread that wakes it;
   it may use the region's addresses and kvcached_write, no other function on the context. Returns 0, or
   anything else where it failed: the region then stays asleep. */
typedef int (*kvcached_reload_fn)(kvcached_region_t region, void *user);

/* Reserves size bytes (> 0, rounded up to KV pages) of address space, aligned to the page size: nothing
   mapped. E_INVAL, E_NOMEM, E_FORKED. On failure *out is NULL. */
KVCACHED_API int kvcached_reserve(kvcached_ctx_t ctx, int kind, size_t size, kvcached_region_t *out);

/* Gives back the region's pages, host copy and claims, and the address range, once the device is idle. KV
   pages go to the pool as far as its bound allows. NULL is allowed. */
KVCACHED_API void kvcached_unreserve(kvcached_region_t region);

/* First address, size in bytes after rounding, and bytes of a page (the last page of a region may be
   shorter); constant for the region's life. NULL, 0, 0 for NULL. */
KVCACHED_API void *kvcached_region_base(kvcached_region_t region);
KVCACHED_API size_t kvcached_region_size(kvcached_region_t region);
KVCACHED_API size_t kvcached_region_page_size(kvcached_region_t region);

/* Makes every page touching [off, off+len) usable, or none: pages that were not ensured read as zero
   (recycled ones too), ensured ones keep their content. A sleeping region is woken first. Room is made in
   this order: pooled, ready and idle memory of the context; then, where the card is short rather than the
   group, idle processes of other groups are asked to trim and to sleep, least recently used first, within
   room_wait_ms. When nothing is missing no driver call is made. E_INVAL range; E_LIMIT; E_NOMEM; E_SYSTEM;
   E_DEVICE; E_FORKED; those of wake. len 0 does nothing. */
KVCACHED_API int kvcached_ensure(kvcached_region_t region, size_t off, size_t len);

typedef struct kvcached_range {
  size_t off, len;
} kvcached_range_t;

/* The same for every page touching one of several ranges, all of them or none, as one call: one claim and one
   wait for zeros, where a call for each would wait for each. Ranges may be in any order and overlap; those of
   len 0 count for nothing. Memory of the context that is idle in one of them is used there, and not given up
   for another. E_INVAL also: ranges is NULL, and n is not 0. E_NOMEM also: none for the list. */
KVCACHED_API int kvcached_ensure_ranges(kvcached_region_t region, const kvcached_range_t *ranges, size_t n);

/* Asks that the unmapped pages touching [off, off+len) be mapped and zeroed ahead of an ensure, which then
   makes no driver call for them: in the background (LOOKAHEAD_THREAD), or at most eight pages on this call
   (INLINE). Takes room only where it is free. Pages made ready count as mapped and as idle, and are given up
   like idle ones. A request replaces the region's previous one. E_INVAL range; E_FORKED. */
KVCACHED_API int kvcached_prepare(kvcached_region_t region, size_t off, size_t len);

/* The same for several ranges, in their order; they may be anywhere and overlap. Copied. The at most eight
   pages of INLINE are those of all of them together. n 0 (ranges may be NULL then) forgets the region's
   request. On failure the previous request holds. E_INVAL a range, or NULL; E_NOMEM; E_FORKED. */
KVCACHED_API int kvcached_prepare_ranges(kvcached_region_t region, const kvcached_range_t *ranges, size_t n);

/* Declares the content of all pages lying wholly inside [off, off+len) dropped. Ensured ones become idle:
   still mapped, counted and claimed, ready for reuse, until trim or pressure takes them; sleeping ones become
   unmapped. Touching an idle page is the caller's error though it need not fault. E_INVAL range; E_FORKED. */
KVCACHED_API int kvcached_release(kvcached_region_t region, size_t off, size_t len);

/* Gives pooled, ready and idle memory back to the device, in this order, until at most keep_bytes of it
   remain in the context; the highest addresses of the newest region first. Needs the gate: waits up to
   room_wait_ms for others to leave it. *freed (may be NULL): bytes given back, also on failure. E_BUSY (also
   when the calling thread is inside the gate); E_NOMEM (the system could not split a mapping: the rest stays
   idle); E_SYSTEM; E_DEVICE; E_FORKED. */
KVCACHED_API int kvcached_trim(kvcached_ctx_t ctx, size_t keep_bytes, size_t *freed);

/* The longest prefix of [off, off+len) that is ensured throughout or nowhere: its length in bytes (clipped to
   the range) and which (*ensured 1 or 0; idle and ready are 0, asleep is 1). Wakes nothing. len 0: *run 0.
   E_INVAL range; E_FORKED. */
KVCACHED_API int kvcached_mapped_run(kvcached_region_t region, size_t off, size_t len, size_t *run,
                                     int *ensured);

/* Copies between a region and host memory, and clears, by the library's own queue: returns when done. The
   caller orders them against device work of its own. All wake a sleeping region first, save a clear of a
   whole region, which drops its host copy instead. read: pages that are not ensured read as zero. write:
   pages are ensured first. Writing to a WEIGHTS region drops its host copy. clear: ensured pages touched by
   the range read as zero in it. E_INVAL range or NULL; E_DEVICE; E_FORKED; those of ensure and wake. */
KVCACHED_API int kvcached_read(kvcached_region_t region, size_t off, void *dst, size_t len);
KVCACHED_API int kvcached_write(kvcached_region_t region, size_t off, const void *src, size_t len);
KVCACHED_API int kvcached_clear(kvcached_region_t region, size_t off, size_t len);

/* ---- sleep ---- */

/* With a reload function a region needs no host copy where host_limit leaves no room for one. NULL takes it
   back. E_INVAL: the region's kind is not WEIGHTS; E_FORKED. */
KVCACHED_API int kvcached_set_reload(kvcached_region_t region, kvcached_reload_fn reload, void *user);

/* Asks for what a later sleep will need, in the background: host memory for the copies of these kinds (bits
   KVCACHED_KIND_BIT), pinned where possible, and the copies of WEIGHTS themselves, whose content must be
   complete by now. Works only while nobody was inside the gate for a moment (100 ms), since pinning holds up
   whoever launches work. Without it the first sleep does this. E_INVAL kinds; E_FORKED. */
KVCACHED_API int kvcached_prepare_sleep(kvcached_ctx_t ctx, unsigned kinds);

/* Puts the regions of these kinds to sleep, all or none: their device memory goes back to the device, and the
   pool too. Waits up to wait_ms for the gate (E_BUSY; also when the calling thread is inside), then for the
   device to be idle. *freed (may be NULL): bytes given back. Sleeping already: success. E_HOST_LIMIT a region
   that has no reload function does not fit the budget; E_NOMEM no host memory; E_INVAL; E_DEVICE; E_FORKED.
 */
KVCACHED_API int kvcached_sleep(kvcached_ctx_t ctx, unsigned kinds, uint32_t wait_ms, size_t *freed);

/* Wakes the regions of these kinds, without entering the gate. Errors as kvcached_enter. */
KVCACHED_API int kvcached_wake(kvcached_ctx_t ctx, unsigned kinds);

/* Gives back host memory that holds no content needed any more (buffers of KV regions that are awake), and
   with weights != 0 also the copies of WEIGHTS regions that are awake. *freed may be NULL. E_FORKED. */
KVCACHED_API int kvcached_trim_host(kvcached_ctx_t ctx, int weights, size_t *freed);

/* ---- figures ---- */

typedef struct kvcached_stats {
  size_t struct_size;
  uint64_t reserved;                 /* bytes of address space */
  uint64_t mapped;                   /* bytes of pages that have memory: ensured + ready + idle */
  uint64_t idle;                     /* bytes of that which are idle or ready */
  uint64_t page_size;                /* bytes; a region's own in its figures */
  uint64_t limit;                    /* in force for the group; UINT64_MAX = none */
  uint64_t group_charge;             /* charges of the group's live slots, this context's own included */
  uint64_t ensures, releases, trims; /* successful calls that changed a page's state */
  uint64_t limit_failures;           /* calls that returned E_LIMIT */
  /* -- since ABI 2 -- */
  uint64_t kind_mapped[3]; /* `mapped` by kvcached_kind */
  uint64_t ready;          /* the part of `idle` that prepare made */
  uint64_t pooled;         /* bytes of unmapped pages kept; beside `mapped`, claimed too */
  uint64_t asleep;         /* bytes of sleeping pages */
  uint64_t host_bytes;     /* host memory held for sleeping content, kept copies and buffers included */
  uint64_t host_pinned;    /* the pinned part of it */
  uint64_t host_limit;     /* UINT64_MAX = none */
  uint64_t card_limit;     /* of all groups of this user on the device; UINT64_MAX = none */
  uint64_t card_charge;    /* charges of all live slots */
  uint64_t sleeps, wakes;  /* that changed something */
  uint64_t last_sleep_ns, last_wake_ns; /* how long the last took */
  uint64_t device_calls; /* calls of the backend that changed mappings, copied, zeroed or waited */
  /* -- since ABI 3 -- */
  uint64_t
      last_inside_ns; /* CLOCK_MONOTONIC of the last enter or leave not nested, to about 10 ms; 0: never */
  uint64_t kind_asleep[3]; /* `asleep` by kvcached_kind */
  /* -- since ABI 4 -- */
  uint64_t
      fixed; /* held outside the library and charged beside pages and pool; a context's, in any figures */
  uint64_t context_bytes; /* what the process holds on a GPU beside this context's pages, as NVML measures it;
                             part of `fixed` on a leased slot; 0: not known */
  uint64_t wants;         /* bytes that parked calls lack; 0: none is parked */
  uint64_t parks;         /* calls that were parked */
} kvcached_stats_t;

/* Totals of a context, or the figures of one region (limits, charges, pool, host_limit and page_size apart
   from it are the context's there, trims those that took pages of it). out->struct_size must be set. Wakes
   nothing, makes no driver call. E_INVAL; E_FORKED. */
KVCACHED_API int kvcached_stats(kvcached_ctx_t ctx, kvcached_stats_t *out);
KVCACHED_API int kvcached_region_stats(kvcached_region_t region, kvcached_stats_t *out);

/* Free and total bytes of the device as its driver reports them, for all processes (host: MemAvailable and
   MemTotal). E_DEVICE, E_SYSTEM, E_FORKED. */
KVCACHED_API int kvcached_device_memory(kvcached_ctx_t ctx, uint64_t *free_bytes, uint64_t *total_bytes);

/* ---- the ledger ---- */

/*
 * A slot has two holds, record locks that the kernel drops with their holder however it ends: the lessor's (a
 * parent that set memory aside for a child to come) and the user's (the process that maps). It lives while
 * either is held; pid numbers are only shown, so processes of several containers may share a ledger.
 *
 *   charge of a slot = max(lease, fixed + claim); of a dead user only the lease is left
 *
 * so a child's first claims use up its lease. The lease ends when the child first sleeps: from then on it is
 * charged for what it holds.
 *
 * A claim is announced in the claimer's own slot, then the live slots are summed: it stays if the sums are
 * within the group's limit and the card's, else it is withdrawn. Where only the announced claims of others
 * are in the way, the older claim goes first; the wait for it is bounded (about one second, then E_LIMIT).
 *
 * The file is in /dev/shm. Containers see each other's slots only where they share that folder (for instance
 * with docker run --ipc=host, or -v /dev/shm:/dev/shm); a context on a GPU that finds much memory in use
 * which no slot accounts for says so in its log.
 */

/* Writes the default path of a device's ledger for this user: /dev/shm/kvcached-<uid>-<device>. device: NULL
   or "host", or the UUID of a GPU or MIG instance as nvidia-smi prints it ("GPU-..." or "MIG-...") or without
   that prefix, in any case. E_INVAL: no such name, or size too small (KVCACHED_PATH_MAX suffices). */
#define KVCACHED_PATH_MAX 128
KVCACHED_API int kvcached_ledger_default_path(const char *device, char *out, size_t size);

/* Opens the ledger to look, lease or command; takes no slot, no driver and no thread. path: NULL = that of
   the host. E_LEDGER: not a plain file of this user with mode 0600, another size or version, torn, no space;
   the detail says which. E_NOMEM, E_INVAL. A file of an older version that nobody has a slot in is replaced.
   Deleting the file while processes use it splits them from later ones: limits then hold for each half
   alone. */
KVCACHED_API int kvcached_ledger_open(const char *path, kvcached_ledger_t *out);

/* Drops all leases taken through this handle. NULL is allowed. */
KVCACHED_API void kvcached_ledger_close(kvcached_ledger_t ledger);

/* The file's path; valid until the handle is closed. NULL for NULL. */
KVCACHED_API const char *kvcached_ledger_path(kvcached_ledger_t ledger);

/* Sets aside max(size, fixed) bytes for a child that will open a context with *slot. group: 1 to
   KVCACHED_GROUP_MAX bytes; fixed: the part of them that the child holds outside the library; limit: what the
   group may be charged in all unless its limit was set in the ledger. E_LIMIT: does not fit, the numbers are
   in the detail; E_FULL; E_LEDGER: the file was deleted or replaced meanwhile, the child would open another;
   E_INVAL; E_SYSTEM; E_FORKED. On failure *slot is -1. */
KVCACHED_API int kvcached_ledger_lease(kvcached_ledger_t ledger, const char *group, const char *name,
                                       uint64_t size, uint64_t fixed, uint64_t limit, int *slot);

/* Drops the lessor's hold: the slot ends at once or, if a process uses it, with that process (it keeps its
   lease until then, or until it first sleeps). E_SLOT: this handle holds no such lease; E_FORKED. */
KVCACHED_API int kvcached_ledger_unlease(kvcached_ledger_t ledger, int slot);

enum kvcached_limit_result {
  KVCACHED_LIMIT_APPLIED = 0,  /* in force (or already so: setting the same again is no conflict) */
  KVCACHED_LIMIT_DEFERRED = 1, /* in force, but more is in use: nothing new fits until `overage` has gone */
  KVCACHED_LIMIT_STALE = 2,    /* ignored: a newer revision is in force */
  KVCACHED_LIMIT_CONFLICT = 3  /* ignored: this revision is in force with other bytes */
};

typedef struct kvcached_limit {
  size_t struct_size;
  int result;        /* kvcached_limit_result of the call; APPLIED or DEFERRED when it only asked */
  uint32_t revision; /* in force; 0: none was set */
  uint64_t limit;    /* in force, UINT64_MAX = none */
  uint64_t charge;   /* of the slots it covers */
  uint64_t overage;  /* charge above the limit */
} kvcached_limit_t;

/* Sets a limit: of a group, for as long as the group has a live slot (E_SLOT: it has none), or of the card
   (group NULL), for as long as the file exists. bytes are rounded down to 4096; 2^44 and more is no limit.
   revision: 1 and up; of two settings the higher one holds, 0 = one more than the one in force (CONFLICT when
   that is UINT32_MAX, which nothing follows). When more is in use, the live contexts it covers are told to
   trim; nobody is waited for. *out may be NULL. E_INVAL; E_SYSTEM; E_FORKED. */
KVCACHED_API int kvcached_ledger_set_limit(kvcached_ledger_t ledger, const char *group, uint64_t bytes,
                                           uint32_t revision, kvcached_limit_t *out);

/* What is in force. group NULL: the card's. A group without a live slot has no limit. */
KVCACHED_API int kvcached_ledger_get_limit(kvcached_ledger_t ledger, const char *group,
                                           kvcached_limit_t *out);

enum kvcached_command {
  KVCACHED_CMD_TRIM = 1,  /* give idle and pooled memory back */
  KVCACHED_CMD_SLEEP = 2, /* sleep, all kinds */
  KVCACHED_CMD_WAKE = 3,  /* wake, all kinds; does not wait for room */
  KVCACHED_CMD_REFUSE = 4 /* calls that are parked fail now, with E_LIMIT */
};

/* Has the context in a slot do something, on its control thread, and waits up to wait_ms for its answer (0:
   only leaves the command). *freed (may be NULL): bytes given back, to 4096. Returns the context's own result
   (E_BUSY: it is in use), or E_SLOT: no process uses the slot, or it has no control thread; E_TIMEOUT: no
   answer; the command was taken back, or may still be carried out, as the detail says; E_BUSY: another
   command is being carried out; E_INVAL; E_FORKED. */
KVCACHED_API int kvcached_ledger_command(kvcached_ledger_t ledger, int slot, int command, uint32_t wait_ms,
                                         uint64_t *freed);

typedef struct kvcached_slot {
  size_t struct_size;
  int slot;
  int64_t pid; /* of the user, else of the lessor; for display only */
  char name[KVCACHED_NAME_MAX + 1];
  char group[KVCACHED_GROUP_MAX + 1];
  uint64_t lease, fixed, claim, reserved, charge; /* bytes */
  int leased, attached;                           /* 1 while the lessor's, the user's hold is held */
  /* -- since ABI 2 -- */
  uint64_t kind_bytes[3];  /* memory by kvcached_kind */
  uint64_t idle, pooled;   /* bytes that a trim would give back */
  uint64_t asleep;         /* bytes of sleeping pages */
  uint64_t host_bytes;     /* host memory held for sleeping content */
  uint64_t limit;          /* of the group as this slot knows it; UINT64_MAX = none */
  uint64_t last_use_ns;    /* CLOCK_MONOTONIC of the last enter, leave or claim; 0: never */
  uint64_t woke_ns;        /* of the last wake; 0: never */
  uint32_t inside, queued; /* threads inside the gate; requests waiting */
  int controlled;          /* 1: it answers commands */
  /* -- since ABI 4 -- */
  uint64_t wants; /* bytes by which the charge has to grow for its parked calls to go on, its sleeping
                     content included, what it could give up itself not; 0: none is parked */
  uint64_t wants_since_ns;                   /* CLOCK_MONOTONIC since when */
  uint64_t context_bytes;                    /* as in the stats */
  uint64_t kind_reserved[3], kind_asleep[3]; /* `reserved` and `asleep` by kvcached_kind */
  uint32_t parked; /* threads that wait, outside the gate; not counted by `inside` */
} kvcached_slot_t;

/* Waits until the ledger's bell has been rung since *seen, or timeout_ms have passed: *seen is how often it
   was rung by now, or unchanged. Begin with 0. It is rung when a slot begins or ceases to want memory, when a
   charge falls (a sleep, a trim, the end of a region or of a slot), when a slot comes or goes, and when a
   limit is set; while somebody wants, also when pages are released and when the last thread leaves a gate.
   One ring may stand for several. A process that is killed rings nothing: look now and then. Any number of
   threads and processes may wait. E_INVAL; E_FORKED. */
KVCACHED_API int kvcached_ledger_wait(kvcached_ledger_t ledger, uint32_t *seen, uint32_t timeout_ms);

/* Lists live slots: at most cap into out, their number into *n (may exceed cap; out may be NULL with cap 0).
   out[0].struct_size must be set and is the array's stride. E_INVAL; E_SYSTEM; E_FORKED. */
KVCACHED_API int kvcached_ledger_slots(kvcached_ledger_t ledger, kvcached_slot_t *out, size_t cap, size_t *n);

#ifdef __cplusplus
}
#endif
#endif /* KVCACHED_H */
