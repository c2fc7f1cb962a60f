/* What the library needs from a kind of memory. A backend knows nothing of limits, states or claims: it turns
   runs of whole pages on and off inside a reserved range. Offsets and lengths are multiples of the space's
   page size. */
#ifndef KVC_BACKEND_H
#define KVC_BACKEND_H

#include "error.h"

typedef struct kvc_space {
  void *base;
  size_t size;
  size_t page_size;
} kvc_space;

typedef struct kvc_backend {
  const char *name; /* last part of the default ledger's file name */

  /* The page size to use for `asked` bytes (0 = default). E_INVAL when there is none such. */
  int (*page_size)(size_t asked, size_t *out);

  /* Fills *space with size bytes of addresses that fault when touched. E_NOMEM, E_SYSTEM. */
  int (*reserve)(size_t size, size_t page_size, kvc_space *space);

  /* Puts memory that reads as zero under a run that has none. On failure the run is as before. */
  int (*map)(kvc_space *space, size_t off, size_t len);

  /* Takes the memory of a run away; touching it faults again. On failure the run is as before. */
  int (*unmap)(kvc_space *space, size_t off, size_t len);

  /* Makes a mapped run read as zero. */
  int (*zero)(kvc_space *space, size_t off, size_t len);

  /* Ends the space, whatever is mapped in it. */
  void (*release)(kvc_space *space);
} kvc_backend;

extern const kvc_backend kvc_backend_host;

/* The backend of a KVCACHED_BACKEND_* number; NULL when this build has none. */
const kvc_backend *kvc_backend_get(int backend);

#ifdef KVCACHED_TEST
/* The test build puts a table in between that can be told to fail (tests/vmm/fault.c). */
const kvc_backend *kvc_test_backend(const kvc_backend *real);
#endif

#endif
