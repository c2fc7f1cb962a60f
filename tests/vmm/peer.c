/*
 * A second process for the tests: opens one context on the backend under test and does what its standard
 * input says.
 *
 *   vmm_tests --peer LEDGER GROUP LIMIT SLOT MORE      GROUP "-": none given
 *
 * MORE: words of host_limit=, room_wait_ms=, group_wait_ms=, pool_limit=, pages= (of its KV region), slow=
 * (milliseconds that each call of the backend takes longer), and no_control.
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
 *   parks                   "parks N": calls that waited for room
 *   rounds N SEED           see rounds_peer(); "ok"
 *   slot                    "slot N"
 *   churn                   maps and unmaps without end, until killed; no reply
 *   race PATH N             see race(); "won 1", "won 0" or "over"
 *   storm PATH I SEED       see storm_peer(); "ok"
 *   fork                    makes a child without exec that only waits for the input to close
 */
#include "context.h"
#include "fault.h"
#include "rounds.h"
#include "runner.h"
#include "storm.h"
#include "support.h"

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

/* Takes and gives back n times; the file holds a number that every peer raises only while it holds the bytes,
   so that it can never pass the limit unless the library lets it. Says whether it ever won. */
static void race(const char *path, unsigned n, uint64_t limit) {
  _Atomic uint64_t *held = share_file(path, sizeof(*held));
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

/* Inside the gate: it may be told to sleep. */
static const char *fill(size_t n, int byte) {
  int err = kvcached_enter(ctx);
  if (err) return name_of(err);
  err = kvcached_ensure(region, 0, n * page);
  if (!err) put(region, 0, byte, n * page);
  CHECK_OK(kvcached_leave(ctx));
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
  } else if (strcmp(word, "parks") == 0) {
    printf("parks %" PRIu64 "\n", stats_of(ctx).parks);
  } else if (sscanf(line, "rounds %u %u", &count, &seed) == 2) {
    rounds_peer(ctx, region, count, seed);
  } else if (strcmp(word, "slot") == 0) {
    printf("slot %d\n", ctx->slot);
  } else if (strcmp(word, "churn") == 0) {
    churn();
  } else if (sscanf(line, "race %299s %u", path, &count) == 2) {
    race(path, count, limit);
  } else if (sscanf(line, "storm %299s %u %u", path, &count, &seed) == 3) {
    storm_peer(ctx, region, path, (int)count, seed);
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
    else if (sscanf(w, "group_wait_ms=%llu", &v) == 1)
      o->group_wait_ms = (uint32_t)v;
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
