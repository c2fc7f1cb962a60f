/* Leases, slots and charges, as one process sees them (two handles of one process exclude each other as two
 * processes do). */
#include "ledger_file.h"
#include "support.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static const size_t page = 4096;

static kvcached_ledger_t open_ledger(const char *path) {
  kvcached_ledger_t l;
  CHECK_OK(kvcached_ledger_open(path, &l));
  return l;
}

static kvcached_slot_t slot_of(kvcached_ledger_t l, int slot) {
  kvcached_slot_t all[KVC_LEDGER_SLOTS];
  size_t n;
  all[0].struct_size = sizeof(all[0]);
  CHECK_OK(kvcached_ledger_slots(l, all, KVC_LEDGER_SLOTS, &n));
  for (size_t i = 0; i < n; i++)
    if (all[i].slot == slot) return all[i];
  fprintf(stderr, "slot %d is not live\n", slot);
  exit(1);
}

static int attach(const char *path, int slot, const char *group, uint64_t limit, kvcached_ctx_t *ctx) {
  kvcached_options_t o;
  kvcached_options_init(&o);
  o.ledger_path = path;
  o.slot = slot;
  o.group = group;
  o.limit = limit;
  o.name = "child";
  return kvcached_open(&o, ctx);
}

static void test_lease_and_child(void) {
  const char *path = scratch("lease");
  kvcached_ledger_t parent = open_ledger(path), other = open_ledger(path);
  int a, b;
  CHECK_OK(kvcached_ledger_lease(parent, "ollama", "model-a", 60 * page, 10 * page, 100 * page, &a));
  kvcached_slot_t s = slot_of(other, a);
  CHECK(s.leased && !s.attached && s.pid == getpid());
  CHECK(strcmp(s.group, "ollama") == 0 && strcmp(s.name, "model-a") == 0);
  CHECK(s.lease == 60 * page && s.fixed == 10 * page && s.claim == 0 && s.charge == 60 * page);

  CHECK_IS(kvcached_ledger_lease(other, "ollama", "model-b", 41 * page, 0, 100 * page, &b), KVCACHED_E_LIMIT);
  CHECK_EQ(b, -1);
  CHECK_DETAIL("group \"ollama\"");
  CHECK_DETAIL("409600"); /* the limit */
  CHECK_EQ(live_slots(path), 1);
  CHECK_OK(kvcached_ledger_lease(other, "another", "model-b", 100 * page, 0, 100 * page,
                                 &b)); /* groups do not meet */
  CHECK(a != b);
  CHECK_IS(kvcached_ledger_unlease(parent, b), KVCACHED_E_SLOT); /* not its own */
  CHECK_OK(kvcached_ledger_unlease(other, b));
  CHECK_EQ(live_slots(path), 1);

  kvcached_ctx_t ctx = NULL, second = NULL;
  CHECK_IS(attach(path, b, NULL, UINT64_MAX, &ctx), KVCACHED_E_SLOT);
  CHECK_DETAIL("not leased");
  CHECK_IS(attach(path, KVC_LEDGER_SLOTS, NULL, UINT64_MAX, &ctx), KVCACHED_E_SLOT);
  CHECK_IS(attach(path, a, "another", UINT64_MAX, &ctx), KVCACHED_E_SLOT);
  CHECK_DETAIL("leased for group \"ollama\"");
  CHECK_OK(attach(path, a, "ollama", 100 * page, &ctx));
  CHECK_IS(attach(path, a, "ollama", 100 * page, &second), KVCACHED_E_SLOT);
  CHECK_DETAIL("in use by pid");

  /* The child's first pages consume the lease; what goes beyond it is charged on top. */
  kvcached_region_t r;
  CHECK_OK(kvcached_reserve(ctx, 200 * page, &r));
  CHECK_OK(kvcached_ensure(r, 0, 50 * page));
  s = slot_of(parent, a);
  CHECK(s.leased && s.attached && s.claim == 50 * page && s.charge == 60 * page && s.reserved == 200 * page);
  CHECK(strcmp(s.name, "model-a") == 0);
  CHECK_OK(kvcached_ledger_lease(other, "ollama", "b", 30 * page, 0, 100 * page, &b));
  CHECK_OK(kvcached_ensure(r, 0, 60 * page));
  CHECK_EQ(slot_of(parent, a).charge, 70 * page);
  CHECK_EQ(stats_of(ctx).group_charge, 100 * page);
  CHECK_IS(kvcached_ensure(r, 0, 61 * page), KVCACHED_E_LIMIT);
  CHECK_EQ(slot_of(parent, a).claim, 60 * page);
  CHECK_OK(kvcached_ledger_unlease(other, b));
  CHECK_OK(kvcached_ensure(r, 0, 61 * page));

  /* A lease outlives its child, and its parent's handle. */
  kvcached_shutdown(ctx);
  s = slot_of(parent, a);
  CHECK(s.leased && !s.attached && s.claim == 0 && s.charge == 60 * page && s.reserved == 0);
  CHECK_OK(attach(path, a, NULL, 100 * page, &ctx)); /* the next child; the group is the lease's */
  CHECK_EQ(slot_of(parent, a).claim, 0);
  CHECK_OK(kvcached_ledger_unlease(parent, a));
  s = slot_of(parent, a);
  CHECK(!s.leased && s.attached && s.charge == 60 * page);
  CHECK_IS(kvcached_ledger_lease(parent, "ollama", "b", 41 * page, 0, 100 * page, &b), KVCACHED_E_LIMIT);
  kvcached_shutdown(ctx);
  CHECK_EQ(live_slots(path), 0);
  CHECK_OK(kvcached_ledger_lease(parent, "ollama", "b", 100 * page, 0, 100 * page, &b));
  kvcached_ledger_close(parent); /* drops what it leased */
  CHECK_EQ(live_slots(path), 0);
  kvcached_ledger_close(other);
}

/* A limit already passed (others were given more) does not take back what a lease promised. */
static void test_lease_is_kept(void) {
  const char *path = scratch("kept");
  kvcached_ledger_t l = open_ledger(path);
  int a, b;
  kvcached_ctx_t ctx;
  kvcached_region_t r;
  CHECK_OK(kvcached_ledger_lease(l, "g", "a", 10 * page, 0, 10 * page, &a));
  CHECK_OK(kvcached_ledger_lease(l, "g", "b", 50 * page, 0, 100 * page, &b));
  CHECK_OK(attach(path, a, "g", 10 * page, &ctx));
  CHECK_OK(kvcached_reserve(ctx, 100 * page, &r));
  CHECK_OK(kvcached_ensure(r, 0, 10 * page));
  CHECK_IS(kvcached_ensure(r, 0, 11 * page), KVCACHED_E_LIMIT);
  kvcached_shutdown(ctx);
  kvcached_ledger_close(l);
}

/* More above the limit than is asked for: idle pages make up for both. */
static void test_idle_gives_way_to_others(void) {
  const char *path = scratch("gives-way");
  kvcached_ctx_t a = open_in(path, "g", 20 * page), b = open_in(path, "g", 40 * page);
  kvcached_region_t ra, rb;
  CHECK_OK(kvcached_reserve(a, 100 * page, &ra));
  CHECK_OK(kvcached_reserve(b, 100 * page, &rb));
  CHECK_OK(kvcached_ensure(ra, 0, 16 * page));
  CHECK_OK(kvcached_release(ra, 0, 12 * page));
  CHECK_OK(kvcached_ensure(rb, 0, 10 * page)); /* 26 in all: above a's limit, not b's */
  CHECK_OK(kvcached_ensure(ra, 20 * page, 2 * page));
  CHECK_EQ(stats_of(a).group_charge, 20 * page);
  CHECK_EQ(stats_of(a).idle, 4 * page);
  check_region(ra);
  CHECK_IS(kvcached_ensure(ra, 30 * page, 5 * page), KVCACHED_E_LIMIT);
  CHECK_EQ(stats_of(a).idle, 4 * page);
  CHECK_OK(kvcached_ensure(ra, 30 * page, 4 * page));
  kvcached_shutdown(a);
  kvcached_shutdown(b);
}

static void test_slots_without_lease(void) {
  const char *path = scratch("plain");
  kvcached_options_t o;
  kvcached_options_init(&o);
  o.ledger_path = path;
  o.limit = 20 * page;
  o.fixed = 15 * page;
  o.group = "g";
  char long_name[200];
  memset(long_name, 'n', sizeof(long_name));
  long_name[199] = 0;
  o.name = long_name;
  kvcached_ctx_t a, b, c;
  CHECK_OK(kvcached_open(&o, &a));
  CHECK_IS(kvcached_open(&o, &b), KVCACHED_E_LIMIT); /* its fixed part does not fit */
  CHECK_EQ(live_slots(path), 1);
  o.fixed = 5 * page;
  CHECK_OK(kvcached_open(&o, &b));
  kvcached_ledger_t l = open_ledger(path);
  kvcached_slot_t s = slot_of(l, 0);
  CHECK(!s.leased && s.attached && s.fixed == 15 * page && s.charge == 15 * page &&
        strlen(s.name) == KVCACHED_NAME_MAX);
  kvcached_region_t r;
  CHECK_OK(kvcached_reserve(b, 10 * page, &r));
  CHECK_IS(kvcached_ensure(r, 0, 1), KVCACHED_E_LIMIT);
  o.group = NULL; /* a group of its own */
  CHECK_OK(kvcached_open(&o, &c));
  char own[40];
  snprintf(own, sizeof(own), "pid-%ld", (long)getpid());
  CHECK(strcmp(slot_of(l, 2).group, own) == 0);
  kvcached_shutdown(a);
  CHECK_OK(kvcached_ensure(r, 0, 10 * page));
  kvcached_shutdown(b);
  kvcached_shutdown(c);
  o.group = "0123456789012345678901234567890X"; /* 32 bytes */
  CHECK_IS(kvcached_open(&o, &a), KVCACHED_E_INVAL);
  o.group = "";
  CHECK_IS(kvcached_open(&o, &a), KVCACHED_E_INVAL);
  CHECK_EQ(live_slots(path), 0);
  kvcached_ledger_close(l);
}

static void test_bad_lease_arguments(void) {
  const char *path = scratch("arguments");
  kvcached_ledger_t l = open_ledger(path);
  int slot = 5;
  size_t n;
  CHECK_IS(kvcached_ledger_lease(l, NULL, "n", 1, 0, 1, &slot), KVCACHED_E_INVAL);
  CHECK_EQ(slot, -1);
  CHECK_IS(kvcached_ledger_lease(l, "", "n", 1, 0, 1, &slot), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_lease(NULL, "g", "n", 1, 0, 1, &slot), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_unlease(l, -1), KVCACHED_E_SLOT);
  CHECK_IS(kvcached_ledger_unlease(l, 4000), KVCACHED_E_SLOT);
  kvcached_slot_t s = {.struct_size = 3};
  CHECK_IS(kvcached_ledger_slots(l, &s, 1, &n), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_slots(l, NULL, 1, &n), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ledger_lease(l, "g", "n", UINT64_MAX, 1, UINT64_MAX - 1, &slot), KVCACHED_E_LIMIT);
  CHECK_OK(kvcached_ledger_lease(l, "g", NULL, 1, 7, 7, &slot)); /* fixed is the larger */
  CHECK_EQ(slot_of(l, slot).charge, 7);
  kvcached_ledger_close(l);
}

static void test_full(void) {
  const char *path = scratch("full");
  kvcached_ledger_t l = open_ledger(path), other = open_ledger(path);
  int slot, used[KVC_LEDGER_SLOTS] = {0};
  for (int i = 0; i < KVC_LEDGER_SLOTS; i++) {
    CHECK_OK(kvcached_ledger_lease(i % 2 ? l : other, "g", "n", 1, 0, UINT64_MAX, &slot));
    CHECK(!used[slot]++);
  }
  CHECK_IS(kvcached_ledger_lease(l, "g", "n", 1, 0, UINT64_MAX, &slot), KVCACHED_E_FULL);
  CHECK_IS(kvcached_ledger_lease(other, "g", "n", 1, 0, UINT64_MAX, &slot), KVCACHED_E_FULL);
  kvcached_slot_t few[3];
  size_t n;
  few[0].struct_size = sizeof(few[0]);
  CHECK_OK(kvcached_ledger_slots(l, few, 3, &n));
  CHECK_EQ(n, KVC_LEDGER_SLOTS);
  CHECK_EQ(few[2].slot, 2);
  kvcached_ledger_close(other);
  CHECK_OK(kvcached_ledger_lease(l, "g", "n", 1, 0, UINT64_MAX, &slot));
  kvcached_ledger_close(l);
}

/* ---- claims under way elsewhere, played by writing into a live slot's announcement ---- */

static kvc_ledger_map *map_file(const char *path) {
  int fd = open(path, O_RDWR | O_CLOEXEC);
  CHECK(fd >= 0);
  kvc_ledger_map *m = mmap(NULL, sizeof(*m), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  CHECK(m != MAP_FAILED);
  close(fd);
  return m;
}

static double seconds(void) {
  struct timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

typedef struct rival {
  kvc_ledger_slot *its, *mine;
  int older;
  uint64_t mine_seen_withdrawn, mine_seen_standing;
} rival;

/* Watches the claimer for a while, then ends its own announcement. */
static void *play_rival(void *arg) {
  rival *r = arg;
  double until = seconds() + 0.2;
  while (seconds() < until) {
    if (atomic_load(&r->mine->ticket) == 0) continue; /* not begun */
    if (atomic_load(&r->mine->pending))
      r->mine_seen_standing++;
    else
      r->mine_seen_withdrawn++;
  }
  atomic_store(&r->its->pending, 0);
  return NULL;
}

static void claim_against_rival(const char *path, int older, int ends) {
  kvcached_ctx_t rival_ctx = open_in(path, "g", 10 * page), ctx = open_in(path, "g", 10 * page);
  kvc_ledger_map *m = map_file(path);
  kvcached_region_t r;
  CHECK_OK(kvcached_reserve(ctx, 10 * page, &r));
  atomic_store(&m->ticket, 1000);
  atomic_store(&m->slot[0].ticket, older ? 1 : 100000);
  atomic_store(&m->slot[0].pending, 6 * page);
  rival play = {&m->slot[0], &m->slot[1], older, 0, 0};
  pthread_t thread;
  if (ends) CHECK(pthread_create(&thread, NULL, play_rival, &play) == 0);
  double start = seconds();
  int err = kvcached_ensure(r, 0, 6 * page);
  double took = seconds() - start;
  if (ends) {
    CHECK_OK(err);
    pthread_join(thread, NULL);
    /* The younger steps back and leaves the way; the older stays announced throughout. */
    if (older)
      CHECK(play.mine_seen_withdrawn > play.mine_seen_standing);
    else
      CHECK(play.mine_seen_standing > 0 && play.mine_seen_withdrawn < play.mine_seen_standing / 10 + 50);
    CHECK_EQ(stats_of(ctx).group_charge, 6 * page);
  } else {
    CHECK_IS(err, KVCACHED_E_LIMIT); /* a stopped process holds nobody for ever */
    CHECK(took > 0.5 && took < 5);
    CHECK_EQ(atomic_load(&m->slot[1].pending), 0);
    CHECK_OK(kvcached_ensure(r, 0, 4 * page)); /* what fits beside it is not held up */
  }
  kvcached_shutdown(rival_ctx);
  if (!ends)
    CHECK_OK(kvcached_ensure(r, 0, 6 * page)); /* the announcement of a dead process counts no more */
  kvcached_shutdown(ctx);
  munmap(m, sizeof(*m));
}

static void test_older_claim_first(void) { claim_against_rival(scratch("older"), 1, 1); }
static void test_younger_claim_yields(void) { claim_against_rival(scratch("younger"), 0, 1); }
static void test_wait_is_bounded(void) {
  claim_against_rival(scratch("stopped-older"), 1, 0);
  claim_against_rival(scratch("stopped-younger"), 0, 0);
}

/* A taker killed while filling a slot in leaves it marked so: it counts for nothing and can be taken. */
static void test_half_taken_slot(void) {
  const char *path = scratch("half");
  kvcached_ctx_t ctx = open_in(path, "g", 10 * page);
  kvcached_shutdown(ctx);
  kvc_ledger_map *m = map_file(path);
  atomic_fetch_add(&m->slot[0].gen, 1);
  atomic_store(&m->slot[0].claim, 1 << 30);
  CHECK_EQ(live_slots(path), 0);
  ctx = open_in(path, "g", 10 * page);
  CHECK_EQ(live_slots(path), 1);
  CHECK_EQ(atomic_load(&m->slot[0].gen) % 2, 0);
  CHECK_EQ(stats_of(ctx).group_charge, 0);
  kvcached_shutdown(ctx);
  munmap(m, sizeof(*m));
}

int main(void) {
  RUN(test_lease_and_child);
  RUN(test_lease_is_kept);
  RUN(test_idle_gives_way_to_others);
  RUN(test_slots_without_lease);
  RUN(test_bad_lease_arguments);
  RUN(test_full);
  RUN(test_older_claim_first);
  RUN(test_younger_claim_yields);
  RUN(test_wait_is_bounded);
  RUN(test_half_taken_slot);
  return 0;
}
