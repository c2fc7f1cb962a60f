/* The state of each page of a region, one byte a page, counted; and the handle under each, where handles are
   memory by themselves. Page numbers are relative to the region. */
#ifndef KVC_PAGES_H
#define KVC_PAGES_H

#include <stddef.h>
#include <stdint.h>

enum {
  KVC_UNMAPPED = 0, /* nothing there */
  KVC_IDLE = 1,     /* memory, content dropped */
  KVC_READY = 2,    /* memory that reads as zero, not asked for yet */
  KVC_ENSURED = 3,  /* in use */
  KVC_ASLEEP = 4,   /* in use, memory gone: content elsewhere or dropped */
  KVC_BUSY = 5,     /* the helper is making it READY */
  KVC_WAKING = 6,   /* memory, content not yet put back: only while the mutex is held */
  KVC_STATES = 7
};

/* Pages [first, end). */
typedef struct kvc_span {
  size_t first, end;
} kvc_span;

/* Several, in ascending order; none is empty, none overlaps another. */
typedef struct kvc_spans {
  const kvc_span *at;
  size_t n;
} kvc_spans;

typedef struct kvc_pages {
  uint8_t *state;
  /* 1: memory that could not be unmapped when it should have been, which may lack access. Only IDLE and
     ASLEEP pages are stuck; an ASLEEP page has memory, and a claim, only when it is. fill.c alone sets it. */
  uint8_t *stuck;
  uint64_t *handle; /* NULL where handles are tokens */
  size_t n;
  size_t top; /* every page from here on is unmapped */
  size_t n_stuck;
  size_t count[KVC_STATES];
} kvc_pages;

/* All n pages unmapped. 0, or -1 when there is no memory. */
int kvc_pages_init(kvc_pages *pages, size_t n, int with_handles);
void kvc_pages_free(kvc_pages *pages);

/* Number of pages from first on, before end, that share first's state. */
size_t kvc_pages_run(const kvc_pages *pages, size_t first, size_t end);

/* The same, and they are all stuck or none is. */
size_t kvc_pages_run_alike(const kvc_pages *pages, size_t first, size_t end);

/* The first page at or after first and before end that is in `state`, or end. */
size_t kvc_pages_find(const kvc_pages *pages, size_t first, size_t end, uint8_t state);

/* How many pages of [first, end) are in each state. */
void kvc_pages_count(const kvc_pages *pages, size_t first, size_t end, size_t count[KVC_STATES]);

/* They are no longer stuck. */
void kvc_pages_set(kvc_pages *pages, size_t first, size_t n, uint8_t state);

/* Marks pages stuck, in the state they are in. */
void kvc_pages_set_stuck(kvc_pages *pages, size_t first, size_t n);

/* The last run of pages in `state` that ends at or before end, at most max pages of it (its upper ones), none
   of it in `skip`. Returns its length, 0 when there is none; *first is its first page. */
size_t kvc_pages_last(const kvc_pages *pages, uint8_t state, size_t end, size_t max, kvc_spans skip,
                      size_t *first);

#endif
