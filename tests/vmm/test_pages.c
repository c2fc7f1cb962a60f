/* The states of pages against a plain array that does the same slowly. */
#include "pages.h"

#include "support.h"

#include <string.h>

enum { N = 203 };

static size_t slow_run(const uint8_t *s, size_t first, size_t end) {
  size_t i = first;
  while (i < end && s[i] == s[first]) i++;
  return i - first;
}

static size_t slow_last_idle(const uint8_t *s, size_t end, size_t max, size_t skip_first, size_t skip_end,
                             size_t *first) {
  for (size_t last = end; last > 0; last--) {
    size_t n = 0;
    while (n < max && n < last && s[last - 1 - n] == KVC_IDLE &&
           !(last - 1 - n >= skip_first && last - 1 - n < skip_end))
      n++;
    if (n) {
      *first = last - n;
      return n;
    }
  }
  return 0;
}

static void test_random_changes(void) {
  kvc_pages p;
  uint8_t s[N] = {0};
  uint32_t seed = 7;
  CHECK(kvc_pages_init(&p, N) == 0);
  for (int step = 0; step < 20000; step++) {
    size_t first = next_random(&seed) % N, n = next_random(&seed) % (N - first + 1);
    if (next_random(&seed) % 4) n %= 9;
    uint8_t state = (uint8_t)(next_random(&seed) % KVC_STATES);
    kvc_pages_set(&p, first, n, state);
    memset(s + first, state, n);

    size_t count[KVC_STATES] = {0}, got[KVC_STATES], top = 0;
    for (size_t i = 0; i < N; i++) {
      count[s[i]]++;
      if (s[i] != KVC_UNMAPPED) top = i + 1;
    }
    CHECK(memcmp(p.count, count, sizeof(count)) == 0);
    CHECK_EQ(p.top, top);

    size_t a = next_random(&seed) % N, b = a + next_random(&seed) % (N - a + 1);
    CHECK_EQ(kvc_pages_run(&p, a, b), slow_run(s, a, b));
    memset(count, 0, sizeof(count));
    for (size_t i = a; i < b; i++) count[s[i]]++;
    kvc_pages_count(&p, a, b, got);
    CHECK(memcmp(got, count, sizeof(count)) == 0);

    size_t end = next_random(&seed) % (N + 1), max = 1 + next_random(&seed) % 20, x = 0, y = 0;
    size_t n_got = kvc_pages_last_idle(&p, end, max, a, b, &x);
    CHECK_EQ(n_got, slow_last_idle(s, end, max, a, b, &y));
    if (n_got) CHECK_EQ(x, y);
  }
  kvc_pages_free(&p);
}

int main(void) {
  RUN(test_random_changes);
  return 0;
}
