/*
 * NVML, the library of nvidia-smi. The CUDA driver says how much of a device is free for all; only NVML says
 * what one process holds of it, its CUDA context and what other allocators of the process took included.
 */
#include "cuda_nvml.h"

#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { NVML_SUCCESS = 0, NVML_INSUFFICIENT_SIZE = 7 };

typedef struct nvml_memory {
  unsigned long long total, free, used;
} nvml_memory;

typedef struct nvml_process {
  unsigned pid;
  unsigned long long used; /* all bits set: not told */
  unsigned gpu_instance, compute_instance;
} nvml_process;

struct kvc_nvml {
  int (*init)(void);
  const char *(*error)(int);
  int (*by_uuid)(const char *uuid, void **device);
  int (*memory)(void *device, nvml_memory *out);
  int (*processes)(void *device, unsigned *count, nvml_process *out);
};

static const char *library_name(void) {
#ifdef KVCACHED_TEST
  return getenv("KVCACHED_TEST_NVML"); /* tests of charges have none, whatever the machine has */
#else
  return KVC_NVML_LIBRARY;
#endif
}

/* C has no cast from the one pointer to the other. */
static int resolve(void *library, const char *symbol, void *member) {
  void *address = dlsym(library, symbol);
  if (address) memcpy(member, &address, sizeof(address));
  return address != NULL;
}

static int nvml_fail(const kvc_nvml *n, int r, const char *what) {
  const char *text = n->error(r);
  return kvc_fail(KVCACHED_E_DEVICE, "%s: NVML says %s (%d)", what, text ? text : "nothing", r);
}

static int load(kvc_nvml *n) {
  const char *name = library_name();
  void *library = name ? dlopen(name, RTLD_NOW | RTLD_LOCAL) : NULL;
  if (!library) {
    const char *why = name ? dlerror() : NULL;
    return kvc_fail(KVCACHED_E_UNSUPPORTED, "no NVML: %s", why ? why : KVC_NVML_LIBRARY " is not there");
  }
  if (!resolve(library, "nvmlInit_v2", &n->init) || !resolve(library, "nvmlErrorString", &n->error) ||
      !resolve(library, "nvmlDeviceGetHandleByUUID", &n->by_uuid) ||
      !resolve(library, "nvmlDeviceGetMemoryInfo", &n->memory) ||
      (!resolve(library, "nvmlDeviceGetComputeRunningProcesses_v3", &n->processes) &&
       !resolve(library, "nvmlDeviceGetComputeRunningProcesses_v2", &n->processes))) {
    (void)dlclose(library);
    return kvc_fail(KVCACHED_E_UNSUPPORTED, "%s lacks entry points: an older driver", name);
  }
  /* From here on it stays. */
  int r = n->init();
  return r == NVML_SUCCESS ? KVCACHED_OK : nvml_fail(n, r, "starting NVML");
}

/* As kvc_cuda_load: no lock that a fork could leave locked. */
static int get(const kvc_nvml **out) {
  static _Atomic(kvc_nvml *) loaded;
  kvc_nvml *n = atomic_load(&loaded);
  *out = n;
  if (n) return KVCACHED_OK;
  n = calloc(1, sizeof(*n));
  if (!n) return kvc_fail(KVCACHED_E_NOMEM, "no memory for NVML's table");
  int err = load(n);
  if (!err) {
    kvc_nvml *other = NULL;
    if (atomic_compare_exchange_strong(&loaded, &other, n)) {
      *out = n;
      return KVCACHED_OK;
    }
    *out = other;
  }
  free(n);
  return err;
}

int kvc_nvml_open(const char *id, kvc_nvml_device *out) {
  *out = (kvc_nvml_device){0};
  const kvc_nvml *n;
  int err = get(&n);
  if (err) return err;
  char uuid[80];
  void *handle = NULL;
  (void)snprintf(uuid, sizeof(uuid), "GPU-%.64s", id);
  int r = n->by_uuid(uuid, &handle);
  if (r != NVML_SUCCESS) {
    (void)memcpy(uuid, "MIG", 3);
    if (n->by_uuid(uuid, &handle) != NVML_SUCCESS) return nvml_fail(n, r, "looking for the device in NVML");
  }
  *out = (kvc_nvml_device){n, handle};
  return KVCACHED_OK;
}

int kvc_nvml_used(const kvc_nvml_device *d, uint64_t *bytes) {
  nvml_memory m = {0};
  int r = d->nvml->memory(d->handle, &m);
  if (r != NVML_SUCCESS) return nvml_fail(d->nvml, r, "asking NVML for the device's memory");
  *bytes = m.used;
  return KVCACHED_OK;
}

/* Sums what is told of this process; *known: something was. */
static int sum(const nvml_process *list, unsigned n, uint64_t *bytes) {
  int known = 0;
  *bytes = 0;
  for (unsigned i = 0; i < n; i++) {
    if (list[i].pid != (unsigned)getpid() || list[i].used == UINT64_MAX) continue;
    *bytes += list[i].used;
    known = 1;
  }
  return known;
}

int kvc_nvml_used_here(const kvc_nvml_device *d, uint64_t *bytes) {
  unsigned room = 32;
  /* Processes come and go between two calls. */
  for (int tries = 0; tries < 8; tries++) {
    nvml_process *list = calloc(room, sizeof(*list));
    if (!list) return kvc_fail(KVCACHED_E_NOMEM, "no memory for a list of %u processes", room);
    unsigned n = room;
    int r = d->nvml->processes(d->handle, &n, list), known = 0;
    if (r == NVML_SUCCESS) known = sum(list, n < room ? n : room, bytes);
    free(list);
    if (known) return KVCACHED_OK;
    if (r == NVML_SUCCESS)
      return kvc_fail(KVCACHED_E_UNSUPPORTED, "NVML does not know this process among %u: its pids are others",
                      n);
    if (r != NVML_INSUFFICIENT_SIZE) return nvml_fail(d->nvml, r, "asking NVML for the device's processes");
    room = (n > room ? n : room) + 32;
  }
  return kvc_fail(KVCACHED_E_DEVICE, "NVML's list of processes grows faster than it can be read");
}
