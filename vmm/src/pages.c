/* Page states of a region. Scans go by eight pages where they can: a long context has millions of 4 KiB
   pages, and most questions are asked of ranges that are in one state throughout. */
#include "pages.h"

#include <stdlib.h>
#include <string.h>

int kvc_pages_init(kvc_pages *pages, size_t n, int with_handles) {
  memset(pages, 0, sizeof(*pages));
  pages->state = calloc(n, 1);
  pages->stuck = calloc(n, 1);
  if (with_handles) pages->handle = calloc(n, sizeof(*pages->handle));
  if (!pages->state || !pages->stuck || (with_handles && !pages->handle)) {
    kvc_pages_free(pages);
    return -1;
  }
  pages->n = n;
  pages->count[KVC_UNMAPPED] = n;
  return 0;
}

void kvc_pages_free(kvc_pages *pages) {
  free(pages->state);
  free(pages->stuck);
  free(pages->handle);
  memset(pages, 0, sizeof(*pages));
}

/* How many bytes from first on, before end, equal s[first]. */
static size_t run_of(const uint8_t *s, size_t first, size_t end) {
  if (first >= end) return 0;
  uint8_t value = s[first];
  uint64_t eight = UINT64_C(0x0101010101010101) * value;
  size_t i = first + 1;
  for (; end - i >= sizeof(eight); i += sizeof(eight)) {
    uint64_t word;
    memcpy(&word, s + i, sizeof(word));
    if (word != eight) break;
  }
  while (i < end && s[i] == value) i++;
  return i - first;
}

size_t kvc_pages_run(const kvc_pages *pages, size_t first, size_t end) {
  return run_of(pages->state, first, end);
}

size_t kvc_pages_run_alike(const kvc_pages *pages, size_t first, size_t end) {
  size_t n = run_of(pages->state, first, end);
  return pages->n_stuck > 0 ? run_of(pages->stuck, first, first + n) : n;
}

size_t kvc_pages_find(const kvc_pages *pages, size_t first, size_t end, uint8_t state) {
  if (pages->count[state] == 0) return end;
  while (first < end && pages->state[first] != state) first += kvc_pages_run(pages, first, end);
  return first < end ? first : end;
}

void kvc_pages_count(const kvc_pages *pages, size_t first, size_t end, size_t count[KVC_STATES]) {
  memset(count, 0, KVC_STATES * sizeof(count[0]));
  while (first < end) {
    size_t n = kvc_pages_run(pages, first, end);
    count[pages->state[first]] += n;
    first += n;
  }
}

void kvc_pages_set(kvc_pages *pages, size_t first, size_t n, uint8_t state) {
  if (n == 0) return;
  size_t before[KVC_STATES];
  size_t end = first + n;
  kvc_pages_count(pages, first, end, before);
  for (int s = 0; s < KVC_STATES; s++) pages->count[s] -= before[s];
  pages->count[state] += n;
  memset(pages->state + first, state, n);
  for (size_t i = first; i < end && pages->n_stuck > 0; i++) {
    pages->n_stuck -= pages->stuck[i];
    pages->stuck[i] = 0;
  }
  if (state != KVC_UNMAPPED) {
    if (end > pages->top) pages->top = end;
  } else if (end >= pages->top) {
    while (pages->top > 0 && pages->state[pages->top - 1] == KVC_UNMAPPED) pages->top--;
  }
}

void kvc_pages_set_stuck(kvc_pages *pages, size_t first, size_t n) {
  for (size_t i = first; i < first + n; i++) {
    pages->n_stuck += !pages->stuck[i];
    pages->stuck[i] = 1;
  }
}

size_t kvc_pages_last(const kvc_pages *pages, uint8_t state, size_t end, size_t max, kvc_spans skip,
                      size_t *first) {
  const uint8_t *s = pages->state;
  size_t i = end < pages->top || state == KVC_UNMAPPED ? end : pages->top;
  size_t k = skip.n,
         floor = 0; /* the spans from k on begin at i or above; a run goes no further than floor */
  for (; i > 0; i--) {
    while (k > 0 && skip.at[k - 1].first >= i) k--;
    floor = k > 0 ? skip.at[k - 1].end : 0;
    if (i <= floor) {
      i = skip.at[k - 1].first + 1; /* the loop's own step lands on its first page */
      continue;
    }
    if (s[i - 1] == state) break;
  }
  size_t last = i;
  while (i > floor && last - i < max && s[i - 1] == state) i--;
  *first = i;
  return last - i;
}
