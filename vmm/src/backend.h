/*
 * What the library needs from a kind of memory. A backend knows nothing of limits, states or claims: it makes
 * and ends physical memory (handles) and puts it under runs of addresses inside a reserved space.
 *
 * Every function returns KVCACHED_OK or a negative error with its detail set, and a call that failed has
 * changed nothing, unless it says otherwise. Offsets and lengths are multiples of the device's granularity
 * unless said otherwise.
 *
 * Threads: calls that name a lane are made by one thread at a time for each lane; all others may be made by
 * several threads at once, for parts of a space that do not overlap.
 */
#ifndef KVC_BACKEND_H
#define KVC_BACKEND_H

#include "error.h"

/* Queues of work of the library's own, so that the helper thread's copies do not wait for the caller's. */
typedef enum kvc_lane { KVC_LANE_CALLER = 0, KVC_LANE_HELPER = 1, KVC_LANES = 2 } kvc_lane;

typedef struct kvc_device_options {
  int ordinal;            /* where pci_bus_id is NULL */
  const char *pci_bus_id; /* NULL = by ordinal */
  size_t page_size;       /* as asked; 0 = default */
  size_t large_page;      /* as asked; 0 = default */
} kvc_device_options;

/* What is known of an open device; a backend's own structure begins with it. */
typedef struct kvc_device {
  char id[64]; /* last part of the default ledger's file name: "host", or the UUID in lower case, with dashes
                */
  char name[96];      /* for people */
  size_t granularity; /* bytes: what every size and offset is a multiple of */
  size_t page_size;   /* bytes of a KV page */
  size_t large_page;  /* bytes of a WEIGHTS or SCRATCH page */
  int edits_anytime;  /* mappings may change while kernels run that do not touch them */
} kvc_device;

typedef struct kvc_space {
  void *base;
  size_t size; /* bytes */
  void *raw;   /* what the backend really reserved, for it alone */
  size_t raw_size;
} kvc_space;

typedef uint64_t kvc_handle; /* physical memory; its size is the caller's to remember */

typedef struct kvc_backend {
  const char *name; /* "host", "cuda" */
  int pools; /* 1: a handle is memory by itself and can be mapped elsewhere after an unmap. 0: a handle is a
                token, the memory comes with access() and goes with unmap() */
  int fresh_is_zero; /* 1: memory never used before reads as zero by the system's promise */

  /* Opens a device: no other function is called before. E_UNSUPPORTED, E_INVAL, E_NOMEM, E_DEVICE. */
  int (*open)(const kvc_device_options *options, kvc_device **out);
  void (*close)(kvc_device *device);

  /* Fills *space with size bytes of addresses that fault when touched, aligned to align. E_NOMEM, E_SYSTEM,
     E_DEVICE. */
  int (*reserve)(kvc_device *device, size_t size, size_t align, kvc_space *space);
  /* Ends the space; nothing is mapped in it. */
  void (*unreserve)(kvc_device *device, kvc_space *space);

  /* Makes and ends physical memory. create: E_NOMEM when there is none. */
  int (*create)(kvc_device *device, size_t size, kvc_handle *out);
  int (*destroy)(kvc_device *device, size_t size, kvc_handle handle);

  /* Puts a whole handle at off. No access yet. */
  int (*map)(kvc_device *device, kvc_space *space, size_t off, size_t size, kvc_handle handle);
  /* Gives a run of mapped handles access (one call a run). On failure the run is mapped without access, and
     is to be unmapped. */
  int (*access)(kvc_device *device, kvc_space *space, size_t off, size_t len);
  /* Takes a run of whole mapped handles, with or without access, out of the space; they live on (pools) or
     end (no pools). On failure the run is mapped still, and holds what it held, but may lack access: access()
     gives it back. */
  int (*unmap)(kvc_device *device, kvc_space *space, size_t off, size_t len);

  /* Queue work on accessible memory, at any offset and length; done once finish() returns. Memory handed to
     read and write stays until then. */
  int (*zero)(kvc_device *device, kvc_lane lane, kvc_space *space, size_t off, size_t len);
  int (*read)(kvc_device *device, kvc_lane lane, kvc_space *space, size_t off, void *dst, size_t len);
  int (*write)(kvc_device *device, kvc_lane lane, kvc_space *space, size_t off, const void *src, size_t len);
  int (*finish)(kvc_device *device, kvc_lane lane);

  /* Waits until nothing that this process launched runs on the device. */
  int (*quiesce)(kvc_device *device);

  /* Host memory for copies; *pinned says whether the device reads it directly. E_NOMEM. */
  int (*host_alloc)(kvc_device *device, size_t size, void **out, int *pinned);
  int (*host_free)(kvc_device *device, void *p, size_t size, int pinned);

  /* Free and total bytes, for all processes. */
  int (*memory)(kvc_device *device, uint64_t *free_bytes, uint64_t *total_bytes);

  /* What this process holds of the device beside the handles made here, on whatever context; takes
     milliseconds. NULL: there is no such thing. E_UNSUPPORTED: it cannot be known. E_BUSY: not just now. */
  int (*beside)(kvc_device *device, uint64_t *bytes);
} kvc_backend;

extern const kvc_backend kvc_backend_host;
extern const kvc_backend kvc_backend_cuda;

/* Ordinary host memory for copies (backend_host.c): what host_alloc falls back to where there is none the
   device reads directly. *pinned becomes 0. E_NOMEM, E_SYSTEM. */
int kvc_pageable_alloc(size_t size, void **out, int *pinned);
int kvc_pageable_free(void *p, size_t size);

/* The backend of a KVCACHED_BACKEND_* number; NULL when there is none such. */
const kvc_backend *kvc_backend_get(int backend);

#ifdef KVCACHED_TEST
/* The test build puts a table in between that can be told to fail (tests/vmm/fault.c). */
const kvc_backend *kvc_test_backend(const kvc_backend *real);
#endif

#endif
