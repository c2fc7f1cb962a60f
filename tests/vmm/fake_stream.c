/* The fake driver's streams: what is queued on them is done at once, or (FAKE_CUDA_ASYNC) when it is waited
 * for.
 */
#include "fake_cuda.h"

#include <stdlib.h>
#include <string.h>

typedef struct job { /* a copy to or from the host, or a memset */
  char *device;
  void *to;
  const void *from;
  size_t len;
  unsigned char byte;
} job;

struct cu_stream_object {
  cu_context context;
  job *jobs;
  size_t n, capacity;
  struct cu_stream_object *next;
};

static cu_stream streams;
static size_t n_streams;

size_t fake_streams_held(void) { return n_streams; }

static int meets(const void *a, size_t a_len, const void *b, size_t b_len) {
  return a && (const char *)a < (const char *)b + b_len && (const char *)b < (const char *)a + a_len;
}

int fake_is_in_use(const void *p, size_t size) {
  for (cu_stream s = streams; s; s = s->next)
    for (size_t i = 0; i < s->n; i++) {
      const job *j = &s->jobs[i];
      if (meets(j->device, j->len, p, size) || meets(j->to, j->len, p, size) ||
          meets(j->from, j->len, p, size))
        return 1;
    }
  return 0;
}

static void do_job(const job *j) {
  if (j->to)
    memcpy(j->to, j->device, j->len);
  else if (j->from)
    memcpy(j->device, j->from, j->len);
  else
    memset(j->device, j->byte, j->len);
}

static void run(cu_stream s) {
  for (size_t i = 0; i < s->n; i++) do_job(&s->jobs[i]);
  s->n = 0;
}

static int is_stream(cu_stream stream, cu_context current) {
  for (cu_stream s = streams; s; s = s->next)
    if (s == stream) return s->context == current;
  return 0;
}

static cu_result queue(cu_stream stream, job j) {
  BEGIN_IN_CONTEXT();
  NEED(is_stream(stream, current), CU_INVALID_HANDLE);
  NEED(fake_accessible(j.device, j.len), CU_INVALID_VALUE);
  if (!fake_number("FAKE_CUDA_ASYNC", 0)) {
    do_job(&j);
    return fake_end(CU_OK);
  }
  if (stream->n == stream->capacity) {
    size_t capacity = stream->capacity ? stream->capacity * 2 : 64;
    job *grown = realloc(stream->jobs, capacity * sizeof(*grown));
    NEED(grown, CU_OUT_OF_MEMORY);
    stream->jobs = grown;
    stream->capacity = capacity;
  }
  stream->jobs[stream->n++] = j;
  return fake_end(CU_OK);
}

cu_result cuMemsetD8Async(cu_ptr dst, unsigned char byte, size_t len, cu_stream stream) {
  return queue(stream, (job){.device = (char *)(uintptr_t)dst, .len = len, .byte = byte});
}
cu_result cuMemcpyDtoHAsync_v2(void *dst, cu_ptr src, size_t len, cu_stream stream) {
  return queue(stream, (job){.device = (char *)(uintptr_t)src, .to = dst, .len = len});
}
cu_result cuMemcpyHtoDAsync_v2(cu_ptr dst, const void *src, size_t len, cu_stream stream) {
  return queue(stream, (job){.device = (char *)(uintptr_t)dst, .from = src, .len = len});
}

cu_result cuStreamCreate(cu_stream *out, unsigned flags) {
  BEGIN_IN_CONTEXT();
  NEED(flags == CU_STREAM_NON_BLOCKING, CU_INVALID_VALUE);
  cu_stream s = calloc(1, sizeof(*s));
  NEED(s, CU_OUT_OF_MEMORY);
  s->context = current;
  s->next = streams;
  streams = s;
  n_streams++;
  *out = s;
  return fake_end(CU_OK);
}

cu_result cuStreamDestroy_v2(cu_stream stream) {
  BEGIN_IN_CONTEXT();
  NEED(is_stream(stream, current), CU_INVALID_HANDLE);
  run(stream);
  for (cu_stream *s = &streams; *s; s = &(*s)->next)
    if (*s == stream) {
      *s = stream->next;
      break;
    }
  free(stream->jobs);
  free(stream);
  n_streams--;
  return fake_end(CU_OK);
}

cu_result cuStreamSynchronize(cu_stream stream) {
  BEGIN_IN_CONTEXT();
  NEED(is_stream(stream, current), CU_INVALID_HANDLE);
  run(stream);
  return fake_end(CU_OK);
}

cu_result cuCtxSynchronize(void) {
  BEGIN_IN_CONTEXT();
  for (cu_stream s = streams; s; s = s->next)
    if (s->context == current) run(s);
  return fake_end(CU_OK);
}
