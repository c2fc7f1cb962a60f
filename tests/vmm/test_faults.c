/* Every call of the backend fails once, at every place it can: what the library counts, what the system sees
   and what the ledger says must be as before, and the same call must work right after. */
#include "fault.h"
#include "support.h"

#include <string.h>

enum { PAGES = 24 };
static const size_t page = 4096;

typedef struct scene {
  kvcached_ctx_t ctx;
  kvcached_region_t r;
  const char *ledger;
} scene;

/* A region with every kind of run: e = ensured (content 'e'), i = idle, . = unmapped */
static const char layout[PAGES + 1] = "eee..ii..e..iii.ee......";

static scene set_up(const char *ledger, uint64_t limit) {
  scene s = {open_in(ledger, "faults", limit), NULL, ledger};
  CHECK_OK(kvcached_reserve(s.ctx, PAGES * page, &s.r));
  for (size_t i = 0; i < PAGES; i++)
    if (layout[i] != '.') {
      CHECK_OK(kvcached_ensure(s.r, i * page, page));
      memset((char *)kvcached_region_base(s.r) + i * page, layout[i], page);
    }
  for (size_t i = 0; i < PAGES; i++)
    if (layout[i] == 'i') CHECK_OK(kvcached_release(s.r, i * page, page));
  return s;
}

typedef struct snapshot {
  uint64_t mapped, idle, charge, claim;
  char states[PAGES + 1]; /* e, or - */
} snapshot;

static snapshot take(scene s) {
  kvcached_stats_t t = stats_of(s.ctx);
  snapshot shot;
  memset(&shot, 0, sizeof(shot)); /* compared as bytes, the padding too */
  shot.mapped = t.mapped;
  shot.idle = t.idle;
  shot.charge = t.group_charge;
  kvcached_ledger_t l;
  kvcached_slot_t slot = {.struct_size = sizeof(slot)};
  size_t n;
  CHECK_OK(kvcached_ledger_open(s.ledger, &l));
  CHECK_OK(kvcached_ledger_slots(l, &slot, 1, &n));
  CHECK_EQ(n, 1);
  shot.claim = slot.claim;
  kvcached_ledger_close(l);
  for (size_t i = 0; i < PAGES; i++) {
    size_t run;
    int ensured;
    CHECK_OK(kvcached_mapped_run(s.r, i * page, page, &run, &ensured));
    shot.states[i] = ensured ? 'e' : '-';
  }
  check_region(s.r); /* counts against smaps */
  CHECK_EQ(shot.claim, shot.mapped);
  CHECK_EQ(shot.charge, shot.mapped);
  return shot;
}

static void check_ensured_content(scene s) {
  for (size_t i = 0; i < PAGES; i++)
    if (layout[i] == 'e') CHECK(all_bytes((char *)kvcached_region_base(s.r) + i * page, page, 'e'));
}

/* ensure over the whole layout: each map and each zero in it fails in turn. */
static void fail_each(fault_kind kind, int err, unsigned expected_calls) {
  const char *ledger = scratch(kind == FAULT_MAP ? "map" : "zero");
  unsigned n = 1;
  for (;; n++) {
    scene s = set_up(ledger, UINT64_MAX);
    snapshot before = take(s);
    unsigned calls = fault_calls(kind);
    fault_set(kind, n, err);
    int got = kvcached_ensure(s.r, page, (PAGES - 2) * page);
    fault_clear();
    if (got == KVCACHED_OK) { /* fewer calls than n: all places have been tried */
      CHECK_EQ(fault_calls(kind) - calls, expected_calls);
      kvcached_shutdown(s.ctx);
      break;
    }
    CHECK_IS(got, err);
    CHECK_DETAIL("injected");
    snapshot after = take(s);
    CHECK(memcmp(&before, &after, sizeof(before)) == 0);
    check_ensured_content(s);

    CHECK_OK(kvcached_ensure(s.r, page, (PAGES - 2) * page));
    snapshot now = take(s);
    CHECK_EQ(now.mapped, (PAGES - 1) * page);
    CHECK_EQ(now.idle, 0);
    check_ensured_content(s);
    for (size_t i = 1; i < PAGES - 1; i++)
      if (layout[i] != 'e') CHECK(all_bytes((char *)kvcached_region_base(s.r) + i * page, page, 0));
    kvcached_shutdown(s.ctx);
    CHECK_EQ(live_slots(s.ledger), 0);
  }
  CHECK_EQ(n, expected_calls + 1);
}

static void test_map_fails(void) { fail_each(FAULT_MAP, KVCACHED_E_SYSTEM, 5); }
static void test_zero_fails(void) { fail_each(FAULT_ZERO, KVCACHED_E_SYSTEM, 2); }

/* Out of memory: idle pages elsewhere are given back, and the second try may succeed. */
static void test_out_of_memory_gives_idle_back(void) {
  scene s = set_up(scratch("nomem"), UINT64_MAX);
  fault_set(FAULT_MAP, 1, KVCACHED_E_NOMEM);
  CHECK_OK(kvcached_ensure(s.r, 0, 5 * page)); /* the idle ones lie behind */
  snapshot now = take(s);
  CHECK_EQ(now.mapped, (5 + 3) * page);
  CHECK_EQ(now.idle, 0);
  check_ensured_content(s);

  fault_set(FAULT_MAP, 1, KVCACHED_E_NOMEM); /* nothing idle now: the failure stands */
  CHECK_IS(kvcached_ensure(s.r, 0, PAGES * page), KVCACHED_E_NOMEM);
  snapshot after = take(s);
  CHECK(memcmp(&now, &after, sizeof(now)) == 0);
  CHECK_OK(kvcached_ensure(s.r, 0, PAGES * page));
  kvcached_shutdown(s.ctx);
}

/* The way back fails too: pages that cannot be unmapped stay counted and claimed. */
static void test_undo_fails(void) {
  scene s = set_up(scratch("undo"), UINT64_MAX);
  snapshot before = take(s);
  fault_set(FAULT_MAP, 3, KVCACHED_E_SYSTEM);
  fault_set(FAULT_UNMAP, 1, KVCACHED_E_SYSTEM);
  CHECK_IS(kvcached_ensure(s.r, 0, PAGES * page), KVCACHED_E_SYSTEM);
  fault_clear();
  snapshot after = take(s);
  CHECK(memcmp(before.states, after.states, PAGES) == 0);
  CHECK_EQ(after.mapped, before.mapped + 2 * page); /* the first new run has two pages */
  CHECK_EQ(after.idle, before.idle + 2 * page);
  CHECK_OK(kvcached_ensure(s.r, 0, PAGES * page));
  CHECK(all_bytes((char *)kvcached_region_base(s.r) + 3 * page, 6 * page, 0));
  check_ensured_content(s);
  kvcached_shutdown(s.ctx);
}

static void test_trim_fails(void) {
  scene s = set_up(scratch("trim"), UINT64_MAX);
  snapshot before = take(s);
  size_t freed = 1;
  fault_set(FAULT_UNMAP, 1, KVCACHED_E_NOMEM);
  CHECK_IS(kvcached_trim(s.ctx, 0, &freed), KVCACHED_E_NOMEM);
  CHECK_EQ(freed, 0);
  snapshot after = take(s);
  CHECK(memcmp(&before, &after, sizeof(before)) == 0);
  fault_set(FAULT_UNMAP, 2, KVCACHED_E_NOMEM); /* the first run goes: it is said and no longer counted */
  CHECK_IS(kvcached_trim(s.ctx, 0, &freed), KVCACHED_E_NOMEM);
  CHECK_EQ(freed, 3 * page);
  after = take(s);
  CHECK_EQ(after.mapped, before.mapped - 3 * page);
  CHECK_OK(kvcached_trim(s.ctx, 0, &freed));
  CHECK_EQ(freed, 2 * page);
  CHECK_EQ(take(s).idle, 0);
  check_ensured_content(s);
  kvcached_shutdown(s.ctx);
}

/* At the limit idle pages give way; when they cannot be unmapped, or the new ones cannot be mapped. */
static void test_pressure_fails(void) {
  scene s = set_up(scratch("pressure"), 11 * page);
  snapshot before = take(s);
  CHECK_EQ(before.mapped, 11 * page);
  fault_set(FAULT_UNMAP, 1, KVCACHED_E_SYSTEM);
  CHECK_IS(kvcached_ensure(s.r, 18 * page, 4 * page), KVCACHED_E_SYSTEM);
  snapshot after = take(s);
  CHECK(memcmp(&before, &after, sizeof(before)) == 0);

  fault_set(FAULT_UNMAP, 2, KVCACHED_E_SYSTEM); /* one run has gone by then */
  CHECK_IS(kvcached_ensure(s.r, 18 * page, 4 * page), KVCACHED_E_SYSTEM);
  after = take(s);
  CHECK(memcmp(before.states, after.states, PAGES) == 0);
  CHECK_EQ(after.mapped, 8 * page);

  fault_set(FAULT_MAP, 1, KVCACHED_E_SYSTEM);
  CHECK_IS(kvcached_ensure(s.r, 18 * page, 4 * page), KVCACHED_E_SYSTEM);
  after = take(s);
  CHECK(memcmp(before.states, after.states, PAGES) == 0);
  CHECK_EQ(after.mapped, 7 * page);
  CHECK_EQ(after.idle, page);
  CHECK_OK(kvcached_ensure(s.r, 18 * page, 5 * page));
  CHECK_EQ(take(s).mapped, 11 * page);
  CHECK_IS(kvcached_ensure(s.r, 3 * page, 1), KVCACHED_E_LIMIT);
  check_ensured_content(s);
  kvcached_shutdown(s.ctx);
}

static void test_reserve_fails(void) {
  scene s = set_up(scratch("reserve"), UINT64_MAX);
  snapshot before = take(s);
  kvcached_region_t r = (kvcached_region_t)1;
  fault_set(FAULT_RESERVE, 1, KVCACHED_E_NOMEM);
  CHECK_IS(kvcached_reserve(s.ctx, 10 * page, &r), KVCACHED_E_NOMEM);
  CHECK(r == NULL);
  CHECK_EQ(stats_of(s.ctx).reserved, PAGES * page);
  snapshot after = take(s);
  CHECK(memcmp(&before, &after, sizeof(before)) == 0);
  CHECK_OK(kvcached_reserve(s.ctx, 10 * page, &r));
  kvcached_shutdown(s.ctx);
}

int main(void) {
  RUN(test_map_fails);
  RUN(test_zero_fails);
  RUN(test_out_of_memory_gives_idle_back);
  RUN(test_undo_fails);
  RUN(test_trim_fails);
  RUN(test_pressure_fails);
  RUN(test_reserve_fails);
  return 0;
}
