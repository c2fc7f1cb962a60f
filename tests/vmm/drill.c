/*
 * The drill of the tests of faults: an operation is begun anew for every call of the backend that it makes,
 * and that call fails. After each failure what the library counts, what the system and the ledger see and
 * what the pages hold must be as before, and the same call must work right after.
 */
#include "drill.h"

#include "context.h"
#include "fault.h"

enum { RUNS_OUT = 200 };

/* What is ensured of its regions; those of WEIGHTS are large pages. */
const char drill_layout[KV_PAGES + 1] = "ee..ii.e.iie....";
static const char layout_weights[UNITS + 1] = "ee.";

/* ---- the scene ---- */

static void tag_all(scene *s) {
  for (size_t i = 0; i < KV_PAGES; i++)
    if (drill_layout[i] == 'e') put_ends(s->kv, i, s->kv_tag[i] = 10 + (int)i);
  for (size_t i = 0; i < UNITS; i++)
    if (layout_weights[i] == 'e') put_ends(s->weights, i, s->weights_tag[i] = 60 + (int)i);
  put_ends(s->scratch, 0, s->scratch_tag = 90);
}

static scene set_up(const operation *op) {
  static unsigned n;
  static const char *ledger;
  if (!ledger) ledger = scratch("ledger");
  kvcached_options_t o;
  test_options(&o);
  o.large_page = 2 * test_page();
  o.pool_limit = 3 * test_page();
  o.lookahead = op->lookahead;
  o.host_limit = op->host_limit ? op->host_limit * test_page() : UINT64_MAX;
  o.ledger_path = ledger;
  o.group = "faults";
  o.room_wait_ms = 100;
  o.event = op->event;
  o.flags = n++ % 2 ? KVCACHED_NO_CONTROL : 0; /* with a second thread, and without */
  scene s = {.page = test_page(), .large = 2 * test_page(), .ledger = ledger};
  CHECK_OK(kvcached_open(&o, &s.ctx)); /* not open_with: what the device holds is looked at another way */
  s.kv = reserve(s.ctx, KVCACHED_KV, KV_PAGES * s.page);
  s.weights = reserve(s.ctx, KVCACHED_WEIGHTS, UNITS * s.large);
  s.scratch = reserve(s.ctx, KVCACHED_SCRATCH, s.large);
  for (size_t i = 0; i < KV_PAGES; i++) s.kv_tag[i] = -1;
  for (size_t i = 0; i < UNITS; i++) s.weights_tag[i] = -1;
  for (size_t i = 0; i < KV_PAGES; i++)
    if (drill_layout[i] != '.') CHECK_OK(kvcached_ensure(s.kv, i * s.page, s.page));
  CHECK_OK(kvcached_ensure(s.weights, 0, 2 * s.large));
  CHECK_OK(kvcached_ensure(s.scratch, 0, s.large));
  tag_all(&s);
  for (size_t i = 0; i < KV_PAGES; i++)
    if (drill_layout[i] == 'i') CHECK_OK(kvcached_release(s.kv, i * s.page, s.page));
  return s;
}

/* ---- what is looked at ---- */

typedef struct snapshot {
  char kv[KV_PAGES + 1], weights[UNITS + 1], scratch;
  uint64_t mapped, pooled, asleep, reserved, host, ensures, releases, sleeps;
} snapshot;

static char letter(kvcached_region_t r, size_t i) {
  uint8_t state = r->pages.state[i];
  return state == KVC_ENSURED ? 'e' : state == KVC_ASLEEP ? 's' : '-';
}

static snapshot look(const scene *s) {
  check_context(s->ctx);
  kvcached_stats_t t = stats_of(s->ctx);
  snapshot shot;
  memset(&shot, 0, sizeof(shot));
  for (size_t i = 0; i < KV_PAGES && s->kv; i++) shot.kv[i] = letter(s->kv, i);
  for (size_t i = 0; i < UNITS; i++) shot.weights[i] = letter(s->weights, i);
  shot.scratch = letter(s->scratch, 0);
  shot.mapped = t.mapped;
  shot.pooled = t.pooled;
  shot.asleep = t.asleep;
  shot.reserved = t.reserved;
  shot.host = t.host_bytes;
  shot.ensures = t.ensures;
  shot.releases = t.releases;
  shot.sleeps = t.sleeps;
  return shot;
}

/* What the backend holds for this one context, by the calls that were made, against what it counts. */
static void check_held(const scene *s) {
  fault_held h = fault_now();
  kvcached_stats_t t = stats_of(s->ctx);
  CHECK_EQ(h.mapped, t.mapped);
  CHECK_EQ(h.reserved, t.reserved);
  CHECK_EQ(h.host_bytes, t.host_bytes);
  if (!on_host()) CHECK_EQ(h.handle_bytes, t.mapped + t.pooled);
}

/* Pages that hold something known hold it still, whatever slept in between. */
static void check_content(scene *s, int scratch_too) {
  CHECK_OK(kvcached_enter(s->ctx));
  for (size_t i = 0; i < KV_PAGES && s->kv; i++)
    if (s->kv_tag[i] >= 0) CHECK(holds_ends(s->kv, i, s->kv_tag[i]));
  for (size_t i = 0; i < UNITS; i++)
    if (s->weights_tag[i] >= 0) CHECK(holds_ends(s->weights, i, s->weights_tag[i]));
  if (scratch_too && s->scratch_tag >= 0) CHECK(holds_ends(s->scratch, 0, s->scratch_tag));
  CHECK_OK(kvcached_leave(s->ctx));
}

static void check_same(const operation *op, const snapshot *a, const snapshot *b, int err) {
  CHECK_EQ(b->reserved, a->reserved);
  CHECK_EQ(b->releases, a->releases);
  CHECK_EQ(b->sleeps, a->sleeps);
  if (op->leaves == SOME_REGIONS) {
    CHECK(strchr(b->kv, 's') == NULL || strchr(b->kv, 'e') == NULL);
    CHECK(strchr(b->weights, 's') == NULL || strchr(b->weights, 'e') == NULL);
    CHECK_EQ(b->asleep + b->mapped, a->asleep + a->mapped);
    return;
  }
  CHECK_TEXT(b->kv, a->kv);
  CHECK_TEXT(b->weights, a->weights);
  CHECK_EQ(b->scratch, a->scratch);
  CHECK_EQ(b->asleep, a->asleep);
  CHECK_EQ(b->ensures, a->ensures);
  CHECK_LE(b->host, a->host);
  if (op->leaves != LESS_HOST) CHECK_EQ(b->host, a->host);
  /* Where memory was short, idle memory may have been given back for it. */
  CHECK_LE(b->mapped + b->pooled, a->mapped + a->pooled);
  if (op->leaves != LESS_IDLE && err != KVCACHED_E_NOMEM)
    CHECK_EQ(b->mapped + b->pooled, a->mapped + a->pooled);
}

static void end_scene(scene *s) {
  kvcached_shutdown(s->ctx);
  fault_held h = fault_now();
  CHECK_EQ(h.spaces + h.mapped + h.host_bytes, 0);
  if (!on_host()) CHECK_EQ(h.handles, 0);
  CHECK_EQ(live_slots(s->ledger), 0);
}

/* ---- the drill ---- */

/* One failure at the nth call of a kind; 0: the operation makes fewer. */
static int fail_once(const operation *op, fault_kind kind, unsigned nth, int err) {
  scene s = set_up(op);
  if (op->set) op->set(&s);
  snapshot before = look(&s);
  unsigned failures = fault_failures(kind);
  fault_set(kind, nth, err);
  int got = op->run(&s);
  int hit = fault_failures(kind) != failures;
  snapshot after = look(&s); /* waits for the helper, too */
  hit |= fault_failures(kind) != failures;
  fault_clear();
  check_held(&s);
  if (got) {
    CHECK(hit);
    /* A reload function's failure, or a limit that holds after all, is told as such. */
    if (got == err) CHECK_DETAIL("injected");
    CHECK(got == err || got == KVCACHED_E_RELOAD || (got == KVCACHED_E_LIMIT && op->leaves == LESS_IDLE) ||
          op->vague);
    check_same(op, &before, &after, err);
    if (before.asleep == 0) check_content(&s, 1);
  }
  if (hit) {
    if (got || op->silent) CHECK_OK(op->run(&s)); /* the next call works */
    check_context(s.ctx);
    check_held(&s);
  }
  check_content(&s, before.sleeps == 0 && stats_of(s.ctx).sleeps == 0);
  /* What had to stay goes in the end. */
  CHECK_OK(kvcached_trim(s.ctx, 0, NULL));
  kvcached_stats_t t = stats_of(s.ctx);
  CHECK_EQ(t.idle + t.pooled, 0);
  check_context(s.ctx);
  end_scene(&s);
  return hit;
}

/* Every nth call of any kind fails, again and again: whatever comes of it, nothing is lost. */
static void fail_often(const operation *op, unsigned nth, int err) {
  scene s = set_up(op);
  if (op->set) op->set(&s);
  for (int i = 0; i < 3; i++) {
    fault_every(FAULT_ANY, nth, err);
    int got = op->run(&s);
    fault_clear();
    check_context(s.ctx);
    check_held(&s);
    if (got == KVCACHED_OK && !op->silent) break;
  }
  CHECK_OK(op->run(&s));
  check_context(s.ctx);
  check_content(&s, 0);
  end_scene(&s);
}

void drill(const operation *op) {
  unsigned places = 0;
  static const int errors[] = {KVCACHED_E_DEVICE, KVCACHED_E_NOMEM};
  for (int kind = FAULT_RESERVE; kind < FAULT_KINDS; kind++) {
    for (int e = 0; e < 2; e++) {
      unsigned n = 1;
      while (n < RUNS_OUT && fail_once(op, (fault_kind)kind, n, errors[e])) n++;
      CHECK_LE(n, RUNS_OUT - 1);
      places += n - 1;
    }
  }
  if (places == 0) check_failed(__FILE__, __LINE__, "%s: no place where anything could fail", op->name);
  for (unsigned nth = 1; nth < 6; nth++)
    for (int e = 0; e < 2; e++) fail_often(op, nth, errors[e]);
}
