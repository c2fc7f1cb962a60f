/* The states of pages against plain arrays that do the same slowly. */
#include "pages.h"

#include "support.h"

enum { N = 203 };

typedef struct model {
  uint8_t state[N], stuck[N];
} model;

static size_t slow_run(const model *m, size_t first, size_t end, int alike) {
  size_t i = first;
  while (i < end && m->state[i] == m->state[first] && (!alike || m->stuck[i] == m->stuck[first])) i++;
  return i - first;
}

static size_t slow_find(const model *m, size_t first, size_t end, uint8_t state) {
  while (first < end && m->state[first] != state) first++;
  return first;
}

static int in_spans(size_t i, kvc_spans spans) {
  for (size_t k = 0; k < spans.n; k++)
    if (i >= spans.at[k].first && i < spans.at[k].end) return 1;
  return 0;
}

static size_t slow_last(const model *m, uint8_t state, size_t end, size_t max, kvc_spans skip,
                        size_t *first) {
  for (size_t last = end; last > 0; last--) {
    size_t n = 0;
    while (n < max && n < last && m->state[last - 1 - n] == state && !in_spans(last - 1 - n, skip)) n++;
    if (n) {
      *first = last - n;
      return n;
    }
  }
  return 0;
}

static void check_totals(const kvc_pages *p, const model *m) {
  size_t count[KVC_STATES] = {0}, top = 0, stuck = 0;
  for (size_t i = 0; i < N; i++) {
    count[m->state[i]]++;
    stuck += m->stuck[i];
    if (m->state[i] != KVC_UNMAPPED) top = i + 1;
  }
  CHECK(memcmp(p->count, count, sizeof(count)) == 0);
  CHECK_EQ(p->top, top);
  CHECK_EQ(p->n_stuck, stuck);
  CHECK(memcmp(p->state, m->state, N) == 0);
  CHECK(memcmp(p->stuck, m->stuck, N) == 0);
}

static void check_questions(const kvc_pages *p, const model *m, uint32_t *seed) {
  size_t a = next_random(seed) % N, b = a + next_random(seed) % (N - a + 1);
  uint8_t state = (uint8_t)(next_random(seed) % KVC_STATES);
  CHECK_EQ(kvc_pages_run(p, a, b), slow_run(m, a, b, 0));
  CHECK_EQ(kvc_pages_run_alike(p, a, b), slow_run(m, a, b, 1));
  CHECK_EQ(kvc_pages_find(p, a, b, state), slow_find(m, a, b, state));

  size_t count[KVC_STATES] = {0}, got[KVC_STATES];
  for (size_t i = a; i < b; i++) count[m->state[i]]++;
  kvc_pages_count(p, a, b, got);
  CHECK(memcmp(got, count, sizeof(count)) == 0);

  size_t end = next_random(seed) % (N + 1), max = 1 + next_random(seed) % 20, x = 0, y = 0;
  kvc_span skip[3];
  size_t n_skip = 0;
  for (size_t from = a; n_skip < 3 && from < N; from = skip[n_skip++].end + next_random(seed) % 5)
    skip[n_skip] = (kvc_span){from, from + 1 + next_random(seed) % (N - from < 8 ? N - from : 8)};
  if (next_random(seed) % 4 == 0) n_skip = 0;
  size_t n = kvc_pages_last(p, state, end, max, (kvc_spans){skip, n_skip}, &x);
  CHECK_EQ(n, slow_last(m, state, end, max, (kvc_spans){skip, n_skip}, &y));
  if (n) CHECK_EQ(x, y);
}

TEST_HOST(pages, random_changes) {
  kvc_pages p;
  static model m;
  uint32_t seed = first_seed(7);
  CHECK(kvc_pages_init(&p, N, 0) == 0);
  CHECK(p.handle == NULL);
  for (unsigned step = 0; step < rounds(20000); step++) {
    size_t first = next_random(&seed) % N, n = next_random(&seed) % (N - first + 1);
    if (next_random(&seed) % 4) n %= 9;
    uint8_t state = (uint8_t)(next_random(&seed) % KVC_STATES);
    kvc_pages_set(&p, first, n, state);
    memset(m.state + first, state, n);
    memset(m.stuck + first, 0, n);
    if (n > 0 && (state == KVC_IDLE || state == KVC_ASLEEP) && next_random(&seed) % 3 == 0) {
      size_t some = 1 + next_random(&seed) % n;
      kvc_pages_set_stuck(&p, first, some);
      memset(m.stuck + first, 1, some);
    }
    check_totals(&p, &m);
    check_questions(&p, &m, &seed);
  }
  kvc_pages_free(&p);
}

/* An empty range asks nothing and changes nothing. */
TEST_HOST(pages, empty_ranges) {
  kvc_pages p;
  size_t at = 0;
  CHECK(kvc_pages_init(&p, N, 1) == 0);
  CHECK(p.handle != NULL);
  kvc_pages_set(&p, 5, 0, KVC_ENSURED);
  CHECK_EQ(p.top, 0);
  CHECK_EQ(kvc_pages_run(&p, 5, 5), 0);
  CHECK_EQ(kvc_pages_run_alike(&p, 5, 5), 0);
  CHECK_EQ(kvc_pages_find(&p, 5, 5, KVC_UNMAPPED), 5);
  CHECK_EQ(kvc_pages_last(&p, KVC_UNMAPPED, 0, 1, (kvc_spans){0}, &at), 0);
  kvc_pages_free(&p);
  CHECK(p.state == NULL);
}

/* Marking pages stuck twice counts them once; any new state frees them of it.
 */
TEST_HOST(pages, stuck_until_set) {
  kvc_pages p;
  CHECK(kvc_pages_init(&p, N, 0) == 0);
  kvc_pages_set(&p, 10, 20, KVC_ASLEEP);
  kvc_pages_set_stuck(&p, 12, 4);
  kvc_pages_set_stuck(&p, 10, 4);
  CHECK_EQ(p.n_stuck, 6);
  CHECK_EQ(kvc_pages_run_alike(&p, 10, N), 6);
  CHECK_EQ(kvc_pages_run(&p, 10, N), 20);
  kvc_pages_set(&p, 15, 3, KVC_ASLEEP);
  CHECK_EQ(p.n_stuck, 5);
  kvc_pages_set(&p, 0, N, KVC_UNMAPPED);
  CHECK_EQ(p.n_stuck, 0);
  CHECK_EQ(p.top, 0);
  kvc_pages_free(&p);
}
