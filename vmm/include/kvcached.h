/*
 * libkvcached: memory that is reserved in full and occupied only where it is in use.
 *
 * A context (kvcached_ctx_t) owns pages of one kind of memory (a backend) under one limit. A region is a
 * range of addresses reserved from it: its base never changes, and each of its pages is in one of three
 * states.
 *
 *              ensure                      release
 *   unmapped ---------> ensured (in use) ---------> idle (content dropped, memory kept for reuse)
 *      ^                    ^                       |   |
 *      |                    +------- ensure --------+   |
 *      +---------------------- trim, or pressure -------+
 *
 * Ensured and idle pages are physically there and count as `mapped`; an unmapped page costs nothing, and
 * touching it is a fault (host: SIGSEGV). The bytes the library reports as mapped are what the system reports
 * for the range (host: Rss in /proc/self/smaps, as long as nothing is swapped out).
 *
 * The ledger is one small shared file a user and device. Every process using the library has a slot in it and
 * claims there what it maps, before mapping it; so processes of one group keep one common limit with no
 * server between them.
 *
 * Conventions
 * - Units: sizes, offsets and limits are bytes.
 * - Errors: functions returning int return KVCACHED_OK (0) or a negative kvcached_error. What went wrong in
 *   detail (numbers, names, errno) is in kvcached_last_error(). A call that fails leaves states, counts,
 *   claims and memory as they were, save that idle pages may have been given back to make room.
 * - Threads: any function may be called from any thread; calls on one context are serialised. Reading and
 *   writing the memory is the caller's to order against release and unreserve, which drop content. No handle
 *   may be used while or after it is being closed (shutdown, unreserve, ledger_close).
 * - The host process: the library never exits, aborts, prints, starts threads or changes signal handling. Its
 *   descriptors are close-on-exec.
 * - Fork: a child made by fork without exec has no part in its parent's handles. Functions returning int
 *   return KVCACHED_E_FORKED, void ones do nothing, and the regions are not in its address space (otherwise
 *   pages would outlive the process that claims them). The child drops its copies of the ledger's descriptors
 *   inside fork(); one made by a bare clone system call keeps its parent's slots alive until it execs or
 *   exits, unless the parent closes its handles first.
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

#define KVCACHED_ABI_VERSION 1
#define KVCACHED_VERSION "0.1.0"

#if defined(_WIN32)
#error "libkvcached needs Linux"
#else
#define KVCACHED_API __attribute__((visibility("default")))
#endif

/* Every error there is: XX(name, value, sentence). */
#define KVCACHED_ERROR_MAP(XX)                                                            \
  XX(OK, 0, "success")                                                                    \
  XX(E_INVAL, -1, "an argument is not valid")                                             \
  XX(E_NOMEM, -2, "the system has no memory, address space or mappings left for this")    \
  XX(E_LIMIT, -3, "the memory limit of the group leaves no room for this")                \
  XX(E_UNSUPPORTED, -4, "the device, the kernel or this build does not support this")     \
  XX(E_SYSTEM, -5, "a system call failed")                                                \
  XX(E_LEDGER, -6, "the ledger file cannot be used")                                      \
  XX(E_FULL, -7, "the ledger has no free slot")                                           \
  XX(E_SLOT, -8, "the ledger slot is not leased, belongs to another group, or is in use") \
  XX(E_FORKED, -9, "the handle belongs to the process this one was forked from")

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
 * failing call. */
KVCACHED_API const char *kvcached_last_error(void);

/* ---- contexts ---- */

enum kvcached_backend {
  KVCACHED_BACKEND_HOST = 0 /* ordinary memory of this machine */
};

enum kvcached_log_level {
  KVCACHED_LOG_ERROR = 0,
  KVCACHED_LOG_WARN = 1,
  KVCACHED_LOG_INFO = 2,
  KVCACHED_LOG_DEBUG = 3
};

#define KVCACHED_NAME_MAX 63  /* bytes of a slot's name, without the end */
#define KVCACHED_GROUP_MAX 31 /* bytes of a group id, without the end */

typedef struct kvcached_options {
  size_t struct_size;
  int backend; /* KVCACHED_BACKEND_HOST */
  /* Bytes of a page; 0 = the backend's default. Host: the system's page (4096; the default) or 2 MiB. */
  size_t page_size;
  /* What the group may be charged in all; UINT64_MAX = no limit. */
  uint64_t limit;
  /* Shown in the ledger (a model's file name); cut after KVCACHED_NAME_MAX bytes. NULL = "". A name that the
     lessor gave a slot stays. */
  const char *name;
  /* Group id, 1 to KVCACHED_GROUP_MAX bytes. NULL = the leased slot's, else "pid-<pid>". */
  const char *group;
  /* NULL = /dev/shm/kvcached-<uid>-host; "" = no ledger: the limit is this context's alone. */
  const char *ledger_path;
  /* The slot a parent leased for this process, or -1 = take a free one. */
  int slot;
  /* Bytes held outside the library and charged to the slot; ignored when slot >= 0: the lease says it. */
  uint64_t fixed;
  /* Level: kvcached_log_level. Called inside calls on the context, its lock held: it must not call the
     library. May be NULL. */
  void (*log)(int level, const char *msg, void *user);
  void *log_user;
} kvcached_options_t;

/* Defaults: host, default page size, no limit, no name, own group, default ledger, no slot. */
KVCACHED_API void kvcached_options_init(kvcached_options_t *options);

/* Opens a context and takes its slot. On failure *out is NULL.
   E_INVAL a field, named in the detail; E_UNSUPPORTED backend; E_LIMIT `fixed` alone does not fit; E_SLOT,
   E_FULL, E_LEDGER the ledger; E_NOMEM, E_SYSTEM. */
KVCACHED_API int kvcached_open(const kvcached_options_t *options, kvcached_ctx_t *out);

/* Frees all regions of the context, gives its slot back and ends it. NULL is allowed. */
KVCACHED_API void kvcached_shutdown(kvcached_ctx_t ctx);

/* Bytes of a page of this context; 0 for NULL. */
KVCACHED_API size_t kvcached_page_size(kvcached_ctx_t ctx);

/* ---- regions ---- */

/* Reserves size bytes (> 0, rounded up to whole pages) of address space, aligned to the page size: nothing
   mapped. E_INVAL, E_NOMEM, E_FORKED. On failure *out is NULL. */
KVCACHED_API int kvcached_reserve(kvcached_ctx_t ctx, size_t size, kvcached_region_t *out);

/* Gives back the region's pages, their claim and the address range. NULL is allowed. */
KVCACHED_API void kvcached_unreserve(kvcached_region_t region);

/* First address, and size in bytes after rounding, constant for the region's life. NULL, 0 for NULL. */
KVCACHED_API void *kvcached_region_base(kvcached_region_t region);
KVCACHED_API size_t kvcached_region_size(kvcached_region_t region);

/* Makes every page touching [off, off+len) usable, or none: pages that were not ensured read as zero
   (recycled ones too), ensured ones keep their content. Idle pages of the context, in any region, are given
   up before the limit is reported. E_INVAL range; E_LIMIT; E_NOMEM; E_SYSTEM; E_FORKED. len 0 does nothing.
 */
KVCACHED_API int kvcached_ensure(kvcached_region_t region, size_t off, size_t len);

/* Declares the content of all pages lying wholly inside [off, off+len) dropped. Ensured ones become idle:
   still mapped, counted and claimed, ready for reuse, until trim or pressure takes them. Touching an idle
   page is the caller's error though it need not fault. E_INVAL range; E_FORKED. */
KVCACHED_API int kvcached_release(kvcached_region_t region, size_t off, size_t len);

/* Gives idle pages back to the system until at most keep_bytes of them remain in the context, highest
   addresses of the newest region first. *freed (may be NULL): bytes given back, also on failure. E_NOMEM (the
   system could not split a mapping: the rest stays idle); E_SYSTEM; E_FORKED. */
KVCACHED_API int kvcached_trim(kvcached_ctx_t ctx, size_t keep_bytes, size_t *freed);

/* The longest prefix of [off, off+len) that is ensured throughout or nowhere: its length in bytes (clipped to
   the range) and which (*ensured 1 or 0; idle is 0). len 0: *run 0. E_INVAL range; E_FORKED. */
KVCACHED_API int kvcached_mapped_run(kvcached_region_t region, size_t off, size_t len, size_t *run,
                                     int *ensured);

typedef struct kvcached_stats {
  size_t struct_size;
  uint64_t reserved;                 /* bytes of address space */
  uint64_t mapped;                   /* bytes physically there: ensured + idle */
  uint64_t idle;                     /* bytes of that which are idle */
  uint64_t page_size;                /* bytes */
  uint64_t limit;                    /* of the group; UINT64_MAX = none */
  uint64_t group_charge;             /* charges of the group's live slots, this context's own included */
  uint64_t ensures, releases, trims; /* successful calls that changed a page's state */
  uint64_t limit_failures;           /* calls that returned E_LIMIT */
} kvcached_stats_t;

/* Totals of a context, or the figures of one region (page_size, limit and group_charge are the context's
   there, trims those that took pages of it). out->struct_size must be set. E_INVAL; E_FORKED. */
KVCACHED_API int kvcached_stats(kvcached_ctx_t ctx, kvcached_stats_t *out);
KVCACHED_API int kvcached_region_stats(kvcached_region_t region, kvcached_stats_t *out);

/* ---- the ledger ---- */

/*
 * A slot has two holds, record locks that the kernel drops with their holder however it ends: the lessor's (a
 * parent that set memory aside for a child to come) and the user's (the process that maps). It lives while
 * either is held.
 *
 *   charge of a slot = max(lease, fixed + claim); the claim of a dead user counts no more
 *
 * A claim is announced in the claimer's own slot, then the live slots of the group are summed: it stays if
 * the sum is within the limit, else it is withdrawn. Where only the announced claims of others are in the
 * way, the older claim goes first; the wait for it is bounded (about one second, then E_LIMIT).
 */

/* Opens the ledger to look or to lease; takes no slot and no backend. path: NULL = the default. E_LEDGER: not
   a plain file of this user with mode 0600, another size or version, torn, no space; the detail says which.
   E_NOMEM, E_INVAL. Deleting the file while processes use it splits them from later ones: the limit then
   holds for each half alone. */
KVCACHED_API int kvcached_ledger_open(const char *path, kvcached_ledger_t *out);

/* Drops all leases taken through this handle. NULL is allowed. */
KVCACHED_API void kvcached_ledger_close(kvcached_ledger_t ledger);

/* Sets aside max(size, fixed) bytes for a child that will open a context with *slot. group: 1 to
   KVCACHED_GROUP_MAX bytes; fixed: the part of them that the child holds outside the library; limit: what the
   group may be charged in all. E_LIMIT: does not fit, the numbers are in the detail; E_FULL; E_LEDGER: the
   file was deleted or replaced meanwhile, the child would open another; E_INVAL; E_SYSTEM; E_FORKED. On failure
   *slot is -1. */
KVCACHED_API int kvcached_ledger_lease(kvcached_ledger_t ledger, const char *group, const char *name,
                                       uint64_t size, uint64_t fixed, uint64_t limit, int *slot);

/* Drops the lessor's hold: the slot ends at once or, if a process uses it, with that process (it keeps its
   lease until then). E_SLOT: this handle holds no such lease; E_FORKED. */
KVCACHED_API int kvcached_ledger_unlease(kvcached_ledger_t ledger, int slot);

typedef struct kvcached_slot {
  size_t struct_size;
  int slot;
  int64_t pid; /* of the user, else of the lessor; for display only */
  char name[KVCACHED_NAME_MAX + 1];
  char group[KVCACHED_GROUP_MAX + 1];
  uint64_t lease, fixed, claim, reserved, charge; /* bytes */
  int leased, attached;                           /* 1 while the lessor's, the user's hold is held */
} kvcached_slot_t;

/* Lists live slots: at most cap into out, their number into *n (may exceed cap; out may be NULL with cap 0).
   out[0].struct_size must be set and is the array's stride. E_INVAL; E_SYSTEM; E_FORKED. */
KVCACHED_API int kvcached_ledger_slots(kvcached_ledger_t ledger, kvcached_slot_t *out, size_t cap, size_t *n);

/* The file's path; valid until the handle is closed. NULL for NULL. */
KVCACHED_API const char *kvcached_ledger_path(kvcached_ledger_t ledger);

#ifdef __cplusplus
}
#endif
#endif /* KVCACHED_H */
