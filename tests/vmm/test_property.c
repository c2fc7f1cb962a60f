/*
 * Random calls against a model (model.h), which says what every call must return. With faults, calls of the
 * backend fail at random too: then a call has done nothing. Each run has a seed, which a failure tells;
 * KVCACHED_TEST_SEED begins with that one, and KVCACHED_TEST_ROUNDS makes for more of them.
 */
#include "context.h"
#include "fault.h"
#include "model.h"

enum { STEPS = 300 };

/* ---- the calls ---- */

static void make_region(model *m, model_region *q) {
  int kind = (int)pick(m, 3);
  size_t size = (1 + pick(m, MAX_PAGES)) * m->page;
  *q = (model_region){.kind = kind, .r = reserve(m->ctx, kind, size)};
  q->unit = kvcached_region_page_size(q->r);
  q->n = (size + q->unit - 1) / q->unit;
  for (size_t i = 0; i < MAX_PAGES; i++) q->tag[i] = ABSENT;
}

static void allocate(model *m, model_region *q) {
  size_t size = (1 + pick(m, 12)) * m->page - pick(m, 2);
  size_t whole = (size + m->page - 1) / m->page * m->page;
  int ok = fits(m, whole);
  uint64_t before = held(m);
  arm(m);
  void *p = kvcached_alloc(m->ctx, size);
  fault_clear();
  if (!p && m->faults) return;
  if (p && !ok && before > m->limit && held(m) <= before) ok = 1; /* as EXPECT: no more than there was */
  if (!p != !ok)
    check_failed(__FILE__, __LINE__, "alloc of %zu: %p, but it %s", size, p, ok ? "fits" : "does not fit");
  m->refused += !ok;
  if (!p) return;
  *q = (model_region){.kind = KVCACHED_KV, .r = m->ctx->regions, .allocated = p};
  CHECK(kvcached_region_base(q->r) == p);
  q->unit = kvcached_region_page_size(q->r);
  q->n = (whole + q->unit - 1) / q->unit;
  for (size_t i = 0; i < q->n; i++) {
    q->tag[i] = 0;
    CHECK(holds_ends(q->r, i, 0));
    set_tag(q, i, 1 + (int)pick(m, 255));
  }
}

static void end_region(model *m, model_region *q) {
  arm(m);
  if (q->allocated)
    kvcached_free(m->ctx, q->allocated);
  else
    kvcached_unreserve(q->r);
  fault_clear();
  *q = (model_region){.r = NULL};
}

/* A random range of pages; half of the time it begins or ends inside one. */
typedef struct range {
  size_t first, n, off, len;
  size_t whole_first, whole_end; /* pages wholly inside */
} range;

static range some_pages(model *m, const model_region *q) {
  range g = {.first = pick(m, (uint32_t)q->n)};
  g.n = 1 + pick(m, (uint32_t)(q->n - g.first));
  g.off = g.first * q->unit;
  size_t end = (g.first + g.n) * q->unit, size = kvcached_region_size(q->r);
  if (end > size) end = size;
  g.whole_first = g.first;
  g.whole_end = g.first + g.n;
  if (pick(m, 2) == 0) {
    g.off++;
    g.whole_first++;
  }
  if (pick(m, 2) == 0) {
    end--;
    g.whole_end--;
  }
  g.len = end - g.off;
  return g;
}

static uint64_t missing(const model_region *q, range g) {
  uint64_t sum = 0;
  for (size_t i = g.first; i < g.first + g.n; i++)
    if (q->tag[i] < 0) sum += page_bytes(q, i);
  return sum;
}

static void ensure(model *m, model_region *q) {
  range g = some_pages(m, q);
  int ok = wakes(m, 0, q) && fits(m, missing(q, g));
  EXPECT(m, kvcached_ensure(q->r, g.off, g.len), ok);
  for (size_t i = g.first; i < g.first + g.n && ok; i++) {
    if (q->tag[i] >= 0) continue;
    CHECK(holds_ends(q->r, i, 0));
    set_tag(q, i, 1 + (int)pick(m, 255));
  }
}

static void ensure_ranges(model *m, model_region *q) {
  kvcached_range_t ranges[5];
  char in[MAX_PAGES] = {0};
  size_t n = 2 + pick(m, 4);
  uint64_t more = 0;
  for (size_t k = 0; k < n; k++) {
    range g = some_pages(m, q);
    if (k > 0 && pick(m, 8) == 0) g.len = g.n = 0;
    ranges[k] = (kvcached_range_t){g.off, g.len};
    memset(in + g.first, 1, g.n);
  }
  for (size_t i = 0; i < q->n; i++)
    if (in[i] && q->tag[i] < 0) more += page_bytes(q, i);
  int ok = wakes(m, 0, q) && fits(m, more);
  EXPECT(m, kvcached_ensure_ranges(q->r, ranges, n), ok);
  for (size_t i = 0; i < q->n && ok; i++) {
    if (!in[i] || q->tag[i] >= 0) continue;
    CHECK(holds_ends(q->r, i, 0));
    set_tag(q, i, 1 + (int)pick(m, 255));
  }
}

static void release(model *m, model_region *q) {
  range g = some_pages(m, q);
  WORKS(m, kvcached_release(q->r, g.off, g.len));
  for (size_t i = g.whole_first; i < g.whole_end; i++) q->tag[i] = ABSENT;
  if (q->asleep) set_asleep(q, 1);
}

static void write_pages(model *m, model_region *q) {
  range g = some_pages(m, q);
  if (g.n > 3) g.n = 3;
  size_t size = 0;
  for (size_t i = g.first; i < g.first + g.n; i++) size += (size_t)page_bytes(q, i);
  int ok = wakes(m, 0, q) && fits(m, missing(q, g)), tag = 1 + (int)pick(m, 255);
  unsigned char *buf = malloc(size);
  CHECK(buf != NULL);
  memset(buf, tag, size);
  EXPECT(m, kvcached_write(q->r, g.first * q->unit, buf, size), ok);
  for (size_t i = g.first; i < g.first + g.n; i++)
    if (ok)
      q->tag[i] = tag;
    else if (m->failed && q->tag[i] != ABSENT)
      q->tag[i] = UNKNOWN; /* some of it may have been written */
  free(buf);
}

static void read_pages(model *m, model_region *q) {
  range g = some_pages(m, q);
  unsigned char ends[2][32];
  int ok = wakes(m, 0, q);
  for (size_t i = g.first; i < g.first + g.n; i++) {
    size_t off = i * q->unit, last = off + (size_t)page_bytes(q, i) - 32;
    int tag = q->tag[i] == ABSENT ? 0 : q->tag[i];
    EXPECT(m, kvcached_read(q->r, off, ends[0], 32), ok);
    if (!ok) return;
    if (tag == UNKNOWN) continue;
    CHECK_OK(kvcached_read(q->r, last, ends[1], 32));
    CHECK(all_bytes(ends[0], 32, (unsigned char)tag) && all_bytes(ends[1], 32, (unsigned char)tag));
  }
}

static void clear_pages(model *m, model_region *q) {
  range g = some_pages(m, q);
  int whole = pick(m, 3) == 0;
  if (whole) g = (range){.first = 0, .n = q->n, .len = kvcached_region_size(q->r)};
  if (!whole) { /* the model knows whole pages only */
    g.off = g.first * q->unit;
    g.len = 0;
    for (size_t i = g.first; i < g.first + g.n; i++) g.len += (size_t)page_bytes(q, i);
    whole = g.len == kvcached_region_size(q->r);
  }
  int ok = (whole && q->asleep) || wakes(m, 0, q); /* a whole sleeper need not wake */
  EXPECT(m, kvcached_clear(q->r, g.off, g.len), ok);
  for (size_t i = g.first; i < g.first + g.n; i++)
    if (q->tag[i] != ABSENT && (ok || m->failed)) q->tag[i] = ok ? 0 : UNKNOWN;
}

static void sleep_kinds(model *m) {
  unsigned kinds = 1 + pick(m, 7);
  arm(m);
  int err = disarm(m, kvcached_sleep(m->ctx, kinds, 1000, NULL));
  if (m->failed) return;
  if (err == KVCACHED_E_HOST_LIMIT && m->host_limit != UINT64_MAX) return; /* then nothing has changed */
  CHECK_OK(err);
  for (int i = 0; i < REGIONS; i++)
    if (kinds & KVCACHED_KIND_BIT(m->region[i].kind)) set_asleep(&m->region[i], 1);
}

static void enter(model *m) {
  int ok = wakes(m, KVCACHED_ALL_KINDS, NULL);
  EXPECT(m, kvcached_enter(m->ctx), ok);
  if (!ok) return;
  for (int k = 0; k < REGIONS; k++)
    for (size_t i = 0; m->region[k].r && i < m->region[k].n; i++)
      if (m->region[k].tag[i] != ABSENT && m->region[k].tag[i] != UNKNOWN)
        CHECK(holds_ends(m->region[k].r, i, m->region[k].tag[i]));
  CHECK_OK(kvcached_leave(m->ctx));
}

static void set_limit(model *m) {
  if (m->faults) {
    arm(m);
    kvcached_set_limit(m->ctx, pick(m, 2) ? 0 : SIZE_MAX);
    fault_clear();
    kvcached_set_limit(m->ctx, SIZE_MAX);
    return;
  }
  m->limit = pick(m, 4) ? (CAPACITY / 3 + pick(m, CAPACITY)) * m->page : UINT64_MAX;
  kvcached_set_limit(m->ctx, m->limit == UINT64_MAX ? SIZE_MAX : (size_t)m->limit);
  kvcached_stats_t s = stats_of(m->ctx);
  CHECK_EQ(s.limit, m->limit);
  uint64_t used = in_use(m);
  CHECK_LE(s.mapped + s.pooled, used > m->limit ? used : m->limit);
}

/* After a failure everything can be woken. What was asleep may be awake by now, and the content of SCRATCH is
   gone with the first sleep, even one that failed in the end. */
static void recover(model *m) {
  m->failed = 0;
  CHECK_OK(kvcached_enter(m->ctx));
  CHECK_OK(kvcached_leave(m->ctx));
  for (int k = 0; k < REGIONS; k++) {
    model_region *q = &m->region[k];
    q->asleep = 0;
    for (size_t i = 0; q->r && q->kind == KVCACHED_SCRATCH && i < q->n; i++)
      if (q->tag[i] != ABSENT) q->tag[i] = UNKNOWN;
  }
  check_all(m);
}

static void step(model *m) {
  model_region *q = &m->region[pick(m, REGIONS)];
  size_t freed;
  if (!q->r) {
    if (pick(m, 3))
      make_region(m, q);
    else
      allocate(m, q);
    return;
  }
  switch (pick(m, 24)) {
    case 0:
    case 1:
    case 2:
    case 3: ensure(m, q); break;
    case 4:
    case 5: ensure_ranges(m, q); break;
    case 6:
    case 7:
    case 8: release(m, q); break;
    case 9:
    case 10: write_pages(m, q); break;
    case 11: read_pages(m, q); break;
    case 12: clear_pages(m, q); break;
    case 13: {
      kvcached_range_t ranges[4];
      size_t n = pick(m, 5);
      for (size_t i = 0; i < n; i++) {
        range g = some_pages(m, q);
        ranges[i] = (kvcached_range_t){g.off, g.len};
      }
      if (n == 1)
        WORKS(m, kvcached_prepare(q->r, ranges[0].off, ranges[0].len));
      else
        WORKS(m, kvcached_prepare_ranges(q->r, ranges, n));
      break;
    }
    case 14:
    case 15: sleep_kinds(m); break;
    case 16: {
      unsigned kinds = 1 + pick(m, 7);
      int ok = wakes(m, kinds, NULL);
      EXPECT(m, kvcached_wake(m->ctx, kinds), ok);
      break;
    }
    case 17: enter(m); break;
    case 18: set_limit(m); break;
    case 19: WORKS(m, kvcached_trim_host(m->ctx, (int)pick(m, 2), &freed)); break;
    case 20: WORKS(m, kvcached_prepare_sleep(m->ctx, 1 + pick(m, 7))); break;
    case 21: end_region(m, q); break;
    default: {
      size_t keep = pick(m, 30) * m->page;
      WORKS(m, kvcached_trim(m->ctx, keep, &freed));
    }
  }
}

static void play(uint32_t seed, int faults, const char *ledger, unsigned *refused, unsigned *done) {
  model m = {.seed = seed * 2654435761u + 1, .page = test_page(), .limit = CAPACITY * test_page()};
  if (faults) m.limit = UINT64_MAX; /* so that every refusal is the backend's */
  m.faults = faults;
  kvcached_options_t o;
  test_options(&o);
  o.limit = m.limit;
  o.ledger_path = pick(&m, 3) ? ledger : "";
  o.group = "property";
  o.pool_limit = pick(&m, 12) * m.page;
  o.lookahead = 1 + (int)pick(&m, 3);
  o.host_limit = m.host_limit = pick(&m, 3) ? UINT64_MAX : 40 * m.page;
  o.room_wait_ms = 50;
  CHECK_OK(kvcached_open(&o, &m.ctx));
  uint64_t last = 0;
  for (int i = 0; i < STEPS; i++) {
    test_note("KVCACHED_TEST_SEED=%u, step %d", seed, i);
    step(&m);
    if (m.failed) {
      recover(&m);
      *refused += 1;
    }
    kvcached_stats_t s = stats_of(m.ctx);
    CHECK_LE(in_use(&m), s.mapped);
    CHECK_LE(s.mapped + s.pooled, m.limit > last ? m.limit : last); /* it only grows within the limit */
    last = s.mapped + s.pooled;
    CHECK_EQ(s.limit_failures, m.refused);
    if (i % 40 == 39) check_all(&m);
  }
  m.limit = UINT64_MAX;
  m.faults = 0;
  kvcached_set_limit(m.ctx, SIZE_MAX);
  enter(&m);
  check_all(&m);
  *refused += m.refused;
  *done += m.done;
  kvcached_shutdown(m.ctx);
}

TEST(property, random_calls) {
  const char *ledger = scratch("ledger");
  uint32_t seed = first_seed(1);
  unsigned refused = 0, done = 0, n = rounds(test_page() > 64 * KIB ? 5 : 24);
  for (unsigned i = 0; i < n; i++) play(seed + i, 0, ledger, &refused, &done);
  CHECK_EQ(live_slots(ledger), 0);
  if (n > 4) CHECK_LE(n, refused); /* else the limit has not been tried */
  CHECK_LE(n * 50, done);
}

TEST(property, random_calls_with_faults) {
  const char *ledger = scratch("faults");
  uint32_t seed = first_seed(1001);
  unsigned failed = 0, done = 0, n = rounds(test_page() > 64 * KIB ? 3 : 12);
  for (unsigned i = 0; i < n; i++) play(seed + i, 1, ledger, &failed, &done);
  CHECK_EQ(live_slots(ledger), 0);
  CHECK_LE(n, failed);
}
