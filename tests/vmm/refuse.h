/* The kernel's refusals on purpose, below the backend: unlike a call that
   fault.c fails, what the backend did before has happened then. */
#ifndef REFUSE_H
#define REFUSE_H

#include <stddef.h>

typedef enum refuse_kind {
  REFUSE_PROTECT, /* mprotect */
  REFUSE_DISCARD, /* madvise(MADV_DONTNEED) */
  REFUSE_KINDS
} refuse_kind;

/* Of the calls of a kind that touch [base, base + size), by this program, `n`
   are refused after the next `skip` (ENOMEM). */
void refuse_calls(refuse_kind kind, const void *base, size_t size, unsigned skip, unsigned n);
/* How many were since then; and none is any more. */
unsigned refuse_end(refuse_kind kind);

#endif
