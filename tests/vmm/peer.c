/*
 * A second process for the tests: opens one context on the backend under test and does what its standard
 * input says.
 *
 *   vmm_tests --peer LEDGER GROUP LIMIT SLOT MORE      GROUP "-": none given
 *
 * MORE: words of host_limit=, room_wait_ms=, pool_limit=, pages= (of its KV region), slow= (milliseconds that
 * each call of the backend takes longer), and no_control.
 *
 * Its first line is "open" or the error's name. Then one reply a command, "ok" or the error's name:
 *
 *   ensure N, release N     the first N pages of its KV region
 *   put N                   release, then trim
 *   trim
 *   fill N BYTE             ensures and fills the first N pages; check N BYTE: "ok" or "other"
 *   weights N BYTE          a WEIGHTS region of N pages, full of BYTE; weigh BYTE: "ok" or "other"
 *   enter, leave            the gate, on one thread
 *   hold                    another thread goes in; unhold: and out
 *   queued N
 *   sleep, wake             all kinds
 *   asleep                  "asleep N": bytes
 *   charge                  "charge N": of the group
 *   slot                    "slot N"
 *   churn                   maps and unmaps without end, until killed; no reply
 *   race PATH N             see race(); "won 1", "won 0" or "over"
 *   storm PATH I SEED       see weather(); "ok"
 *   fork                    makes a child without exec that only waits for the input to close
 */
#include "context.h"
#include "fault.h"
#include "runner.h"
#include "storm.h"
#include "support.h"

#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

static size_t pages = 4096;
static kvcached_ctx_t ctx;
static kvcached_region_t region, weights;
static size_t page;

static const char *name_of(int err) { return err ? kvcached_err_name(err) : "ok"; }

static const char *put_back(size_t n) {
  int err = kvcached_release(region, 0, n * page);
  return name_of(err ? err : kvcached_trim(ctx, 0, NULL));
}

static void churn(void) {
  uint32_t seed = (uint32_t)getpid();
  for (;;) {
    size_t first = next_random(&seed) % (pages / 2), n = 1 + next_random(&seed) % (pages / 2);
    (void)kvcached_ensure(region, first * page, n * page);
    (void)kvcached_release(region, first * page, n * page);
    if (next_random(&seed) % 2) (void)kvcached_trim(ctx, 0, NULL);
  }
}

static void *share(const char *path, size_t size) {
  int fd = open(path, O_RDWR | O_CLOEXEC);
  CHECK(fd >= 0);
  void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  CHECK(p != MAP_FAILED);
  close(fd);
  return p;
}

/* Takes and gives back n times; the file holds a number that every peer raises only while it holds the bytes,
   so that it can never pass the limit unless the library lets it. Says whether it ever won. */
static void race(const char *path, unsigned n, uint64_t limit) {
  _Atomic uint64_t *held = share(path, sizeof(*held));
  uint32_t seed = (uint32_t)getpid() * 2654435761u | 1;
  unsigned won = 0;
  /* When a peer first wins is up to the scheduler; that it wins once the others have ended is not. */
  for (unsigned i = 0; i < n || (won == 0 && i < 200 * n); i++) {
    uint64_t bytes = (1 + next_random(&seed) % 16) * page;
    if (kvcached_ensure(region, 0, bytes) == KVCACHED_OK) {
      won++;
      if (atomic_fetch_add(held, bytes) + bytes > limit) {
        printf("over\n");
        exit(1);
      }
      atomic_fetch_sub(held, bytes);
    }
    CHECK_OK(kvcached_release(region, 0, pages * page));
    CHECK_OK(kvcached_trim(ctx, 0, NULL));
  }
  munmap((void *)held, sizeof(*held));
  printf("won %d\n", won > 0);
}

/* ---- the storm ---- */

enum { STORM_PAGES = 24 };

typedef struct sky {
  storm *s;
  int me;
  uint32_t seed;
  uint8_t tag[STORM_PAGES]; /* content of an ensured page; 0: not ensured */
  size_t ensured;
} sky;

static void hold_bytes(sky *k, int64_t bytes) {
  atomic_store(&k->s->changing[k->me], 1);
  atomic_fetch_add(&k->s->mine[k->me], bytes);
  storm_add(k->s, k->me, bytes);
  atomic_store(&k->s->changing[k->me], 0);
}

static void let_go(sky *k) { hold_bytes(k, -atomic_load(&k->s->mine[k->me])); }

static uint64_t memory(void) {
  kvcached_stats_t s = stats_of(ctx);
  return s.mapped + s.pooled;
}

/* What the ledger and the account say at the moment, for whoever has to find out how it came. */
static void tell(const sky *k, int which, int64_t total, uint64_t limit, uint64_t before, uint64_t after) {
  kvcached_slot_t all[16];
  size_t n = 0;
  char line[2000];
  all[0].struct_size = sizeof(all[0]);
  (void)kvcached_ledger_slots(ctx->ledger, all, 16, &n);
  int len = snprintf(line, sizeof(line),
                     "peer %d got more (%" PRIu64 " after %" PRIu64 "), total %d is %" PRId64
                     " above %" PRIu64 "; slots (pid group claim+asked inside):",
                     k->me, after / page, before / page, which, total / (int64_t)page, limit / page);
  for (size_t i = 0; i < n && i < 16 && len < 1800; i++)
    len += snprintf(line + len, sizeof(line) - (size_t)len, " %lld %s %" PRIu64 "+%" PRIu64 " %u,",
                    (long long)all[i].pid, all[i].group, all[i].claim / page,
                    (all[i].charge - all[i].claim) / page, all[i].inside);
  len += snprintf(line + len, sizeof(line) - (size_t)len, " account:");
  for (int i = 0; i < STORM_PEERS && len < 1950; i++)
    len += snprintf(line + len, sizeof(line) - (size_t)len, " %" PRId64,
                    atomic_load(&k->s->mine[i]) / (int64_t)page);
  fprintf(stderr, "%s\n", line);
}

/* After a call that got more memory than there was `before`, all that is held must be within the limits, if
   they were the same all the time since `limit_no`. (Where one was lowered, what is in use stays in use.) */
static void check_limit(sky *k, uint64_t limit_no, uint64_t before) {
  uint64_t after = memory();
  if (after <= before) return;
  int64_t total[TOTALS];
  uint64_t limit[TOTALS];
  for (int t = 0; t < TOTALS; t++) {
    total[t] = atomic_load(&k->s->total[t]);
    limit[t] = atomic_load(&k->s->limit[t]);
  }
  if (limit_no % 2 != 0 || atomic_load(&k->s->limit_no) != limit_no) return;
  atomic_fetch_add(&k->s->checked, 1);
  for (int t = 0; t < TOTALS; t++) {
    if (t != CARD_TOTAL && t != k->me % 2) continue;
    if (total[t] <= (int64_t)limit[t]) continue;
    atomic_fetch_add(&k->s->over, 1);
    tell(k, t, total[t], limit[t], before, after);
  }
}

/* One visit: in through the gate, something done, everything looked at, out again. */
static int visit(sky *k) {
  uint64_t limit_no = atomic_load(&k->s->limit_no), before = memory();
  int err = kvcached_enter(ctx);
  if (err) return err;
  hold_bytes(k, (int64_t)(k->ensured * page));
  check_limit(k, limit_no, before);
  size_t first = next_random(&k->seed) % STORM_PAGES, n = 1 + next_random(&k->seed) % (STORM_PAGES - first);
  switch (next_random(&k->seed) % 4) {
    case 0:
    case 1: {
      limit_no = atomic_load(&k->s->limit_no);
      before = memory();
      if (next_random(&k->seed) % 3 == 0) CHECK_OK(kvcached_prepare(region, first * page, n * page));
      err = kvcached_ensure(region, first * page, n * page);
      if (err) break;
      size_t more = 0;
      for (size_t i = first; i < first + n; i++) more += k->tag[i] == 0;
      hold_bytes(k, (int64_t)(more * page));
      check_limit(k, limit_no, before);
      for (size_t i = first; i < first + n; i++) {
        if (k->tag[i]) continue;
        CHECK(holds_ends(region, i, 0));
        k->tag[i] = (uint8_t)(1 + next_random(&k->seed) % 255);
        put_ends(region, i, k->tag[i]);
      }
      k->ensured += more;
      break;
    }
    case 2:
      let_go(k);
      CHECK_OK(kvcached_release(region, first * page, n * page));
      for (size_t i = first; i < first + n; i++) {
        k->ensured -= k->tag[i] != 0;
        k->tag[i] = 0;
      }
      hold_bytes(k, (int64_t)(k->ensured * page));
      break;
    default: sleep_ms(next_random(&k->seed) % 3); break;
  }
  for (size_t i = 0; i < STORM_PAGES; i++)
    if (k->tag[i]) CHECK(holds_ends(region, i, k->tag[i]));
  let_go(k);
  CHECK_OK(kvcached_leave(ctx));
  return err;
}

/* Works at random until the test says that it ends. Only what a limit or a busy gate explains may fail. */
static void weather(const char *path, int me, uint32_t seed) {
  sky k = {.s = share(path, sizeof(storm)), .me = me, .seed = seed};
  while (!atomic_load(&k.s->ends)) {
    uint32_t stops = atomic_load(&k.s->stops[me]);
    int64_t start = now_ms();
    int err;
    switch (next_random(&k.seed) % 8) {
      case 0: err = kvcached_trim(ctx, next_random(&k.seed) % 4 * page, NULL); break;
      case 1: err = kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 20, NULL); break;
      case 2: err = kvcached_set_queued(ctx, next_random(&k.seed) % 2); break;
      default: err = visit(&k);
    }
    uint32_t took = (uint32_t)(now_ms() - start), slowest = atomic_load(&k.s->slow_ms);
    if (stops == atomic_load(&k.s->stops[me]))
      while (took > slowest && !atomic_compare_exchange_weak(&k.s->slow_ms, &slowest, took)) {
      }
    if (err && err != KVCACHED_E_LIMIT && err != KVCACHED_E_BUSY && err != KVCACHED_E_NOMEM)
      check_failed(__FILE__, __LINE__, "%s in a storm", kvcached_err_name(err));
    atomic_fetch_add(&k.s->steps, 1);
    if (err) {
      atomic_fetch_add(&k.s->refused, 1);
      sleep_ms(next_random(&k.seed) % 4);
    }
  }
  munmap(k.s, sizeof(storm));
  printf("ok\n");
}

/* ---- another thread in the gate ---- */

static pthread_t holder;
static pthread_mutex_t holder_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t holder_cond = PTHREAD_COND_INITIALIZER;
static int holder_inside, holder_ends;

static void *stay_inside(void *arg) {
  (void)arg;
  CHECK_OK(kvcached_enter(ctx));
  pthread_mutex_lock(&holder_mutex);
  holder_inside = 1;
  pthread_cond_broadcast(&holder_cond);
  while (!holder_ends) pthread_cond_wait(&holder_cond, &holder_mutex);
  pthread_mutex_unlock(&holder_mutex);
  CHECK_OK(kvcached_leave(ctx));
  return NULL;
}

static void hold(void) {
  holder_inside = holder_ends = 0;
  CHECK(pthread_create(&holder, NULL, stay_inside, NULL) == 0);
  pthread_mutex_lock(&holder_mutex);
  while (!holder_inside) pthread_cond_wait(&holder_cond, &holder_mutex);
  pthread_mutex_unlock(&holder_mutex);
}

static void unhold(void) {
  pthread_mutex_lock(&holder_mutex);
  holder_ends = 1;
  pthread_cond_broadcast(&holder_cond);
  pthread_mutex_unlock(&holder_mutex);
  pthread_join(holder, NULL);
}

/* ---- commands ---- */

static const char *fill(size_t n, int byte) {
  int err = kvcached_ensure(region, 0, n * page);
  if (!err) put(region, 0, byte, n * page);
  return name_of(err);
}

static const char *make_weights(size_t n, int byte) {
  int err = kvcached_reserve(ctx, KVCACHED_WEIGHTS, n * page, &weights);
  if (!err) err = kvcached_ensure(weights, 0, n * page);
  if (!err) put(weights, 0, byte, n * page);
  return name_of(err);
}

/* Whether the first n bytes of a region are `byte`, waking it if it sleeps. */
static const char *look(kvcached_region_t r, size_t n, int byte) {
  int err = kvcached_enter(ctx);
  if (err) return name_of(err);
  const char *answer = holds(r, 0, byte, n) ? "ok" : "other";
  CHECK_OK(kvcached_leave(ctx));
  return answer;
}

static void make_child(void) {
  pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid != 0) return;
  char c;
  printf("ok\n"); /* said by the child: only then has its fork() ended */
  while (read(0, &c, 1) > 0) {
  }
  _exit(0);
}

static void obey(const char *line, uint64_t limit) {
  char path[300], word[32] = "";
  size_t n;
  unsigned count, seed;
  int byte;
  (void)sscanf(line, "%31s", word);
  if (sscanf(line, "ensure %zu", &n) == 1) {
    printf("%s\n", name_of(kvcached_ensure(region, 0, n * page)));
  } else if (sscanf(line, "release %zu", &n) == 1) {
    printf("%s\n", name_of(kvcached_release(region, 0, n * page)));
  } else if (sscanf(line, "put %zu", &n) == 1) {
    printf("%s\n", put_back(n));
  } else if (sscanf(line, "fill %zu %d", &n, &byte) == 2) {
    printf("%s\n", fill(n, byte));
  } else if (sscanf(line, "check %zu %d", &n, &byte) == 2) {
    printf("%s\n", look(region, n * page, byte));
  } else if (sscanf(line, "weights %zu %d", &n, &byte) == 2) {
    printf("%s\n", make_weights(n, byte));
  } else if (sscanf(line, "weigh %d", &byte) == 1) {
    printf("%s\n", look(weights, kvcached_region_size(weights), byte));
  } else if (sscanf(line, "queued %zu", &n) == 1) {
    printf("%s\n", name_of(kvcached_set_queued(ctx, (uint32_t)n)));
  } else if (strcmp(word, "trim") == 0) {
    printf("%s\n", name_of(kvcached_trim(ctx, 0, NULL)));
  } else if (strcmp(word, "enter") == 0) {
    printf("%s\n", name_of(kvcached_enter(ctx)));
  } else if (strcmp(word, "leave") == 0) {
    printf("%s\n", name_of(kvcached_leave(ctx)));
  } else if (strcmp(word, "hold") == 0) {
    hold();
    printf("ok\n");
  } else if (strcmp(word, "unhold") == 0) {
    unhold();
    printf("ok\n");
  } else if (strcmp(word, "sleep") == 0) {
    printf("%s\n", name_of(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 1000, NULL)));
  } else if (strcmp(word, "wake") == 0) {
    printf("%s\n", name_of(kvcached_wake(ctx, KVCACHED_ALL_KINDS)));
  } else if (strcmp(word, "asleep") == 0) {
    printf("asleep %" PRIu64 "\n", stats_of(ctx).asleep);
  } else if (strcmp(word, "charge") == 0) {
    printf("charge %" PRIu64 "\n", stats_of(ctx).group_charge);
  } else if (strcmp(word, "slot") == 0) {
    printf("slot %d\n", ctx->slot);
  } else if (strcmp(word, "churn") == 0) {
    churn();
  } else if (sscanf(line, "race %299s %u", path, &count) == 2) {
    race(path, count, limit);
  } else if (sscanf(line, "storm %299s %u %u", path, &count, &seed) == 3) {
    weather(path, (int)count, seed);
  } else if (strcmp(word, "fork") == 0) {
    make_child();
  } else {
    printf("unknown command\n");
  }
}

static void read_more(kvcached_options_t *o, char *more) {
  for (char *save = NULL, *w = strtok_r(more, " ", &save); w; w = strtok_r(NULL, " ", &save)) {
    unsigned long long v;
    if (sscanf(w, "host_limit=%llu", &v) == 1)
      o->host_limit = v;
    else if (sscanf(w, "room_wait_ms=%llu", &v) == 1)
      o->room_wait_ms = (uint32_t)v;
    else if (sscanf(w, "pool_limit=%llu", &v) == 1)
      o->pool_limit = v;
    else if (sscanf(w, "slow=%llu", &v) == 1)
      fault_delay(FAULT_ANY, (unsigned)v);
    else if (sscanf(w, "pages=%llu", &v) == 1)
      pages = (size_t)v;
    else if (strcmp(w, "no_control") == 0)
      o->flags |= KVCACHED_NO_CONTROL;
    else
      check_failed(__FILE__, __LINE__, "a peer does not know the word %s", w);
  }
}

int peer_main(int argc, char **argv) {
  CHECK(argc == 6);
  setvbuf(stdout, NULL, _IOLBF, 0);
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = argv[1];
  o.group = strcmp(argv[2], "-") ? argv[2] : NULL;
  o.limit = strtoull(argv[3], NULL, 10);
  o.slot = atoi(argv[4]);
  o.name = "peer";
  read_more(&o, argv[5]);
  int err = kvcached_open(&o, &ctx);
  if (err) {
    printf("%s\n", kvcached_err_name(err));
    return 0;
  }
  page = kvcached_page_size(ctx);
  CHECK_OK(kvcached_reserve(ctx, KVCACHED_KV, pages * page, &region));
  printf("open\n");
  char line[400];
  while (fgets(line, sizeof(line), stdin)) obey(line, o.limit);
  kvcached_shutdown(ctx);
  return 0;
}
