/* Loading the CUDA driver, and its errors in the library's words. */
#include "cuda_driver.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
  const char *symbol;
  size_t offset;
} entries[] = {
#define XX(member, symbol, parameters) {#symbol, offsetof(kvc_cuda_driver, member)},
    KVC_CUDA_ENTRIES(XX)
#undef XX
};

/* Puts a symbol's address into a member of the table; C has no cast from the one pointer to the other. */
static int resolve(void *library, const char *symbol, kvc_cuda_driver *driver, size_t offset) {
  void *address = dlsym(library, symbol);
  if (!address) return 0;
  _Static_assert(sizeof(driver->init) == sizeof(address), "functions and data have addresses of one size");
  memcpy((char *)driver + offset, &address, sizeof(address));
  return 1;
}

/* Fills the table; what is missing is told in full, so that nobody has to find out one by one. */
static int resolve_all(void *library, kvc_cuda_driver *driver) {
  char missing[800] = "";
  size_t used = 0, n = 0;
  for (size_t i = 0; i <= sizeof(entries) / sizeof(*entries); i++) {
    const char *symbol;
    if (i < sizeof(entries) / sizeof(*entries)) {
      symbol = entries[i].symbol;
      if (resolve(library, symbol, driver, entries[i].offset)) continue;
    } else {
      symbol = "cuDeviceGetUuid";
      size_t offset = offsetof(kvc_cuda_driver, device_get_uuid);
      if (resolve(library, "cuDeviceGetUuid_v2", driver, offset) || resolve(library, symbol, driver, offset))
        continue;
    }
    int len = snprintf(missing + used, sizeof(missing) - used, "%s%s", n ? ", " : "", symbol);
    if (len > 0 && (size_t)len < sizeof(missing) - used) used += (size_t)len;
    n++;
  }
  if (n == 0) return KVCACHED_OK;
  return kvc_fail(KVCACHED_E_UNSUPPORTED,
                  "the driver library " KVC_CUDA_LIBRARY
                  " lacks entry points, %zu in all: %s; a driver of CUDA 11.0 or newer has them",
                  n, missing);
}

static int load(kvc_cuda_driver *driver) {
  void *library = dlopen(KVC_CUDA_LIBRARY, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char *why = dlerror();
    return kvc_fail(KVCACHED_E_UNSUPPORTED, "no CUDA driver: %s; it comes with the GPU's kernel driver",
                    why ? why : "cannot load " KVC_CUDA_LIBRARY);
  }
  int err = resolve_all(library, driver);
  if (err) {
    (void)dlclose(library);
    return err;
  }
  /* From here on it stays: a driver that has begun to work is not made to be unloaded. */
  cu_result r = driver->init(0);
  return r == CU_OK ? KVCACHED_OK : kvc_cuda_fail(driver, r, "initialising the CUDA driver");
}

int kvc_cuda_load(const kvc_cuda_driver **out) {
  static _Atomic(kvc_cuda_driver *) loaded;
  kvc_cuda_driver *driver = atomic_load(&loaded);
  *out = driver;
  if (driver) return KVCACHED_OK;

  /* Threads that meet here each load it, which the system counts, and the first to be ready wins: no lock
     that a fork could leave locked, and a failure is told to each caller and tried again next time. */
  driver = calloc(1, sizeof(*driver));
  if (!driver)
    return kvc_fail(KVCACHED_E_NOMEM, "no memory for the CUDA driver's %zu bytes of table", sizeof(*driver));
  int err = load(driver);
  if (!err) {
    kvc_cuda_driver *other = NULL;
    if (atomic_compare_exchange_strong(&loaded, &other, driver)) {
      *out = driver;
      return KVCACHED_OK;
    }
    *out = other;
  }
  free(driver);
  return err;
}

/* ---- errors ---- */

static int library_error(cu_result result) {
  switch (result) {
    case CU_OUT_OF_MEMORY: return KVCACHED_E_NOMEM;
    case CU_NOT_SUPPORTED:
    case CU_STUB_LIBRARY:
    case CU_NO_DEVICE:
    case CU_INVALID_DEVICE:
    case CU_SYSTEM_DRIVER_MISMATCH:
    case CU_COMPAT_NOT_SUPPORTED_ON_DEVICE: return KVCACHED_E_UNSUPPORTED;
    default: return KVCACHED_E_DEVICE;
  }
}

static const char *advice(cu_result result) {
  if (result == CU_OUT_OF_MEMORY) return "; memory has to be freed on the device, or less asked for";
  if (result == CU_NOT_INITIALIZED) return "; after a fork CUDA works only once the process has called exec";
  if (result == CU_STUB_LIBRARY) return "; the toolkit's stub was found in place of the driver";
  if (result == CU_SYSTEM_DRIVER_MISMATCH) return "; library and kernel driver have to be of one version";
  /* Faults of work on the device: the CUDA context is lost, whosever it was. */
  if (result == CU_ECC_UNCORRECTABLE || (result >= CU_ILLEGAL_ADDRESS && result <= CU_LAUNCH_FAILED))
    return "; the process's work on this device is lost, it has to be started anew";
  return "";
}

int kvc_cuda_fail(const kvc_cuda_driver *driver, cu_result result, const char *fmt, ...) {
  char what[256];
  va_list ap;
  va_start(ap, fmt);
  (void)vsnprintf(what, sizeof(what), fmt, ap);
  va_end(ap);
  const char *name = NULL, *text = NULL;
  if (driver->get_error_name(result, &name) != CU_OK || !name) name = "an error unknown to the driver";
  if (driver->get_error_string(result, &text) != CU_OK || !text) text = "no description";
  return kvc_fail(library_error(result), "%s: %s (%d): %s%s", what, name, result, text, advice(result));
}
