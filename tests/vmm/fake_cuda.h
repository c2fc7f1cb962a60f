/* Between the parts of the fake driver: fake_cuda.c says what it is. */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include "cuda_driver.h"

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#pragma GCC visibility push(default)
#define XX(member, symbol, parameters) cu_result symbol parameters;
KVC_CUDA_ENTRIES(XX)
#undef XX
cu_result cuDeviceGetUuid(cu_uuid *uuid, cu_device device);
cu_result cuDeviceGetUuid_v2(cu_uuid *uuid, cu_device device);
/* Not used by the library, but by tests of it. */
cu_result cuCtxCreate_v2(cu_context *out, unsigned flags, cu_device device);
cu_result cuCtxDestroy_v2(cu_context context);
cu_result cuCtxSetCurrent(cu_context context);
/* Of the fake alone: calls since the process began. */
unsigned long fake_cuda_calls(void);
/* Bytes that this process has of a device; *retained: whether it has a primary context there. */
uint64_t fake_cuda_taken(int device, int *retained);
#pragma GCC visibility pop

enum {
  CU_INVALID_CONTEXT = 201,
  CU_OPERATING_SYSTEM = 304,
  CU_INVALID_HANDLE = 400,
  CU_CONTEXT_IS_DESTROYED = 709
};

enum { FAKE_DEVICES = 4 };

struct cu_context_object {
  cu_device device;
  int retained; /* 0: destroyed */
};

/* A number from the environment, read at each use, so that a test may change its mind. */
uint64_t fake_number(const char *name, uint64_t without);

/* ---- every call begins and ends with these: fake_cuda.c ---- */

/* Takes the lock, unless this process is forked from the one that started: that lock may be another
   thread's. */
cu_result fake_begin(void);
cu_result fake_begin_in_context(cu_context *current);
cu_result fake_end(cu_result r);
int fake_is_device(cu_device device);
/* Memory went that work still needed: as on a real device, nothing works any more. */
cu_result fake_lose(void);

#define BEGIN()               \
  cu_result r = fake_begin(); \
  if (r != CU_OK) return fake_end(r)
#define BEGIN_IN_CONTEXT()                       \
  cu_context current;                            \
  cu_result r = fake_begin_in_context(&current); \
  if (r != CU_OK) return fake_end(r)
#define NEED(cond, error) \
  if (!(cond)) return fake_end(error)

/* ---- fake_memory.c ---- */

int fake_memory_start(void);
/* Whether all of [p, p + size) is mapped and has access. */
int fake_accessible(const char *p, size_t size);

/* What is held, for the report at the end. */
typedef struct fake_held {
  size_t handles, reservations, mappings, pinned, streams;
} fake_held;
void fake_memory_held(fake_held *held);

/* ---- fake_stream.c ---- */

/* Whether work that is still queued uses any of [p, p + size), device or host memory. */
int fake_is_in_use(const void *p, size_t size);
size_t fake_streams_held(void);

/* ---- fake_card.c: how much of the cards' memory is taken ---- */

int fake_card_open(const char *path, uint64_t total);
/* 1: the bytes are this process's now. */
int fake_card_take(int device, uint64_t bytes);
void fake_card_give(int device, uint64_t bytes);
uint64_t fake_card_taken(int device);
void fake_card_info(int device, size_t *free_bytes, size_t *total);

#endif
