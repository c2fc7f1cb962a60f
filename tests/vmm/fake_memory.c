/* The fake driver's memory. What stands for the cards is one file without a name, of which handles are parts;
   mapping them is mapping that file. */
#include "fake_cuda.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

enum { FRESH = 0xA5 }; /* what new memory is full of */

typedef struct memory {
  size_t size; /* 0: free entry */
  off_t at;    /* in the file that stands for the cards */
  cu_device device;
  unsigned mappings;
  int released;
  uint32_t generation;
} memory;

typedef struct range { /* a reservation, a mapping or a piece of pinned memory */
  char *p;
  size_t size;
  cu_handle handle; /* of a mapping */
  int access;
} range;

typedef struct ranges { /* by address */
  range *r;
  size_t n, capacity;
} ranges;

static int card_file = -1;
static off_t card_end;
static size_t granularity;
static memory *memories;
static size_t n_memories, held_memories;
static ranges reserved, mapped, pinned;

int fake_memory_start(void) {
  granularity = fake_number("FAKE_CUDA_GRANULARITY", (size_t)2 << 20);
  if (card_file < 0) card_file = memfd_create("fake-cuda", MFD_CLOEXEC);
  return card_file < 0 ? -1 : ftruncate(card_file, (off_t)1 << 46);
}

void fake_memory_held(fake_held *held) {
  *held = (fake_held){held_memories, reserved.n, mapped.n, pinned.n, 0};
}

static void *host(cu_ptr p) { return (void *)(uintptr_t)p; }

/* ---- ranges ---- */

/* Index of the first range that ends behind p. */
static size_t after(const ranges *s, const char *p) {
  size_t lo = 0, hi = s->n;
  while (lo < hi) {
    size_t mid = (lo + hi) / 2;
    if (s->r[mid].p + s->r[mid].size > p)
      hi = mid;
    else
      lo = mid + 1;
  }
  return lo;
}

static int insert(ranges *s, range r) {
  if (s->n == s->capacity) {
    size_t capacity = s->capacity ? s->capacity * 2 : 64;
    range *grown = realloc(s->r, capacity * sizeof(*grown));
    if (!grown) return 0;
    s->r = grown;
    s->capacity = capacity;
  }
  size_t i = after(s, r.p);
  memmove(s->r + i + 1, s->r + i, (s->n - i) * sizeof(r));
  s->r[i] = r;
  s->n++;
  return 1;
}

static void drop(ranges *s, size_t i, size_t n) {
  memmove(s->r + i, s->r + i + n, (s->n - i - n) * sizeof(*s->r));
  s->n -= n;
}

/* How many whole ranges from *first on make up [p, p + size) without a gap; 0: they do not. */
static size_t whole(const ranges *s, const char *p, size_t size, size_t *first) {
  size_t i = *first = after(s, p), n = 0;
  const char *at = p, *end = p + size;
  for (; i < s->n && at < end && s->r[i].p == at; i++, n++) at += s->r[i].size;
  return at == end ? n : 0;
}

int fake_accessible(const char *p, size_t size) {
  const char *end = p + size;
  for (size_t i = after(&mapped, p); p < end; i++) {
    if (i >= mapped.n || mapped.r[i].p > p || !mapped.r[i].access) return 0;
    p = mapped.r[i].p + mapped.r[i].size;
  }
  return 1;
}

/* ---- memory ---- */

static memory *memory_of(cu_handle handle) {
  size_t i = (size_t)(handle & UINT32_MAX);
  if (i >= n_memories || memories[i].generation != handle >> 32 || !memories[i].size) return NULL;
  return &memories[i];
}

/* Parts of the file that were a handle's: the next of that size uses them again, which costs the system less
   than new pages. */
enum { SPARES = 64, SPARE_BYTES = 64 << 20 };
static struct {
  off_t at;
  size_t size;
} spare[SPARES];
static size_t n_spare, spare_bytes;

static off_t take_part(size_t size) {
  for (size_t i = n_spare; i-- > 0;) {
    if (spare[i].size != size) continue;
    off_t at = spare[i].at;
    spare[i] = spare[--n_spare];
    spare_bytes -= size;
    return at;
  }
  card_end += (off_t)size;
  return card_end - (off_t)size;
}

static void give_part(off_t at, size_t size) {
  if (n_spare < SPARES && spare_bytes + size <= SPARE_BYTES) {
    spare[n_spare].at = at;
    spare[n_spare++].size = size;
    spare_bytes += size;
  } else {
    (void)fallocate(card_file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, (off_t)size);
  }
}

/* Handles are ended when they are released and mapped nowhere. */
static void end_memory(memory *m) {
  if (!m->released || m->mappings) return;
  give_part(m->at, m->size);
  fake_card_give(m->device, m->size);
  m->size = 0;
  held_memories--;
}

/* New memory is dirty, so that what is not zeroed shows. */
static int fill(off_t at, size_t size) {
  static char dirt[1 << 16];
  memset(dirt, FRESH, sizeof(dirt));
  for (size_t done = 0; done < size;) {
    size_t len = size - done < sizeof(dirt) ? size - done : sizeof(dirt);
    ssize_t n = pwrite(card_file, dirt, len, at + (off_t)done);
    if (n <= 0) return 0;
    done += (size_t)n;
  }
  return 1;
}

static int is_ours(const cu_allocation_prop *p) {
  cu_allocation_prop plain = {.type = CU_ALLOCATION_TYPE_PINNED,
                              .location = {CU_LOCATION_TYPE_DEVICE, p->location.id}};
  return memcmp(p, &plain, sizeof(plain)) == 0 && fake_is_device(p->location.id);
}

cu_result cuMemGetAllocationGranularity(size_t *out, const cu_allocation_prop *prop, int kind) {
  BEGIN();
  NEED(is_ours(prop) && kind == CU_GRANULARITY_MINIMUM, CU_INVALID_VALUE);
  *out = granularity;
  return fake_end(CU_OK);
}

cu_result cuMemCreate(cu_handle *out, size_t size, const cu_allocation_prop *prop, unsigned long long flags) {
  BEGIN();
  NEED(is_ours(prop) && flags == 0 && size && size % granularity == 0, CU_INVALID_VALUE);
  size_t i = 0;
  while (i < n_memories && memories[i].size) i++;
  if (i == n_memories) {
    memory *grown = realloc(memories, (n_memories + 64) * sizeof(*grown));
    NEED(grown, CU_OUT_OF_MEMORY);
    memories = grown;
    memset(memories + n_memories, 0, 64 * sizeof(*grown));
    n_memories += 64;
  }
  NEED(fake_card_take(prop->location.id, size), CU_OUT_OF_MEMORY);
  memory *m = &memories[i];
  *m = (memory){
      .size = size, .at = take_part(size), .device = prop->location.id, .generation = m->generation + 1};
  held_memories++;
  if (!fill(m->at, size)) {
    m->released = 1;
    end_memory(m);
    return fake_end(CU_OUT_OF_MEMORY);
  }
  *out = (cu_handle)m->generation << 32 | i;
  return fake_end(CU_OK);
}

cu_result cuMemRelease(cu_handle handle) {
  BEGIN();
  memory *m = memory_of(handle);
  NEED(m && !m->released, CU_INVALID_VALUE);
  m->released = 1;
  end_memory(m);
  return fake_end(CU_OK);
}

/* Addresses without memory. */
static int empty(char *p, size_t size) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  return mmap(p, size, PROT_NONE, flags, -1, 0) != MAP_FAILED;
}

cu_result cuMemAddressReserve(cu_ptr *out, size_t size, size_t align, cu_ptr wish, unsigned long long flags) {
  BEGIN();
  NEED(size && size % granularity == 0 && (align & (align - 1)) == 0, CU_INVALID_VALUE);
  NEED(wish == 0 && flags == 0, CU_INVALID_VALUE);
  if (align < granularity) align = granularity;
  NEED(size < SIZE_MAX - align, CU_OUT_OF_MEMORY);
  char *p = mmap(NULL, size + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  NEED(p != MAP_FAILED, CU_OUT_OF_MEMORY);
  size_t lead = (align - (uintptr_t)p % align) % align;
  if (lead) (void)munmap(p, lead);
  if (align - lead) (void)munmap(p + lead + size, align - lead);
  NEED(insert(&reserved, (range){.p = p + lead, .size = size}), CU_OUT_OF_MEMORY);
  *out = (cu_ptr)(uintptr_t)(p + lead);
  return fake_end(CU_OK);
}

cu_result cuMemAddressFree(cu_ptr ptr, size_t size) {
  BEGIN();
  char *p = host(ptr);
  size_t i = after(&reserved, p), inside = after(&mapped, p);
  NEED(i < reserved.n && reserved.r[i].p == p && reserved.r[i].size == size, CU_INVALID_VALUE);
  NEED(inside == mapped.n || mapped.r[inside].p >= p + size, CU_INVALID_VALUE);
  drop(&reserved, i, 1);
  (void)munmap(p, size);
  return fake_end(CU_OK);
}

cu_result cuMemMap(cu_ptr ptr, size_t size, size_t offset, cu_handle handle, unsigned long long flags) {
  BEGIN();
  char *p = host(ptr);
  memory *m = memory_of(handle);
  NEED(m && !m->released && flags == 0 && (uintptr_t)p % granularity == 0, CU_INVALID_VALUE);
  NEED(size <= m->size, CU_INVALID_VALUE);
  NEED(offset == 0 && size == m->size, CU_NOT_SUPPORTED);
  size_t in = after(&reserved, p), i = after(&mapped, p);
  NEED(in < reserved.n && reserved.r[in].p <= p &&
           size <= reserved.r[in].size - (size_t)(p - reserved.r[in].p),
       CU_INVALID_VALUE);
  NEED(i == mapped.n || mapped.r[i].p >= p + size, CU_INVALID_VALUE);
  NEED(mmap(p, size, PROT_NONE, MAP_SHARED | MAP_FIXED, card_file, m->at) != MAP_FAILED, CU_OUT_OF_MEMORY);
  (void)madvise(p, size, MADV_DONTFORK); /* a device's memory is not in a forked child either */
  if (!insert(&mapped, (range){.p = p, .size = size, .handle = handle})) {
    (void)empty(p, size);
    return fake_end(CU_OUT_OF_MEMORY);
  }
  m->mappings++;
  return fake_end(CU_OK);
}

cu_result cuMemSetAccess(cu_ptr ptr, size_t size, const cu_access_desc *desc, size_t count) {
  BEGIN();
  size_t first, n = whole(&mapped, host(ptr), size, &first);
  NEED(n > 0 && count == 1 && desc->flags == CU_ACCESS_READWRITE, CU_INVALID_VALUE);
  NEED(desc->location.type == CU_LOCATION_TYPE_DEVICE && fake_is_device(desc->location.id), CU_INVALID_VALUE);
  NEED(mprotect(host(ptr), size, PROT_READ | PROT_WRITE) == 0, CU_OUT_OF_MEMORY);
  (void)madvise(host(ptr), size, MADV_POPULATE_WRITE); /* faster than a fault a page */
  for (size_t i = first; i < first + n; i++) mapped.r[i].access = 1;
  return fake_end(CU_OK);
}

cu_result cuMemUnmap(cu_ptr ptr, size_t size) {
  BEGIN();
  size_t first, n = whole(&mapped, host(ptr), size, &first);
  NEED(n > 0, CU_INVALID_VALUE);
  NEED(!fake_is_in_use(host(ptr), size), fake_lose());
  NEED(empty(host(ptr), size), CU_OUT_OF_MEMORY);
  for (size_t i = first; i < first + n; i++) {
    memory *m = memory_of(mapped.r[i].handle);
    m->mappings--;
    end_memory(m);
  }
  drop(&mapped, first, n);
  return fake_end(CU_OK);
}

cu_result cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
  BEGIN_IN_CONTEXT();
  fake_card_info(current->device, free_bytes, total);
  return fake_end(CU_OK);
}

/* ---- pinned memory ---- */

cu_result cuMemHostAlloc(void **out, size_t size, unsigned flags) {
  uint64_t ms = fake_number("FAKE_CUDA_SLOW_HOST_MS", 0);
  struct timespec t = {(time_t)(ms / 1000), (long)(ms % 1000) * 1000000};
  if (ms) (void)nanosleep(&t, NULL);
  BEGIN_IN_CONTEXT();
  NEED(size && flags == CU_HOST_ALLOC_PORTABLE, CU_INVALID_VALUE);
  NEED(!fake_number("FAKE_CUDA_NO_PINNED", 0), CU_OUT_OF_MEMORY);
  char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  NEED(p != MAP_FAILED, CU_OUT_OF_MEMORY);
  NEED(insert(&pinned, (range){.p = p, .size = size}), CU_OUT_OF_MEMORY);
  *out = p;
  return fake_end(CU_OK);
}

cu_result cuMemFreeHost(void *p) {
  BEGIN_IN_CONTEXT();
  size_t i = after(&pinned, p);
  NEED(i < pinned.n && pinned.r[i].p == p, CU_INVALID_VALUE);
  NEED(!fake_is_in_use(p, pinned.r[i].size), fake_lose());
  (void)munmap(p, pinned.r[i].size);
  drop(&pinned, i, 1);
  return fake_end(CU_OK);
}
