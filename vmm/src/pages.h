/* The state of each page of a region: one byte a page, counted. Page numbers are relative to the region. */
#ifndef KVC_PAGES_H
#define KVC_PAGES_H

#include <stddef.h>
#include <stdint.h>

enum { KVC_UNMAPPED = 0, KVC_IDLE = 1, KVC_ENSURED = 2, KVC_STATES = 3 };

typedef struct kvc_pages {
  uint8_t *state;
  size_t n;
  size_t top; /* every page from here on is unmapped */
  size_t count[KVC_STATES];
} kvc_pages;

/* All n pages unmapped. 0, or -1 when there is no memory. */
int kvc_pages_init(kvc_pages *pages, size_t n);
void kvc_pages_free(kvc_pages *pages);

/* Number of pages from first on, before end, that share first's state. */
size_t kvc_pages_run(const kvc_pages *pages, size_t first, size_t end);

/* How many pages of [first, end) are in each state. */
void kvc_pages_count(const kvc_pages *pages, size_t first, size_t end, size_t count[KVC_STATES]);

void kvc_pages_set(kvc_pages *pages, size_t first, size_t n, uint8_t state);

/* The last idle run that ends at or before end, at most max pages of it (its upper ones), none of it in
   [skip_first, skip_end). Returns its length, 0 when there is none; *first is its first page. */
size_t kvc_pages_last_idle(const kvc_pages *pages, size_t end, size_t max, size_t skip_first, size_t skip_end,
                           size_t *first);

#endif
