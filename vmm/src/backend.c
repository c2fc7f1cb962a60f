/* The kinds of memory there are. */
#include "backend.h"

const kvc_backend *kvc_backend_get(int backend) {
  const kvc_backend *table = NULL;
  switch (backend) {
    case KVCACHED_BACKEND_HOST: table = &kvc_backend_host; break;
    case KVCACHED_BACKEND_CUDA: table = &kvc_backend_cuda; break;
    default: return NULL;
  }
#ifdef KVCACHED_TEST
  table = kvc_test_backend(table);
#endif
  return table;
}
