/* What a process holds outside the library: said at any time, and charged beside its pages. */
#include "ledger_kit.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

/* A child's context in a leased slot. */
static kvcached_ctx_t open_child(const char *path, int slot, uint64_t limit) {
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = path;
  o.slot = slot;
  o.limit = limit;
  o.fixed = 12345; /* the lease says it */
  return open_with(&o);
}

TEST(fixed, of_a_leased_child) {
  const size_t page = test_page();
  const char *path = scratch("leased");
  kvcached_ledger_t l = open_ledger(path);
  int slot;
  CHECK_OK(kvcached_ledger_lease(l, "g", "m", 10 * page, 3 * page, 20 * page, &slot));
  kvcached_ctx_t ctx = open_child(path, slot, 20 * page);
  CHECK_EQ(stats_of(ctx).fixed, 3 * page);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 64 * page);
  CHECK_OK(kvcached_ensure(r, 0, 4 * page));

  CHECK_OK(kvcached_set_fixed(ctx, 5 * page)); /* the lease covers it */
  kvcached_slot_t s = slot_in(path, slot);
  CHECK(s.fixed == 5 * page && s.claim == 4 * page && s.charge == 10 * page && s.lease == 10 * page);
  CHECK_OK(kvcached_set_fixed(ctx, 15 * page + 1)); /* and what goes beyond is charged on top */
  s = slot_in(path, slot);
  CHECK(s.fixed == 15 * page + 1 && s.charge == 19 * page + 1);
  CHECK_EQ(stats_of(ctx).fixed, 15 * page + 1);
  CHECK_EQ(stats_of(ctx).group_charge, 19 * page + 1);
  CHECK_EQ(region_stats_of(r).fixed, 15 * page + 1);
  CHECK_IS(kvcached_ensure(r, 0, 5 * page), KVCACHED_E_LIMIT);
  CHECK_EQ(kvcached_available(ctx), page - 1);

  /* Less never fails, and is room at once. */
  CHECK_OK(kvcached_set_fixed(ctx, page));
  s = slot_in(path, slot);
  CHECK(s.fixed == page && s.charge == 10 * page);
  CHECK_OK(kvcached_ensure(r, 0, 19 * page));
  CHECK_EQ(stats_of(ctx).group_charge, 20 * page);
  CHECK_OK(kvcached_set_fixed(ctx, 0));
  CHECK_EQ(slot_in(path, slot).charge, 19 * page);
  kvcached_shutdown(ctx);
  kvcached_ledger_close(l);
}

TEST(fixed, too_much_changes_nothing) {
  const size_t page = test_page();
  const char *path = scratch("too-much");
  kvcached_ctx_t ctx = open_in(path, "g", 20 * page), alone = open_alone(0, 20 * page);
  kvcached_ctx_t both[] = {ctx, alone};
  for (int i = 0; i < 2; i++) {
    kvcached_region_t r = reserve(both[i], KVCACHED_KV, 64 * page);
    CHECK_OK(kvcached_ensure(r, 0, 6 * page));
    CHECK_OK(kvcached_set_fixed(both[i], 14 * page));
    CHECK_IS(kvcached_set_fixed(both[i], 14 * page + 1), KVCACHED_E_LIMIT);
    CHECK_DETAIL("passed by 1");
    CHECK_IS(kvcached_set_fixed(both[i], UINT64_MAX), KVCACHED_E_LIMIT);
    kvcached_stats_t s = stats_of(both[i]);
    CHECK(s.fixed == 14 * page && s.group_charge == 20 * page && s.limit_failures == 2);
    CHECK_OK(kvcached_set_fixed(both[i], 14 * page)); /* no change */
    CHECK_IS(kvcached_ensure(r, 0, 7 * page), KVCACHED_E_LIMIT);
    CHECK_OK(kvcached_set_fixed(both[i], 13 * page));
    CHECK_OK(kvcached_ensure(r, 0, 7 * page));
    check_context(both[i]);
    kvcached_shutdown(both[i]);
  }
}

/* Memory that nobody uses makes room for it, but not where it would not be enough. */
TEST(fixed, idle_memory_gives_way) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_in(scratch("gives-way"), "g", 20 * page);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 64 * page);
  CHECK_OK(kvcached_ensure(r, 0, 12 * page));
  CHECK_OK(kvcached_release(r, 0, 5 * page));
  CHECK_IS(kvcached_set_fixed(ctx, 14 * page), KVCACHED_E_LIMIT); /* 8 are free, 5 idle */
  CHECK_EQ(stats_of(ctx).idle, 5 * page);
  CHECK_OK(kvcached_set_fixed(ctx, 10 * page));
  CHECK_EQ(stats_of(ctx).idle, 3 * page);
  CHECK_EQ(stats_of(ctx).group_charge, 20 * page);
  check_context(ctx);
  kvcached_shutdown(ctx);
}

/* On a short card others are asked, as for pages. */
TEST(fixed, others_make_room) {
  const size_t page = test_page();
  const char *path = scratch("others");
  kvcached_ledger_t l = open_ledger(path);
  CHECK_OK(kvcached_ledger_set_limit(l, NULL, 20 * page, 0, NULL));
  kvcached_ctx_t ctx = open_in(path, "mine", UINT64_MAX);
  peer p = peer_start(path, "theirs", UINT64_MAX, -1);
  peer_expect_open(p);
  peer_expect(p, "fill 16 7", "ok");
  peer_expect(p, "release 10", "ok");
  CHECK_OK(kvcached_set_fixed(ctx, 12 * page));
  CHECK_LE(stats_of(ctx).card_charge, 20 * page);
  CHECK_EQ(slot_in(path, slot_of_ctx(ctx)).charge, 12 * page);
  /* Nobody is left to ask once it sleeps too. */
  CHECK_OK(kvcached_set_fixed(ctx, 20 * page));
  CHECK_IS(kvcached_set_fixed(ctx, 20 * page + 1), KVCACHED_E_LIMIT);
  CHECK_OK(kvcached_set_fixed(ctx, 0));
  peer_stop(&p);
  kvcached_shutdown(ctx);
  kvcached_ledger_close(l);
}

typedef struct killed {
  const char *path;
  int slot;
  size_t page;
  int ready; /* written to when it has said what it holds */
} killed;

static void hold_much(void *arg) {
  const killed *k = arg;
  kvcached_ctx_t ctx = open_child(k->path, k->slot, UINT64_MAX);
  CHECK_OK(kvcached_set_fixed(ctx, 50 * k->page));
  CHECK_EQ(write(k->ready, "!", 1), 1);
  for (;;) (void)pause();
}

/* What a dead child held is free; its lease is as it was, and the next child begins with no more than that.
 */
TEST_HOST(fixed, ends_with_its_process) {
  const size_t page = test_page();
  const char *path = scratch("killed");
  kvcached_ledger_t l = open_ledger(path);
  int slot, ends[2];
  char byte;
  CHECK_OK(kvcached_ledger_lease(l, "g", "m", 10 * page, page, UINT64_MAX, &slot));
  CHECK_EQ(pipe(ends), 0);
  killed k = {path, slot, page, ends[1]};
  pid_t pid = child_start(hold_much, &k);
  CHECK_EQ(read(ends[0], &byte, 1), 1);
  CHECK_EQ(slot_in(path, slot).charge, 50 * page);
  child_kill(pid);
  kvcached_slot_t s = slot_in(path, slot);
  CHECK(s.leased && !s.attached && s.charge == 10 * page && s.fixed <= 10 * page);
  kvcached_ctx_t ctx = open_child(path, slot, UINT64_MAX);
  CHECK_EQ(slot_in(path, slot).charge, 10 * page);
  CHECK_EQ(stats_of(ctx).fixed, slot_in(path, slot).fixed);
  CHECK_OK(kvcached_set_fixed(ctx, 2 * page));
  CHECK_EQ(slot_in(path, slot).fixed, 2 * page);
  kvcached_shutdown(ctx);
  kvcached_ledger_close(l);
  (void)close(ends[0]);
  (void)close(ends[1]);
}

/* ---- beside other calls ---- */

#define WRITERS 4

typedef struct writer {
  kvcached_ctx_t ctx;
  kvcached_region_t r;
  size_t page;
  unsigned nr;
} writer;

static void *set_and_use(void *arg) {
  const writer *w = arg;
  uint32_t seed = w->nr + 1;
  for (unsigned i = 0; i < 300; i++) {
    int err = kvcached_set_fixed(w->ctx, next_random(&seed) % 24 * w->page);
    if (err) CHECK_IS(err, KVCACHED_E_LIMIT);
    size_t at = (w->nr * 8 + next_random(&seed) % 8) * w->page;
    err = kvcached_ensure(w->r, at, w->page);
    if (err) CHECK_IS(err, KVCACHED_E_LIMIT);
    CHECK_OK(kvcached_release(w->r, at, w->page));
    CHECK_LE(stats_of(w->ctx).group_charge, 24 * w->page);
  }
  return NULL;
}

TEST(fixed, from_many_threads) {
  const size_t page = test_page();
  const char *path = scratch("threads");
  kvcached_ctx_t ctx = open_in(path, "g", 24 * page);
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, WRITERS * 8 * page);
  pthread_t thread[WRITERS];
  writer w[WRITERS];
  for (unsigned i = 0; i < WRITERS; i++) {
    w[i] = (writer){ctx, r, page, i};
    CHECK_EQ(pthread_create(&thread[i], NULL, set_and_use, &w[i]), 0);
  }
  for (unsigned i = 0; i < WRITERS; i++) CHECK_EQ(pthread_join(thread[i], NULL), 0);
  CHECK_EQ(stats_of(ctx).fixed, slot_in(path, slot_of_ctx(ctx)).fixed);
  CHECK_OK(kvcached_set_fixed(ctx, 0));
  check_context(ctx);
  kvcached_shutdown(ctx);
}
