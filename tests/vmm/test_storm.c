/*
 * Eight processes on one card at once, at random: they grow, shrink, sleep and wake, limits change under
 * them, some are stopped for a while and some killed in the middle of whatever they do. What they hold is
 * counted in a file of the test's own (storm.h), which knows nothing of the ledger.
 */
#include "support.h"

#include "storm.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CARD = 60, LIMIT = 40, BOUND_MS = 6000 }; /* pages; and what no call may take longer than, see below */

typedef struct weather {
  const char *ledger, *file;
  storm *s;
  size_t page;
  kvcached_ledger_t l;
  peer p[STORM_PEERS];
  int stopped[STORM_PEERS];
  uint32_t seed;
} weather;

static void start(weather *w, int i) {
  char command[400];
  /* Every fourth has a device that takes its time. */
  const char *more = i % 4 == 3 ? "pages=24 room_wait_ms=200 slow=1" : "pages=24 room_wait_ms=200";
  w->p[i] = peer_start_with(w->ledger, i % 2 ? "odd" : "even", LIMIT * w->page, -1, more);
  peer_expect_open(w->p[i]);
  w->stopped[i] = 0;
  snprintf(command, sizeof(command), "storm %s %d %u", w->file, i, next_random(&w->seed));
  peer_send(w->p[i], command);
}

static void stop(weather *w, int i) {
  int status;
  if (w->stopped[i]) return;
  atomic_fetch_add(&w->s->stops[i], 1);
  kill(w->p[i].pid, SIGSTOP);
  CHECK(waitpid(w->p[i].pid, &status, WUNTRACED) == w->p[i].pid);
  if (!WIFSTOPPED(status)) check_failed(__FILE__, __LINE__, "peer %d ended by itself, with 0x%x", i, status);
  w->stopped[i] = 1;
}

static void go_on(weather *w, int i) {
  if (!w->stopped[i]) return;
  atomic_fetch_add(&w->s->stops[i], 1); /* what it is in the middle of has waited */
  kill(w->p[i].pid, SIGCONT);
  w->stopped[i] = 0;
}

/* kill -9, and another in its place. Stopped first, so that what it held can be taken out of the account
   before others may have it. */
static void replace(weather *w, int i) {
  stop(w, i);
  while (atomic_load(&w->s->changing[i])) { /* not where nobody can tell what of its part is in the totals */
    go_on(w, i);
    sleep_ms(1);
    stop(w, i);
  }
  int64_t mine = atomic_exchange(&w->s->mine[i], 0);
  storm_add(w->s, i, -mine);
  peer_kill(&w->p[i]);
  start(w, i);
}

/* Of a group or of the card. In the account it is raised first, and lowered last. */
static void set_limit(weather *w, int which) {
  static const char *const group[] = {"even", "odd", NULL};
  size_t most = which == CARD_TOTAL ? CARD : LIMIT;
  uint64_t bytes = (most / 3 + next_random(&w->seed) % most) * w->page,
           before = atomic_load(&w->s->limit[which]);
  atomic_fetch_add(&w->s->limit_no, 1);
  if (bytes > before) atomic_store(&w->s->limit[which], bytes);
  CHECK_OK(kvcached_ledger_set_limit(w->l, group[which], bytes, 0, NULL));
  if (bytes < before) atomic_store(&w->s->limit[which], bytes);
  atomic_fetch_add(&w->s->limit_no, 1);
}

static void command(weather *w) {
  int what = 1 + (int)(next_random(&w->seed) % 3), slot = (int)(next_random(&w->seed) % (STORM_PEERS + 2));
  int64_t begin = now_ms();
  int err = kvcached_ledger_command(w->l, slot, what, next_random(&w->seed) % 60, NULL);
  CHECK_LE(now_ms() - begin, 3000);
  CHECK(err == KVCACHED_OK || err == KVCACHED_E_BUSY || err == KVCACHED_E_TIMEOUT || err == KVCACHED_E_SLOT ||
        err == KVCACHED_E_LIMIT);
}

/* What the ledger says at any moment: charges within the limits, but where these were lowered. */
static void look(weather *w) {
  kvcached_slot_t all[64];
  size_t n;
  all[0].struct_size = sizeof(all[0]);
  CHECK_OK(kvcached_ledger_slots(w->l, all, 64, &n));
  CHECK_LE(n, STORM_PEERS);
  CHECK_EQ(atomic_load(&w->s->over), 0);
}

static void storm_of(uint32_t seed, unsigned ms) {
  static unsigned count;
  static char names[64][2][32];
  CHECK_LE(count, 63);
  snprintf(names[count][0], 32, "ledger-%u", count);
  snprintf(names[count][1], 32, "account-%u", count);
  weather w = {.ledger = scratch(names[count][0]), .file = scratch(names[count][1]), .page = test_page()};
  count++;
  w.seed = seed * 2654435761u | 1;
  int fd = open(w.file, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  CHECK(fd >= 0 && ftruncate(fd, sizeof(storm)) == 0);
  w.s = mmap(NULL, sizeof(storm), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  CHECK(w.s != MAP_FAILED);
  close(fd);
  CHECK_OK(kvcached_ledger_open(w.ledger, &w.l));
  CHECK_OK(kvcached_ledger_set_limit(w.l, NULL, CARD * w.page, 0, NULL));
  atomic_store(&w.s->limit[CARD_TOTAL], CARD * w.page);
  atomic_store(&w.s->limit[EVEN], LIMIT * w.page);
  atomic_store(&w.s->limit[ODD], LIMIT * w.page);
  for (int i = 0; i < STORM_PEERS; i++) start(&w, i);

  int64_t until = now_ms() + ms;
  while (now_ms() < until) {
    int i = (int)(next_random(&w.seed) % STORM_PEERS), others = 0;
    for (int k = 0; k < STORM_PEERS; k++) others += w.stopped[k];
    switch (next_random(&w.seed) % 8) {
      case 0: replace(&w, i); break;
      case 1:
      case 2:
        if (others < 2) stop(&w, i);
        break;
      case 3:
      case 4: go_on(&w, i); break;
      case 5: set_limit(&w, (int)(next_random(&w.seed) % TOTALS)); break;
      default: command(&w);
    }
    look(&w);
    sleep_ms(next_random(&w.seed) % 12);
  }

  for (int i = 0; i < STORM_PEERS; i++) go_on(&w, i);
  atomic_store(&w.s->ends, 1);
  for (int i = 0; i < STORM_PEERS; i++) {
    char line[600];
    peer_reply(w.p[i], line, sizeof(line));
    CHECK_TEXT(line, "ok");
  }
  look(&w);
  for (int t = 0; t < TOTALS; t++) CHECK_EQ(atomic_load(&w.s->total[t]), 0);
  printf("%u steps, %u of them refused; totals looked at %u times; the longest call %u ms\n",
         atomic_load(&w.s->steps), atomic_load(&w.s->refused), atomic_load(&w.s->checked),
         atomic_load(&w.s->slow_ms));
  /* A claim waits about one second at most, and so does a call for room; a call may meet several of them, on
     few and busy processors. A neighbour that is stopped must not add to that. */
  CHECK_LE(atomic_load(&w.s->slow_ms), BOUND_MS);
  CHECK_LE(20, atomic_load(&w.s->steps));
  CHECK_LE(5, atomic_load(&w.s->checked)); /* else nothing was shown */
  for (int i = 0; i < STORM_PEERS; i++) peer_stop(&w.p[i]);
  CHECK_EQ(live_slots(w.ledger), 0);

  /* Nothing was lost: one process can have all of it now, and every slot. */
  CHECK_OK(kvcached_ledger_set_limit(w.l, NULL, CARD * w.page, 0, NULL));
  kvcached_ctx_t ctx = open_in(w.ledger, "even", LIMIT * w.page);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, CARD * w.page);
  CHECK_OK(kvcached_ensure(r, 0, LIMIT * w.page));
  CHECK_IS(kvcached_ensure(r, 0, (LIMIT + 1) * w.page), KVCACHED_E_LIMIT);
  CHECK_EQ(stats_of(ctx).card_charge, LIMIT * w.page);
  int slot, slots = 1;
  while (kvcached_ledger_lease(w.l, "x", "x", 0, 0, UINT64_MAX, &slot) == KVCACHED_OK) slots++;
  CHECK_EQ(slots, 128);
  kvcached_shutdown(ctx);
  kvcached_ledger_close(w.l);
  munmap(w.s, sizeof(storm));
}

TEST(storm, eight_processes) {
  uint32_t seed = first_seed(1);
  for (unsigned i = 0; i < rounds(2); i++) {
    test_note("KVCACHED_TEST_SEED=%u", seed + i);
    storm_of(seed + i, 1000);
  }
}

/* On a card that is really full, too: there the driver refuses what the ledger would have allowed. */
TEST_CUDA(storm, memory_is_back) {
  uint64_t before, after, total;
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  CHECK_OK(kvcached_device_memory(ctx, &before, &total));
  storm_of(first_seed(77), 500);
  CHECK_OK(kvcached_device_memory(ctx, &after, &total));
  /* Killed processes' memory is the driver's to take back: give it a moment. */
  for (int i = 0; i < 200 && after + 64 * MIB < before; i++) {
    sleep_ms(20);
    CHECK_OK(kvcached_device_memory(ctx, &after, &total));
  }
  CHECK_LE(before, after + 64 * MIB);
  kvcached_shutdown(ctx);
}
