/* Calls of the backend that fail or dawdle on purpose, and the account of what is held. */
#include "backend.h"
#include "fault.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- schedules ---- */

typedef struct schedule {
  atomic_uint calls, failures;
  atomic_uint countdown; /* calls until one fails; 0: none will */
  atomic_uint again;     /* what the countdown starts from after that */
  atomic_int error;
  atomic_uint delay_ms;
} schedule;

static schedule schedules[FAULT_KINDS + 1];

static const char *const names[FAULT_KINDS + 1] = {
    "open", "reserve", "create", "destroy", "map",        "access",    "unmap",  "zero",
    "read", "write",   "finish", "quiesce", "host_alloc", "host_free", "memory", "any"};

const char *fault_name(fault_kind kind) { return names[kind]; }

static void set(fault_kind kind, unsigned nth, unsigned again, int err) {
  schedule *s = &schedules[kind];
  atomic_store(&s->countdown, 0); /* so that no call meets half of it */
  atomic_store(&s->again, again);
  atomic_store(&s->error, err);
  atomic_store(&s->countdown, nth);
}

void fault_set(fault_kind kind, unsigned nth, int err) { set(kind, nth, 0, err); }
void fault_every(fault_kind kind, unsigned nth, int err) { set(kind, nth, nth, err); }
void fault_delay(fault_kind kind, unsigned ms) { atomic_store(&schedules[kind].delay_ms, ms); }

void fault_clear(void) {
  for (int k = 0; k <= FAULT_KINDS; k++) {
    set((fault_kind)k, 0, 0, KVCACHED_OK);
    fault_delay((fault_kind)k, 0);
  }
}

unsigned fault_calls(fault_kind kind) { return atomic_load(&schedules[kind].calls); }
unsigned fault_failures(fault_kind kind) { return atomic_load(&schedules[kind].failures); }

static int due(schedule *s) {
  atomic_fetch_add(&s->calls, 1);
  unsigned now = atomic_load(&s->countdown);
  while (now > 0)
    if (atomic_compare_exchange_weak(&s->countdown, &now, now > 1 ? now - 1 : atomic_load(&s->again)))
      return now == 1;
  return 0;
}

static void dawdle(unsigned ms) {
  struct timespec t = {ms / 1000, (long)(ms % 1000) * 1000000};
  if (ms) (void)nanosleep(&t, NULL);
}

/* ---- the log ---- */

static _Atomic(fault_call *) call_log;
static atomic_uint log_room, logged;

void fault_log(fault_call *calls, unsigned room) {
  atomic_store(&call_log, NULL); /* so that no call meets the one with the other's room */
  atomic_store(&log_room, room);
  atomic_store(&logged, 0);
  atomic_store(&call_log, calls);
}

unsigned fault_logged(void) { return atomic_load(&logged); }

static void note(fault_kind kind, const kvc_space *space, size_t off, size_t len) {
  fault_call *calls = atomic_load(&call_log);
  if (!calls) return;
  unsigned i = atomic_fetch_add(&logged, 1);
  if (i < atomic_load(&log_room))
    calls[i] = (fault_call){kind, space ? (const char *)space->base + off : NULL, len};
}

/* ---- what happens at a call ---- */

static int fails_at(fault_kind kind, const kvc_space *space, size_t off, size_t len) {
  note(kind, space, off, len);
  dawdle(atomic_load(&schedules[kind].delay_ms));
  dawdle(atomic_load(&schedules[FAULT_ANY].delay_ms));
  schedule *hit = NULL;
  if (due(&schedules[FAULT_ANY])) hit = &schedules[FAULT_ANY];
  if (due(&schedules[kind])) hit = &schedules[kind];
  if (!hit) return KVCACHED_OK;
  atomic_fetch_add(&hit->failures, 1);
  return kvc_fail(atomic_load(&hit->error), "injected failure of %s", names[kind]);
}

static int fails(fault_kind kind) { return fails_at(kind, NULL, 0, 0); }

/* ---- the account ---- */

static struct {
  _Atomic int64_t devices, spaces, reserved, handles, handle_bytes, mapped, host, host_bytes;
} held;

fault_held fault_now(void) {
  return (fault_held){held.devices,      held.spaces, held.reserved, held.handles,
                      held.handle_bytes, held.mapped, held.host,     held.host_bytes};
}

/* A check on the library that does not hold: the test cannot go on. */
static void broken(const char *what) {
  fprintf(stderr, "fault.c: the library broke a rule of backend.h: %s\n", what);
  abort();
}

/* ---- devices: which table a device is of, and who is in its lanes ---- */

enum { DEVICES = 256 };
typedef struct slot {
  _Atomic(kvc_device *) device;
  _Atomic(const kvc_backend *) real;
  atomic_int busy[KVC_LANES];
} slot;
static slot slots[DEVICES];

static slot *slot_of(const kvc_device *device) {
  for (int i = 0; i < DEVICES; i++)
    if (atomic_load(&slots[i].device) == device) return &slots[i];
  broken("a device that is not open");
  return NULL;
}

static const kvc_backend *of(const kvc_device *device) { return atomic_load(&slot_of(device)->real); }

static int open_device(const kvc_backend *real, const kvc_device_options *options, kvc_device **out) {
  *out = NULL;
  int err = fails(FAULT_OPEN);
  if (!err) err = real->open(options, out);
  if (err) return err;
  for (int i = 0; i < DEVICES; i++) {
    kvc_device *none = NULL;
    if (atomic_load(&slots[i].device) || !atomic_compare_exchange_strong(&slots[i].device, &none, *out))
      continue;
    atomic_store(&slots[i].real, real);
    held.devices++;
    return KVCACHED_OK;
  }
  broken("more devices open than fault.c has room for");
  return KVCACHED_E_NOMEM;
}

static void close_device(kvc_device *device) {
  slot *s = slot_of(device);
  const kvc_backend *real = atomic_load(&s->real);
  atomic_store(&s->device, NULL); /* before its address can be another's */
  held.devices--;
  real->close(device);
}

static void lane_enter(kvc_device *device, kvc_lane lane) {
  if (atomic_exchange(&slot_of(device)->busy[lane], 1)) broken("two threads in one lane");
}
static void lane_leave(kvc_device *device, kvc_lane lane) { atomic_store(&slot_of(device)->busy[lane], 0); }

/* ---- the table ---- */

static int reserve(kvc_device *d, size_t size, size_t align, kvc_space *space) {
  int err = fails(FAULT_RESERVE);
  if (!err) err = of(d)->reserve(d, size, align, space);
  if (err) return err;
  held.spaces++;
  held.reserved += (int64_t)size;
  return KVCACHED_OK;
}

static void unreserve(kvc_device *d, kvc_space *space) {
  held.spaces--;
  held.reserved -= (int64_t)space->size;
  of(d)->unreserve(d, space);
}

static int create(kvc_device *d, size_t size, kvc_handle *out) {
  int err = fails(FAULT_CREATE);
  if (!err) err = of(d)->create(d, size, out);
  if (err) return err;
  if (of(d)->pools) held.handles++; /* tokens are not counted, several may become one */
  held.handle_bytes += (int64_t)size;
  return KVCACHED_OK;
}

static int destroy(kvc_device *d, size_t size, kvc_handle handle) {
  int err = fails(FAULT_DESTROY);
  if (!err) err = of(d)->destroy(d, size, handle);
  if (err) return err;
  if (of(d)->pools) held.handles--;
  held.handle_bytes -= (int64_t)size;
  return KVCACHED_OK;
}

static int map(kvc_device *d, kvc_space *space, size_t off, size_t size, kvc_handle handle) {
  int err = fails_at(FAULT_MAP, space, off, size);
  if (!err) err = of(d)->map(d, space, off, size, handle);
  if (!err) held.mapped += (int64_t)size;
  return err;
}

static int give_access(kvc_device *d, kvc_space *space, size_t off, size_t len) {
  int err = fails_at(FAULT_ACCESS, space, off, len);
  return err ? err : of(d)->access(d, space, off, len);
}

static int unmap(kvc_device *d, kvc_space *space, size_t off, size_t len) {
  int err = fails_at(FAULT_UNMAP, space, off, len);
  if (!err) err = of(d)->unmap(d, space, off, len);
  if (err) return err;
  held.mapped -= (int64_t)len;
  if (!of(d)->pools) held.handle_bytes -= (int64_t)len; /* tokens end here */
  return KVCACHED_OK;
}

static int zero(kvc_device *d, kvc_lane lane, kvc_space *space, size_t off, size_t len) {
  lane_enter(d, lane);
  int err = fails_at(FAULT_ZERO, space, off, len);
  if (!err) err = of(d)->zero(d, lane, space, off, len);
  lane_leave(d, lane);
  return err;
}

static int read_from(kvc_device *d, kvc_lane lane, kvc_space *space, size_t off, void *dst, size_t len) {
  lane_enter(d, lane);
  int err = fails_at(FAULT_READ, space, off, len);
  if (!err) err = of(d)->read(d, lane, space, off, dst, len);
  lane_leave(d, lane);
  return err;
}

static int write_to(kvc_device *d, kvc_lane lane, kvc_space *space, size_t off, const void *src, size_t len) {
  lane_enter(d, lane);
  int err = fails_at(FAULT_WRITE, space, off, len);
  if (!err) err = of(d)->write(d, lane, space, off, src, len);
  lane_leave(d, lane);
  return err;
}

static int finish(kvc_device *d, kvc_lane lane) {
  lane_enter(d, lane);
  int err = fails(FAULT_FINISH);
  if (!err) err = of(d)->finish(d, lane);
  lane_leave(d, lane);
  return err;
}

static int quiesce(kvc_device *d) {
  int err = fails(FAULT_QUIESCE);
  return err ? err : of(d)->quiesce(d);
}

static int host_alloc(kvc_device *d, size_t size, void **out, int *pinned) {
  int err = fails(FAULT_HOST_ALLOC);
  if (!err) err = of(d)->host_alloc(d, size, out, pinned);
  if (err) return err;
  held.host++;
  held.host_bytes += (int64_t)size;
  return KVCACHED_OK;
}

static int host_free(kvc_device *d, void *p, size_t size, int pinned) {
  int err = fails(FAULT_HOST_FREE);
  if (!err) err = of(d)->host_free(d, p, size, pinned);
  if (err) return err;
  held.host--;
  held.host_bytes -= (int64_t)size;
  return KVCACHED_OK;
}

static int memory(kvc_device *d, uint64_t *free_bytes, uint64_t *total_bytes) {
  int err = fails(FAULT_MEMORY);
  return err ? err : of(d)->memory(d, free_bytes, total_bytes);
}

static int beside(kvc_device *d, uint64_t *bytes) { return of(d)->beside(d, bytes); }

static int open_host(const kvc_device_options *options, kvc_device **out) {
  return open_device(&kvc_backend_host, options, out);
}
static int open_cuda(const kvc_device_options *options, kvc_device **out) {
  return open_device(&kvc_backend_cuda, options, out);
}

/* The two differ in how they open and in what they say of themselves. */
#define TABLE(text, has_pools, zero_at_first, opener, beside_fn)                                             \
  {                                                                                                          \
    .name = text, .pools = has_pools, .fresh_is_zero = zero_at_first, .open = opener, .close = close_device, \
    .reserve = reserve, .unreserve = unreserve, .create = create, .destroy = destroy, .map = map,            \
    .access = give_access, .unmap = unmap, .zero = zero, .read = read_from, .write = write_to,               \
    .finish = finish, .quiesce = quiesce, .host_alloc = host_alloc, .host_free = host_free,                  \
    .memory = memory, .beside = beside_fn                                                                    \
  }
static const kvc_backend host_table = TABLE("host", 0, 1, open_host, NULL);
static const kvc_backend cuda_table = TABLE("cuda", 1, 0, open_cuda, beside);

const kvc_backend *kvc_test_backend(const kvc_backend *real) {
  const kvc_backend *table = real == &kvc_backend_host ? &host_table : &cuda_table;
  if (table->pools != real->pools || table->fresh_is_zero != real->fresh_is_zero)
    broken("fault.c does not say of a backend what it says of itself");
  return table;
}
