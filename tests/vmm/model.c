/*
 * A model of a context: for each page whether it is in use and what it holds, for each region whether it
 * sleeps. From that alone follows what every call must return, since idle memory never stands in anybody's
 * way.
 */
#include "model.h"

#include "context.h"
#include "fault.h"

uint32_t pick(model *m, uint32_t n) { return next_random(&m->seed) % n; }

uint64_t page_bytes(const model_region *q, size_t i) {
  size_t left = kvcached_region_size(q->r) - i * q->unit;
  return left < q->unit ? left : q->unit;
}

static uint64_t bytes_in_use(const model_region *q) {
  uint64_t sum = 0;
  for (size_t i = 0; q->r && i < q->n; i++)
    if (q->tag[i] >= 0) sum += page_bytes(q, i);
  return sum;
}

uint64_t in_use(const model *m) { /* with memory */
  uint64_t sum = 0;
  for (int i = 0; i < REGIONS; i++)
    if (!m->region[i].asleep) sum += bytes_in_use(&m->region[i]);
  return sum;
}

int fits(const model *m, uint64_t more) { return more == 0 || in_use(m) + more <= m->limit; }

uint64_t held(const model *m) {
  kvcached_stats_t s = stats_of(m->ctx);
  return s.mapped + s.pooled;
}

void arm(model *m) {
  if (!m->faults || pick(m, 3)) return;
  int err = pick(m, 2) ? KVCACHED_E_DEVICE : KVCACHED_E_NOMEM;
  if (pick(m, 4))
    fault_set(FAULT_ANY, 1 + pick(m, 10), err);
  else
    fault_every(FAULT_ANY, 2 + pick(m, 6), err);
}

int disarm(model *m, int err) {
  fault_clear();
  m->failed |= m->faults && (err == KVCACHED_E_DEVICE || err == KVCACHED_E_NOMEM);
  return err;
}

void set_asleep(model_region *q, int asleep) {
  size_t n = 0;
  for (size_t i = 0; q->r && i < q->n; i++) n += q->tag[i] >= 0;
  q->asleep = asleep && n > 0;
  for (size_t i = 0; q->asleep && q->kind == KVCACHED_SCRATCH && i < q->n; i++)
    if (q->tag[i] != ABSENT) q->tag[i] = 0;
}

int wakes(model *m, unsigned kinds, const model_region *only) {
  uint64_t more = 0;
  for (int i = 0; i < REGIONS; i++) {
    model_region *q = &m->region[i];
    if (q->asleep && (only ? q == only : (kinds & KVCACHED_KIND_BIT(q->kind)) != 0)) more += bytes_in_use(q);
  }
  if (more && !fits(m, more)) return 0;
  for (int i = 0; i < REGIONS; i++) {
    model_region *q = &m->region[i];
    if (only ? q == only : (kinds & KVCACHED_KIND_BIT(q->kind)) != 0) q->asleep = 0;
  }
  return 1;
}

/* WEIGHTS may have been copied ahead, so they are written by the library, which then knows. */
void set_tag(model_region *q, size_t i, int tag) {
  q->tag[i] = tag;
  if (q->kind != KVCACHED_WEIGHTS) {
    put_ends(q->r, i, tag);
    return;
  }
  unsigned char ends[64];
  memset(ends, tag, sizeof(ends));
  CHECK_OK(kvcached_write(q->r, i * q->unit, ends, sizeof(ends)));
  CHECK_OK(kvcached_write(q->r, i * q->unit + page_bytes(q, i) - sizeof(ends), ends, sizeof(ends)));
}

void check_all(model *m) {
  check_context(m->ctx);
  for (int k = 0; k < REGIONS; k++) {
    model_region *q = &m->region[k];
    CHECK_EQ(q->r ? kvc_sleeps(q->r) : 0, q->asleep);
    for (size_t i = 0; q->r && i < q->n; i++) {
      size_t run;
      int ensured;
      CHECK_OK(kvcached_mapped_run(q->r, i * q->unit, (size_t)page_bytes(q, i), &run, &ensured));
      CHECK_EQ(ensured, q->tag[i] >= 0);
      if (q->tag[i] >= 0 && q->tag[i] != UNKNOWN && !q->asleep) CHECK(holds_ends(q->r, i, q->tag[i]));
    }
  }
}
