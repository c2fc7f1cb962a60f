/* For the tests of the ledger: users without a context, the file's map, children, namespaces. */
#ifndef LEDGER_KIT_H
#define LEDGER_KIT_H

#include "ledger.h"
#include "ledger_file.h"
#include "support.h"

kvcached_ledger_t open_ledger(const char *path);

/* A slot and the handle that uses it: a process of its own as far as the ledger is concerned. */
typedef struct user {
  kvcached_ledger_t ledger;
  int slot;
} user;
user user_take(const char *path, const char *group);
void user_end(user *u);
/* Claims pages' bytes, with the limit of its own and the longest wait it may take; CHECKs that the call took
   no longer than that and half a second. */
int user_claim(user u, uint64_t bytes, uint64_t limit, uint32_t wait_ms);
void user_unclaim(user u, uint64_t bytes);

/* The file itself, to play other processes, stopped or damaged ones. */
kvc_ledger_map *map_ledger(const char *path);
void unmap_ledger(kvc_ledger_map *map);
/* Leaves an announcement in a slot: a claim of that age which will be charged `target` in all. */
void announce(kvc_ledger_map *map, int slot, int account, uint64_t age, int state, uint64_t target);

/* What limits are rounded down to. */
enum { UNIT = 4096 };
/* Limits, of a group or (NULL) of the card; the calls must succeed, whatever became of the setting. */
kvcached_limit_t limit_set(kvcached_ledger_t ledger, const char *group, uint64_t bytes, uint32_t revision);
kvcached_limit_t limit_get(kvcached_ledger_t ledger, const char *group);
void check_limit(kvcached_limit_t got, int result, uint32_t revision, uint64_t limit);

/* A forked child that runs body and ends well, unless a CHECK in it fails. */
pid_t child_start(void (*body)(void *), void *arg);
void child_join(pid_t pid); /* it must end well */
void child_kill(pid_t pid); /* SIGKILL, and waits */

/* New namespaces (CLONE_NEW...) for the calling process, as root or in a user namespace of its own. 0: this
   machine does not allow it. */
int enter_namespaces(int flags);

/* Memory shared with children, zero. */
void *shared_memory(size_t size);

/* A test of what some systems forbid to everybody (namespaces, mounts): it may be skipped where that is so,
   and therefore is none of those that run with KVCACHED_BACKEND=cuda, where nothing may be skipped. */
#define TEST_SYSTEM(suite, name)                                                 \
  static void test_##name(void);                                                 \
  static test_case case_##name = {#suite, #name, ON_HOST, test_##name, NULL};    \
  __attribute__((constructor)) static void register_##name(void) {               \
    const char *backend_ = getenv("KVCACHED_BACKEND");                           \
    if (!backend_ || strcmp(backend_, "cuda") != 0) test_register(&case_##name); \
  }                                                                              \
  static void test_##name(void)

#endif
