/* What several tests need: the backend under test, content, the system's own view of memory, scratch files,
   other processes. */
#ifndef SUPPORT_H
#define SUPPORT_H

#include "check.h"

#include <stdint.h>
#include <sys/types.h>

#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)

/* ---- the backend under test ---- */

/* Whether the test that runs is on host memory, which it may touch by pointer. */
int on_host(void);

/* Bytes of a KV page on the backend under test. */
size_t test_page(void);

/* Default options on the backend under test: no ledger, and WEIGHTS and SCRATCH pages of
   test_large_page() bytes. */
void test_options(kvcached_options_t *options);
size_t test_large_page(void);

/* Contexts on the backend under test: without a ledger (page: bytes of a KV page, 0 = test_page()), in a
   ledger, and with options as they are. All end the test when they cannot be had. */
kvcached_ctx_t open_alone(size_t page, uint64_t limit);
kvcached_ctx_t open_in(const char *ledger, const char *group, uint64_t limit);
kvcached_ctx_t open_with(const kvcached_options_t *options);

kvcached_region_t reserve(kvcached_ctx_t ctx, int kind, size_t size);

/* ---- content ---- */

/* Fills bytes of ensured, awake pages, and says whether they all are `byte` (what differs is printed): by
   pointer on the host, else by kvcached_write and kvcached_read. */
void put(kvcached_region_t region, size_t off, int byte, size_t len);
int holds(kvcached_region_t region, size_t off, int byte, size_t len);

/* The same at a page's two ends only, where filling it all would take too long. */
void put_ends(kvcached_region_t region, size_t page_no, int byte);
int holds_ends(kvcached_region_t region, size_t page_no, int byte);

int all_bytes(const void *p, size_t n, unsigned char value);

/* ---- figures ---- */

kvcached_stats_t stats_of(kvcached_ctx_t ctx);
kvcached_stats_t region_stats_of(kvcached_region_t region);

/* Figures of a region against its pages and, on the host, against what the system says. */
void check_region(kvcached_region_t region);

/* The same for all regions of a context, and its own account: claimed = held by pages + pool, in the context
   and in its slot; host memory too; and where this process has the device for itself, what the driver says is
   in use. Waits until the helper is done; nothing else may be going on beside it. */
void check_context(kvcached_ctx_t ctx);

/* Bytes of memory under the context's pages and in its pool as the system or the driver sees them. On a
   device: what is used more than when the test's first context was opened. */
uint64_t memory_held(kvcached_ctx_t ctx);

/* Bytes in [base, base+size) that have memory, or swap, by /proc/self/pagemap. */
size_t resident(const void *base, size_t size);

/* Bytes there in huge pages, and the number of mappings, by /proc/self/smaps. Ends the test when a mapping
   crosses the borders: what belongs to it could not be told apart. */
size_t huge_pages(const void *base, size_t size);
size_t mappings(const void *base, size_t size);

/* Whether an address can be read and written, asked of the kernel: no signal is raised. */
int accessible(const void *p);

/* ---- the ledger ---- */

size_t live_slots(const char *ledger);

/* The slot of that number; the test ends when it is not live. */
kvcached_slot_t slot_in(const char *ledger, int slot);

/* The number of a context's slot. */
int slot_of_ctx(kvcached_ctx_t ctx);

/* ---- this and that ---- */

/* A path in a scratch folder of this process, which is removed when it ends. Names are given once each. */
const char *scratch(const char *name);

/* Maps the first `size` bytes of a file, shared with other processes. */
void *share_file(const char *path, size_t size);

/* Small numbers that look random, the same in every run. */
uint32_t next_random(uint32_t *state);

/* How often a random test is to be repeated: n, times KVCACHED_TEST_ROUNDS; and the first seed of such a
   test: `seed`, or KVCACHED_TEST_SEED. */
unsigned rounds(unsigned n);
uint32_t first_seed(uint32_t seed);

int64_t now_ms(void);
void sleep_ms(unsigned ms);

/* Waits until cond holds, at most ten seconds. */
#define WAIT_FOR(cond)                                                                          \
  do {                                                                                          \
    int64_t until_ = now_ms() + 10000;                                                          \
    while (!(cond)) {                                                                           \
      if (now_ms() > until_) check_failed(__FILE__, __LINE__, "waited in vain for: %s", #cond); \
      sleep_ms(1);                                                                              \
    }                                                                                           \
  } while (0)

/* ---- a peer: another process of this library (peer.c), driven over its standard input and output ---- */

typedef struct peer {
  pid_t pid;
  int in, out;
} peer;
peer peer_start(const char *ledger, const char *group, uint64_t limit, int slot);
/* With more options, as "name=value" words that peer.c lists. */
peer peer_start_with(const char *ledger, const char *group, uint64_t limit, int slot, const char *more);
void peer_expect_open(peer p);
void peer_send(peer p, const char *line);         /* adds the newline */
void peer_reply(peer p, char *line, size_t size); /* waits for one line */
void peer_expect(peer p, const char *send, const char *reply);
void peer_kill(peer *p); /* SIGKILL, and waits */
void peer_stop(peer *p); /* lets it end by itself; it must end well */

#endif
