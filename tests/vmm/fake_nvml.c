/*
 * NVML for the driver that is made of host memory (fake_cuda.c): what it tells of this process is what that
 * driver has given out, and a CUDA context.
 *
 *   FAKE_NVML_BESIDE    bytes that this process holds beside, once it has a CUDA context (0)
 *   FAKE_NVML_OTHERS    how many other processes are listed before it (1)
 *   FAKE_NVML_NO_PID=1  this process is not listed, as in a container with pids of its own
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, NOT_FOUND = 6, TOO_SMALL = 7 };

typedef struct memory {
  unsigned long long total, free, used;
} memory;

typedef struct process {
  unsigned pid;
  unsigned long long used;
  unsigned gpu_instance, compute_instance;
} process;

#define SHOWN __attribute__((visibility("default")))
SHOWN int nvmlInit_v2(void);
SHOWN const char *nvmlErrorString(int r);
SHOWN int nvmlDeviceGetHandleByUUID(const char *uuid, void **device);
SHOWN int nvmlDeviceGetMemoryInfo(void *device, memory *out);
SHOWN int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process *out);

static int started;
static char devices[4]; /* their addresses are handles */

static unsigned long long number(const char *name, unsigned long long without) {
  const char *text = getenv(name);
  return text && *text ? strtoull(text, NULL, 0) : without;
}

/* What this process holds, asked of the driver that it has loaded. */
static unsigned long long held(const void *device) {
  uint64_t (*taken)(int, int *) = NULL;
  void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), *address;
  int retained = 0;
  if (!driver || !(address = dlsym(driver, "fake_cuda_taken"))) return 0;
  memcpy(&taken, &address, sizeof(taken));
  unsigned long long bytes = taken((int)((const char *)device - devices), &retained);
  (void)dlclose(driver);
  return bytes + (retained ? number("FAKE_NVML_BESIDE", 0) : 0);
}

int nvmlInit_v2(void) {
  started = 1;
  return OK;
}

const char *nvmlErrorString(int r) { return r == NOT_FOUND ? "Not Found" : "Unknown Error"; }

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
  unsigned i;
  if (!started) return UNINITIALIZED;
  if (sscanf(uuid, "GPU-%2x", &i) != 1 || strlen(uuid) != 40 || i >= sizeof(devices)) return NOT_FOUND;
  *device = &devices[i];
  return OK;
}

int nvmlDeviceGetMemoryInfo(void *device, memory *out) {
  out->total = 8ull << 30;
  out->used = (1ull << 28) + held(device); /* the others' too */
  out->free = out->total - out->used;
  return OK;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process *out) {
  unsigned others = (unsigned)number("FAKE_NVML_OTHERS", 1), n = others + !number("FAKE_NVML_NO_PID", 0);
  unsigned room = *count;
  *count = n;
  if (n > room) return TOO_SMALL;
  for (unsigned i = 0; i < others; i++) out[i] = (process){.pid = 1, .used = 1ull << 20};
  if (n > others) out[others] = (process){.pid = (unsigned)getpid(), .used = held(device)};
  return OK;
}
