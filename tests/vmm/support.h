/* What several tests need: the system's own view of memory, scratch files, other processes. */
#ifndef SUPPORT_H
#define SUPPORT_H

#include "check.h"

#include <sys/types.h>

#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)

/* Bytes resident in [base, base+size), bytes of that in huge pages, and the number of mappings there, from
   /proc/self/smaps. Ends the test when a mapping crosses the borders: its memory could not be told apart. */
size_t resident(const void *base, size_t size);
size_t huge_pages(const void *base, size_t size);
size_t mappings(const void *base, size_t size);

/* Whether an address can be read and written, asked of the kernel: no signal is raised. */
int accessible(const void *p);

/* Whether n bytes are all `value`. */
int all_bytes(const void *p, size_t n, unsigned char value);

kvcached_stats_t stats_of(kvcached_ctx_t ctx);

/* Library figures of a region and what the system says must agree. */
void check_region(kvcached_region_t region);

/* A context of `page` byte pages with no ledger, and one in a ledger. Both end the test when they cannot be
 * had. */
kvcached_ctx_t open_alone(size_t page, uint64_t limit);
kvcached_ctx_t open_in(const char *ledger, const char *group, uint64_t limit);

/* A path in a scratch folder of this process, which is removed when it ends. Names are given once each. */
const char *scratch(const char *name);

size_t live_slots(const char *ledger);

/* Small numbers that look random, the same in every run. */
uint32_t next_random(uint32_t *state);

/* A peer: another process of this library (peer.c), driven over its standard input and output. */
typedef struct peer {
  pid_t pid;
  int in, out;
} peer;
peer peer_start(const char *ledger, const char *group, uint64_t limit, int slot);
void peer_send(peer p, const char *line);         /* adds the newline */
void peer_reply(peer p, char *line, size_t size); /* waits for one line */
void peer_expect(peer p, const char *send, const char *reply);
void peer_kill(peer *p); /* SIGKILL, and waits */
void peer_stop(peer *p); /* lets it end by itself; it must end well */

#endif
