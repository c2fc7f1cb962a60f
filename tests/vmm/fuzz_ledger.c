/*
 * Feeds the ledger with damaged files: whatever its bytes are, the library may refuse or show nonsense, but
 * it neither crashes, reads outside, nor waits longer than it may.
 *
 *   clang -fsanitize=fuzzer,address -DKVCACHED_LIBFUZZER ...    libFuzzer, tests/vmm/corpus as a start
 *   cc ...                                                      main: fuzz_ledger [--runs N] [FILE]...
 * main runs each file once and then N seeded mutations of them (3000).
 *
 * An input is mode, flags, and
 *   mode 0    a size of 3 bytes and the first bytes of a file that is opened; the rest of it is zero
 *   mode 1    changes to the file of a ledger in use: word (2 bytes), how (1), value (8), and again
 *   mode 2    the same, made over and over by another thread while the library works
 */
#include "ledger.h"
#include "ledger_file.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Not an assert: it must hold in every build. */
#define MUST(cond)                                                                                        \
  do {                                                                                                    \
    if (!(cond)) {                                                                                        \
      fprintf(stderr, "%s:%d: %s\n  last error: %s\n", __FILE__, __LINE__, #cond, kvcached_last_error()); \
      abort();                                                                                            \
    }                                                                                                     \
  } while (0)

enum { USERS = 3, LEASED = USERS, SLOTS_IN_REACH = 6, CHANGES = 64, CHANGE_SIZE = 11 };
enum { NEW_SLOT = 1, SHORT_WAITS = 2, OWN_LIMITS = 4 }; /* flags */

static char folder[200], live_path[300], raw_path[300];
static kvcached_ledger_t parent, user[USERS];
static kvc_ledger_map *map, *good;

static void clean_up(void) {
  (void)unlink(live_path);
  (void)unlink(raw_path);
  (void)rmdir(folder);
}

static void begin(void) {
  const char *tmp = getenv("TMPDIR");
  snprintf(folder, sizeof(folder), "%s/kvcached-fuzz-XXXXXX", tmp && *tmp ? tmp : "/tmp");
  MUST(mkdtemp(folder) != NULL);
  (void)atexit(clean_up);
  snprintf(live_path, sizeof(live_path), "%s/live", folder);
  snprintf(raw_path, sizeof(raw_path), "%s/raw", folder);
  static const char *const group[USERS] = {"a", "a", "b"};
  kvc_shortage s;
  int slot;
  for (int i = 0; i < USERS; i++) {
    MUST(kvc_ledger_open(live_path, &user[i]) == 0);
    MUST(kvc_ledger_take(user[i], group[i], "user", &slot) == 0 && slot == i);
    MUST(kvc_ledger_claim(user[i], i, KVC_CLAIM_PAGES, 1 << 20, UINT64_MAX, 0, &s) == 0);
    kvc_ledger_control(user[i], i, 1);
    kvc_ledger_publish(user[i], i, &(kvc_figures){.idle = 4096});
  }
  MUST(kvc_ledger_open(live_path, &parent) == 0);
  MUST(kvcached_ledger_lease(parent, "a", "leased", 1 << 20, 0, UINT64_MAX, &slot) == 0 && slot == LEASED);
  int fd = open(live_path, O_RDWR | O_CLOEXEC);
  MUST(fd >= 0);
  map = mmap(NULL, sizeof(*map), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  good = malloc(sizeof(*good));
  MUST(map != MAP_FAILED && good != NULL && pread(fd, good, sizeof(*good), 0) == sizeof(*good));
  close(fd);
}

static int64_t started;
static void start_watch(void) { started = kvc_now_ns(); }
/* Far more than any wait that is asked for here, for machines that are busy. */
static void stop_watch(void) { MUST(kvc_now_ns() - started < INT64_C(5000000000)); }

/* ---- everything that reads the file ---- */

static void list(kvcached_ledger_t l) {
  size_t n = 0;
  kvcached_slot_t *all = malloc(KVC_LEDGER_SLOTS * sizeof(*all)); /* on the heap: what is behind it is seen */
  MUST(all != NULL);
  all[0].struct_size = sizeof(all[0]);
  if (kvcached_ledger_slots(l, all, KVC_LEDGER_SLOTS, &n) == 0) {
    MUST(n <= KVC_LEDGER_SLOTS);
    for (size_t i = 0; i < n; i++) {
      MUST(all[i].slot >= 0 && all[i].slot < KVC_LEDGER_SLOTS && (all[i].leased || all[i].attached));
      MUST(strnlen(all[i].name, sizeof(all[i].name)) < sizeof(all[i].name));
      MUST(strnlen(all[i].group, sizeof(all[i].group)) < sizeof(all[i].group));
      MUST(all[i].charge >= all[i].lease && (all[i].charge >= all[i].claim));
    }
  }
  free(all);
}

static void use_limits(kvcached_ledger_t l, unsigned flags) {
  kvcached_limit_t limit = {.struct_size = sizeof(limit)};
  static const char *const group[] = {"a", "b", NULL};
  for (int i = 0; i < 3; i++) {
    (void)kvcached_ledger_get_limit(l, group[i], &limit);
    if (!(flags & OWN_LIMITS)) continue;
    limit.struct_size = sizeof(limit);
    if (kvcached_ledger_set_limit(l, group[i], 8 << 20, 0, &limit) == 0)
      MUST(limit.result >= KVCACHED_LIMIT_APPLIED && limit.result <= KVCACHED_LIMIT_CONFLICT);
    (void)kvcached_ledger_set_limit(l, group[i], 9 << 20, 3, NULL);
  }
}

static void claim(int i, unsigned flags) {
  static const kvc_claim_kind kinds[] = {KVC_CLAIM_PAGES, KVC_CLAIM_FIXED, KVC_CLAIM_HOST};
  kvc_shortage s;
  uint32_t wait_ms = flags & SHORT_WAITS && i == 0 ? 2 : 0;
  for (int k = 0; k < 3; k++) {
    start_watch();
    int err = kvc_ledger_claim(user[i], i, kinds[k], 4096, 16 << 20, wait_ms, &s);
    MUST(err == 0 || err == KVCACHED_E_LIMIT || err == KVCACHED_E_HOST_LIMIT || err == KVCACHED_E_SLOT);
    if (err == 0 && kinds[k] != KVC_CLAIM_FIXED) kvc_ledger_unclaim(user[i], i, kinds[k], 4096);
    stop_watch();
  }
  kvc_ledger_unclaim(user[i], i, KVC_CLAIM_PAGES, UINT64_MAX);
  kvc_account account;
  if (kvc_ledger_account(user[i], i, 16 << 20, &account) == 0) MUST(account.lease_left <= UINT64_MAX);
}

static void command(int from, unsigned flags) {
  uint64_t freed;
  for (int to = 0; to <= LEASED + 1; to++) {
    start_watch();
    uint32_t wait_ms = flags & SHORT_WAITS && to == (int)(flags >> 4) % (LEASED + 2) ? 2 : 0;
    (void)kvcached_ledger_command(user[from], to, KVCACHED_CMD_TRIM, wait_ms, &freed);
    stop_watch();
  }
  for (int i = 0; i < USERS; i++) {
    int what = 0;
    start_watch();
    if (kvc_ledger_next_command(user[i], i, 0, &what)) {
      MUST(what >= KVCACHED_CMD_TRIM && what <= KVCACHED_CMD_REFUSE);
      kvc_ledger_answer(user[i], i, KVCACHED_E_BUSY, UINT64_MAX);
    }
    stop_watch();
  }
}

static void pick(void) {
  uint64_t asked[2] = {0, 0};
  for (int sleep = 0; sleep < 2; sleep++) {
    int victim = kvc_ledger_pick_victim(user[0], 0, sleep, 0, asked);
    MUST(victim >= -1 && victim < KVC_LEDGER_SLOTS && victim != 0);
  }
}

/* Who waits for the bell, and for memory. */
static void use_bell(unsigned flags) {
  uint64_t older;
  start_watch();
  uint32_t seen = kvc_ledger_bell(parent);
  MUST(kvcached_ledger_wait(parent, &seen, flags & SHORT_WAITS ? 2 : 0) == 0);
  for (int i = 0; i < 2; i++) {
    kvc_ledger_want(user[i], i, &(kvc_want){.bytes = 4096, .since_ns = (uint64_t)kvc_now_ns(), .parked = 1});
    (void)kvc_ledger_older_wants(user[i], i, UINT64_MAX, &older);
    kvc_ledger_ring_if_wanted(user[i], kvc_coarse_ns());
    kvc_ledger_want(user[i], i, &(kvc_want){0});
  }
  kvc_ledger_bell_ring(user[2]);
  stop_watch();
}

/* As a process that comes: opens the file, takes slots and leaves. */
static void visit(const char *path) {
  kvcached_ledger_t l;
  int slot;
  char group[KVCACHED_GROUP_MAX + 1];
  uint64_t fixed;
  start_watch();
  if (kvc_ledger_open(path, &l) != 0) return;
  list(l);
  if (kvc_ledger_take(l, "b", "visitor", &slot) == 0) {
    kvc_shortage s;
    (void)kvc_ledger_claim(l, slot, KVC_CLAIM_PAGES, 4096, 16 << 20, 0, &s);
    kvc_ledger_control(l, slot, 1);
    kvc_ledger_control(l, slot, 0);
  }
  if (kvc_ledger_attach(l, LEASED, NULL, "child", group, &fixed) == 0)
    MUST(strlen(group) <= KVCACHED_GROUP_MAX);
  if (kvcached_ledger_lease(l, "b", "m", 4096, 0, UINT64_MAX, &slot) == 0)
    MUST(kvcached_ledger_unlease(l, slot) == 0);
  kvcached_ledger_close(l);
  stop_watch();
}

static void use_all(unsigned flags) {
  list(user[0]);
  use_limits(user[0], flags);
  pick();
  for (int i = 0; i < USERS; i++) claim(i, flags);
  command(0, flags);
  use_bell(flags);
  kvc_ledger_mark_inside(user[1], 1, 1);
  kvc_ledger_mark_inside(user[1], 1, 0);
  if (flags & NEW_SLOT) visit(live_path);
  list(parent);
}

/* ---- changing it ---- */

typedef struct changes {
  const uint8_t *data;
  size_t n;
  _Atomic int stop;
} changes;

/* Words of the header that mean something, and the first slots. */
static _Atomic uint64_t *word_at(unsigned where) {
  _Atomic uint64_t *words = (_Atomic uint64_t *)(void *)map;
  where %= 8 + SLOTS_IN_REACH * (unsigned)(sizeof(kvc_ledger_slot) / 8);
  return where < 8 ? &words[where] : &words[offsetof(kvc_ledger_map, slot) / 8 + where - 8];
}

static void apply(const changes *c) {
  for (size_t i = 0; i < c->n; i++) {
    const uint8_t *p = c->data + i * CHANGE_SIZE;
    uint64_t value;
    memcpy(&value, p + 3, sizeof(value));
    _Atomic uint64_t *word = word_at(p[0] | (unsigned)p[1] << 8);
    switch (p[2] % 5) {
      case 0: atomic_store(word, value); break;
      case 1: atomic_fetch_xor(word, value); break;
      case 2: atomic_fetch_add(word, value); break;
      case 3: atomic_store(word, UINT64_MAX - value % 4096); break;
      default: atomic_store(word, value % 256); break;
    }
  }
}

static void *apply_often(void *arg) {
  const changes *c = arg;
  while (!atomic_load(&c->stop)) apply(c);
  return NULL;
}

/* Everything as it was, and the library none the worse for it. */
static void restore(void) {
  for (size_t i = 0; i < sizeof(*map) / 8; i++)
    atomic_store((_Atomic uint64_t *)(void *)map + i, ((const uint64_t *)(const void *)good)[i]);
  kvc_shortage s;
  for (int i = 0; i < USERS; i++) {
    int what;
    (void)kvc_ledger_next_command(user[i], i, 0, &what);
    kvc_ledger_answer(user[i], i, KVCACHED_OK, 0);
    MUST(kvc_ledger_claim(user[i], i, KVC_CLAIM_PAGES, 4096, 16 << 20, 0, &s) == 0);
    kvc_ledger_unclaim(user[i], i, KVC_CLAIM_PAGES, 4096);
  }
}

static void run_changes(const uint8_t *data, size_t size, unsigned flags, int beside) {
  changes c = {.data = data, .n = size / CHANGE_SIZE < CHANGES ? size / CHANGE_SIZE : CHANGES};
  if (beside) {
    pthread_t thread;
    MUST(pthread_create(&thread, NULL, apply_often, &c) == 0);
    for (int i = 0; i < 3; i++) use_all(flags);
    atomic_store(&c.stop, 1);
    pthread_join(thread, NULL);
  } else {
    apply(&c);
    use_all(flags);
    use_all(flags); /* what the first pass made of it */
  }
  restore();
}

static void run_raw(const uint8_t *data, size_t size) {
  size_t file_size = 0;
  for (int i = 0; i < 3 && size > 0; i++, data++, size--) file_size |= (size_t)*data << (8 * i);
  file_size %= 140000;
  int fd = open(raw_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  MUST(fd >= 0 && ftruncate(fd, (off_t)file_size) == 0);
  if (size > file_size) size = file_size;
  MUST(size == 0 || pwrite(fd, data, size, 0) == (ssize_t)size);
  close(fd);
  visit(raw_path);
  visit(raw_path);
  MUST(unlink(raw_path) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (!map) begin();
  if (size < 2) return 0;
  if (data[0] % 3 == 0)
    run_raw(data + 2, size - 2);
  else
    run_changes(data + 2, size - 2, data[1], data[0] % 3 == 2);
  return 0;
}

/* ---- without libFuzzer ---- */

#ifndef KVCACHED_LIBFUZZER
enum { INPUT_MAX = 2 + CHANGES * CHANGE_SIZE, SEEDS = 256 };
static struct {
  uint8_t bytes[INPUT_MAX];
  size_t size;
} seed_input[SEEDS];
static unsigned seeds;

static uint64_t next_random(uint64_t *state) { /* xorshift64, Marsaglia 2003 */
  uint64_t x = *state;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return *state = x;
}

/* Numbers that are often handled wrongly, and their neighbours. */
static uint64_t odd_value(uint64_t *random) {
  static const uint64_t odd[] = {0,
                                 2,
                                 255,
                                 4096,
                                 1 << 20,
                                 INT32_MAX,
                                 UINT32_MAX,
                                 UINT64_C(1) << 63,
                                 UINT64_C(0xffffffff) << 32,
                                 UINT64_C(0x4141414141414141)};
  uint64_t which = next_random(random) % (2 * sizeof(odd) / sizeof(odd[0]));
  if (which < sizeof(odd) / sizeof(odd[0])) return odd[which] + next_random(random) % 3 - 1;
  return next_random(random) >> next_random(random) % 64;
}

static size_t mutate(uint8_t *out, uint64_t *random) {
  size_t size = 2;
  memset(out, 0, INPUT_MAX);
  if (seeds && next_random(random) % 4) {
    unsigned from = (unsigned)(next_random(random) % seeds);
    size = seed_input[from].size < 2 ? 2 : seed_input[from].size;
    memcpy(out, seed_input[from].bytes, seed_input[from].size);
  } else {
    out[0] = next_random(random) % 16 == 0 ? 2 : 1;
  }
  out[1] = (uint8_t)(next_random(random) & (0xf0 | NEW_SLOT | SHORT_WAITS | OWN_LIMITS));
  if (out[0] % 3 == 0) { /* a file: single bytes, and its size */
    for (unsigned n = (unsigned)(next_random(random) % 6); n > 0; n--)
      out[next_random(random) % size] ^= (uint8_t)(1u << next_random(random) % 8);
    return size;
  }
  for (unsigned n = (unsigned)(1 + next_random(random) % 12); n > 0; n--) {
    if (size + CHANGE_SIZE > INPUT_MAX) break;
    uint8_t *p = out + size;
    uint64_t value = odd_value(random), where = next_random(random);
    memcpy(p, &where, 2);
    p[2] = (uint8_t)(next_random(random) % 5);
    memcpy(p + 3, &value, sizeof(value));
    size += CHANGE_SIZE;
  }
  return size;
}

static void run_file(const char *path) {
  FILE *f = fopen(path, "rb");
  if (!f) {
    perror(path);
    exit(2);
  }
  uint8_t *bytes = malloc(INPUT_MAX);
  MUST(bytes != NULL);
  size_t size = fread(bytes, 1, INPUT_MAX, f);
  (void)fclose(f);
  (void)LLVMFuzzerTestOneInput(bytes, size);
  if (seeds < SEEDS) {
    memcpy(seed_input[seeds].bytes, bytes, size);
    seed_input[seeds++].size = size;
  }
  free(bytes);
}

int main(int argc, char **argv) {
  unsigned long runs = 3000, files = 0;
  for (int i = 1; i < argc; i++) {
    if (strcmp(argv[i], "--runs") == 0 && i + 1 < argc) {
      runs = strtoul(argv[++i], NULL, 10);
    } else {
      run_file(argv[i]);
      files++;
    }
  }
  uint64_t random = UINT64_C(0x9e3779b97f4a7c15);
  for (unsigned long i = 0; i < runs; i++) {
    uint8_t bytes[INPUT_MAX];
    size_t size = mutate(bytes, &random);
    (void)LLVMFuzzerTestOneInput(bytes, size);
  }
  printf("%lu files and %lu mutations: nothing went wrong\n", files, runs);
  return 0;
}
#endif
