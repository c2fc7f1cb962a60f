/*
 * A CUDA driver library made of host memory, for machines without a GPU: the entry points that the library
 * uses, with the rules that the real driver keeps (as measured), and stricter where it forgives. Device
 * memory lies at its device addresses in this process, so that a program can also look at it.
 *
 *   FAKE_CUDA_MEMORY       bytes of each card (8 GiB)
 *   FAKE_CUDA_STATE        a file in which processes share the cards' memory; without it each has its own
 *   FAKE_CUDA_GRANULARITY  bytes (2 MiB)
 *   FAKE_CUDA_DEVICES      how many, 0 to 4 (1); device i is at PCI bus id 0000:(1b + i):00.0
 *   FAKE_CUDA_CAPABILITY   "9.0"
 *   FAKE_CUDA_NO_VMM=1     no virtual memory management
 *   FAKE_CUDA_MISSING      names of entry points, with commas between, that are not to be there
 *   FAKE_CUDA_INIT         what cuInit returns (0)
 *   FAKE_CUDA_ASYNC=1      work on streams is done when it is waited for, not before, and memory that it
 *                         still needs must not go
 *   FAKE_CUDA_SLOW_HOST_MS what each allocation of pinned memory takes
 *   FAKE_CUDA_NO_PINNED=1  there is no pinned memory
 *   FAKE_CUDA_STRICT=1     what is still held when the process exits is told on stderr, and it exits with 99
 */
#include "fake_cuda.h"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pid_t owner; /* the process that called cuInit; 0: none has */
static int n_devices, lost;
static unsigned long calls;
static struct cu_context_object primary[FAKE_DEVICES];
static _Thread_local cu_context stack[16]; /* of current contexts */
static _Thread_local int depth;

uint64_t fake_number(const char *name, uint64_t without) {
  const char *text = getenv(name);
  return text && *text ? strtoull(text, NULL, 0) : without;
}

/* ---- every call begins and ends here ---- */

cu_result fake_begin(void) {
  if (owner != getpid()) return CU_NOT_INITIALIZED;
  (void)pthread_mutex_lock(&mutex);
  calls++;
  return lost ? CU_ILLEGAL_ADDRESS : CU_OK;
}

cu_result fake_end(cu_result r) {
  if (owner == getpid()) (void)pthread_mutex_unlock(&mutex);
  return r;
}

cu_result fake_begin_in_context(cu_context *current) {
  cu_result r = fake_begin();
  *current = depth ? stack[depth - 1] : NULL;
  if (r != CU_OK) return r;
  if (!*current) return CU_INVALID_CONTEXT;
  return (*current)->retained ? CU_OK : CU_CONTEXT_IS_DESTROYED;
}

unsigned long fake_cuda_calls(void) {
  (void)pthread_mutex_lock(&mutex);
  unsigned long n = calls;
  (void)pthread_mutex_unlock(&mutex);
  return n;
}

uint64_t fake_cuda_taken(int device, int *retained) {
  (void)pthread_mutex_lock(&mutex);
  *retained = primary[device].retained > 0;
  uint64_t bytes = fake_card_taken(device);
  (void)pthread_mutex_unlock(&mutex);
  return bytes;
}

int fake_is_device(cu_device device) { return device >= 0 && device < n_devices; }

cu_result fake_lose(void) {
  lost = 1;
  return CU_ILLEGAL_ADDRESS;
}

/* ---- start ---- */

cu_result cuInit(unsigned flags) {
  if (owner && owner != getpid()) return CU_NOT_INITIALIZED;
  (void)pthread_mutex_lock(&mutex);
  cu_result r = (cu_result)fake_number("FAKE_CUDA_INIT", flags ? CU_INVALID_VALUE : CU_OK);
  if (r == CU_OK && !owner) {
    uint64_t n = fake_number("FAKE_CUDA_DEVICES", 1);
    n_devices = n > FAKE_DEVICES ? FAKE_DEVICES : (int)n;
    if (n_devices == 0)
      r = CU_NO_DEVICE;
    else if (fake_memory_start() != 0 ||
             fake_card_open(getenv("FAKE_CUDA_STATE"), fake_number("FAKE_CUDA_MEMORY", (uint64_t)8 << 30)) !=
                 0)
      r = CU_OPERATING_SYSTEM;
    else
      owner = getpid();
  }
  (void)pthread_mutex_unlock(&mutex);
  return r;
}

/* Takes the entry points named by FAKE_CUDA_MISSING out of this library's symbol table. */
__attribute__((constructor)) static void take_away(void) {
  const char *names = getenv("FAKE_CUDA_MISSING");
  Dl_info info;
  if (!names || !dladdr((void *)&owner, &info)) return;
  void *self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  char *copy = strdup(names), *rest = copy;
  for (char *name; self && copy && (name = strsep(&rest, ","));) {
    void *address = dlsym(self, name);
    ElfW(Sym) *symbol = NULL;
    if (!address || !dladdr1(address, &info, (void **)&symbol, RTLD_DL_SYMENT) || !symbol) {
      fprintf(stderr, "fake_cuda: no entry point \"%s\" to take away\n", name);
      _exit(98);
    }
    uintptr_t page = (uintptr_t)symbol & ~(uintptr_t)4095;
    size_t len = (uintptr_t)(symbol + 1) - page; /* an entry may lie across two pages */
    if (mprotect((void *)page, len, PROT_READ | PROT_WRITE) != 0) _exit(98);
    symbol->st_value = 0; /* undefined: the search goes on without it */
    symbol->st_shndx = SHN_UNDEF;
  }
  free(copy);
  if (self) (void)dlclose(self);
}

__attribute__((destructor)) static void check_leaks(void) {
  if (owner != getpid() || fake_number("FAKE_CUDA_STRICT", 0) == 0) return;
  int retained = 0;
  for (int i = 0; i < FAKE_DEVICES; i++) retained += primary[i].retained;
  fake_held held;
  fake_memory_held(&held);
  held.streams = fake_streams_held();
  if (!held.handles && !held.reservations && !held.mappings && !held.pinned && !held.streams && !retained &&
      !lost)
    return;
  fprintf(stderr,
          "fake_cuda: process %d ends with %zu handles, %zu reservations, %zu mappings, %zu pieces of pinned "
          "memory, %zu streams, %d retained contexts%s\n",
          (int)getpid(), held.handles, held.reservations, held.mappings, held.pinned, held.streams, retained,
          lost ? "; memory went that work still needed" : "");
  (void)fflush(NULL);
  _exit(99);
}

/* ---- errors ---- */

static const struct {
  cu_result r;
  const char *name, *text;
} errors[] = {{CU_OK, "CUDA_SUCCESS", "no error"},
              {CU_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
              {CU_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
              {CU_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
              {CU_STUB_LIBRARY, "CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library"},
              {CU_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
              {CU_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
              {CU_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
              {CU_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
              {CU_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
              {CU_CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
              {CU_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}};

static cu_result describe(cu_result of, const char **name, const char **text) {
  for (size_t i = 0; i < sizeof(errors) / sizeof(*errors); i++) {
    if (errors[i].r != of) continue;
    if (name) *name = errors[i].name;
    if (text) *text = errors[i].text;
    return CU_OK;
  }
  return CU_INVALID_VALUE;
}
cu_result cuGetErrorName(cu_result of, const char **out) { return describe(of, out, NULL); }
cu_result cuGetErrorString(cu_result of, const char **out) { return describe(of, NULL, out); }

/* ---- devices ---- */

cu_result cuDeviceGetCount(int *count) {
  BEGIN();
  *count = n_devices;
  return fake_end(CU_OK);
}

cu_result cuDeviceGet(cu_device *device, int ordinal) {
  BEGIN();
  NEED(fake_is_device(ordinal), CU_INVALID_DEVICE);
  *device = ordinal;
  return fake_end(CU_OK);
}

cu_result cuDeviceGetByPCIBusId(cu_device *device, const char *id) {
  BEGIN();
  unsigned domain, bus, slot;
  int length = -1;
  (void)sscanf(id, "%4x:%2x:%2x.0%n", &domain, &bus, &slot, &length);
  NEED(length == 12 && !id[length], CU_INVALID_VALUE);
  NEED(domain == 0 && slot == 0 && bus >= 0x1b && fake_is_device((int)bus - 0x1b), CU_INVALID_DEVICE);
  *device = (int)bus - 0x1b;
  return fake_end(CU_OK);
}

cu_result cuDeviceGetName(char *name, int size, cu_device device) {
  BEGIN();
  NEED(fake_is_device(device), CU_INVALID_DEVICE);
  (void)snprintf(name, (size_t)size, "Fake GPU %d", device);
  return fake_end(CU_OK);
}

cu_result cuDeviceGetAttribute(int *out, int attribute, cu_device device) {
  BEGIN();
  NEED(fake_is_device(device), CU_INVALID_DEVICE);
  const char *capability = getenv("FAKE_CUDA_CAPABILITY");
  int major = 9, minor = 0;
  if (capability) (void)sscanf(capability, "%d.%d", &major, &minor);
  switch (attribute) {
    case CU_ATTRIBUTE_MAJOR: *out = major; break;
    case CU_ATTRIBUTE_MINOR: *out = minor; break;
    case CU_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT: *out = !fake_number("FAKE_CUDA_NO_VMM", 0); break;
    default: return fake_end(CU_INVALID_VALUE);
  }
  return fake_end(CU_OK);
}

/* The older one does not tell MIG instances apart: here it says so by another last byte. */
static cu_result uuid_of(cu_uuid *uuid, cu_device device, unsigned char last) {
  BEGIN();
  NEED(fake_is_device(device), CU_INVALID_DEVICE);
  for (size_t i = 0; i < 16; i++) uuid->bytes[i] = (unsigned char)(0xf0 + 0x11 * i);
  uuid->bytes[0] = (unsigned char)device;
  uuid->bytes[15] = last;
  return fake_end(CU_OK);
}
cu_result cuDeviceGetUuid(cu_uuid *uuid, cu_device device) { return uuid_of(uuid, device, 1); }
cu_result cuDeviceGetUuid_v2(cu_uuid *uuid, cu_device device) { return uuid_of(uuid, device, 2); }

/* ---- contexts ---- */

cu_result cuDevicePrimaryCtxRetain(cu_context *out, cu_device device) {
  BEGIN();
  NEED(fake_is_device(device), CU_INVALID_DEVICE);
  primary[device].device = device;
  primary[device].retained++;
  *out = &primary[device];
  return fake_end(CU_OK);
}

cu_result cuDevicePrimaryCtxRelease_v2(cu_device device) {
  BEGIN();
  NEED(fake_is_device(device) && primary[device].retained > 0, CU_INVALID_CONTEXT);
  primary[device].retained--;
  return fake_end(CU_OK);
}

cu_result cuCtxCreate_v2(cu_context *out, unsigned flags, cu_device device) {
  BEGIN();
  NEED(fake_is_device(device), CU_INVALID_DEVICE);
  NEED(flags == 0 && depth < 16, CU_INVALID_VALUE);
  cu_context made = calloc(1, sizeof(*made));
  NEED(made, CU_OUT_OF_MEMORY);
  *made = (struct cu_context_object){device, 1};
  *out = stack[depth++] = made;
  return fake_end(CU_OK);
}

cu_result cuCtxDestroy_v2(cu_context context) {
  BEGIN();
  if (depth && stack[depth - 1] == context) depth--;
  free(context);
  return fake_end(CU_OK);
}

cu_result cuCtxGetCurrent(cu_context *out) {
  BEGIN();
  *out = depth ? stack[depth - 1] : NULL;
  return fake_end(CU_OK);
}

cu_result cuCtxSetCurrent(cu_context context) {
  BEGIN();
  if (depth) depth--;
  if (context) stack[depth++] = context;
  return fake_end(CU_OK);
}

cu_result cuCtxPushCurrent_v2(cu_context context) {
  BEGIN();
  NEED(context && context->retained, CU_INVALID_CONTEXT);
  NEED(depth < 16, CU_INVALID_VALUE);
  stack[depth++] = context;
  return fake_end(CU_OK);
}

cu_result cuCtxPopCurrent_v2(cu_context *out) {
  BEGIN();
  NEED(depth, CU_INVALID_CONTEXT);
  *out = stack[--depth];
  return fake_end(CU_OK);
}
