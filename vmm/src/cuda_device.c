/* Opening a CUDA device. */
#include "cuda_device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MIB ((size_t)1 << 20)
#define DEFAULT_PAGE (2 * MIB)
#define DEFAULT_LARGE_PAGE (64 * MIB)
#define LARGE_PAGE_MAX (256 * MIB)
#define CONTEXT_MAX (4096 * MIB) /* more than any context takes */

int kvc_cuda_enter(kvc_cuda_device *d, int *pushed) {
  cu_context current = NULL;
  *pushed = 0;
  if (d->driver->ctx_get_current(&current) == CU_OK && current == d->context) return KVCACHED_OK;
  cu_result r = d->driver->ctx_push(d->context);
  if (r != CU_OK) return kvc_cuda_fail(d->driver, r, "making the context of %s current", d->base.name);
  *pushed = 1;
  return KVCACHED_OK;
}

void kvc_cuda_leave(kvc_cuda_device *d, int pushed) {
  cu_context popped;
  if (pushed) (void)d->driver->ctx_pop(&popped);
}

/* Reads "domain:bus:device.function" or "bus:device.function", all hexadecimal, as the several tools write
   it, and writes it the one way that every driver reads. */
static int normal_pci_id(const char *id, char out[32]) {
  unsigned domain = 0, bus, slot, function;
  int end = -1;
  if (sscanf(id, "%8x:%2x:%2x.%1x%n", &domain, &bus, &slot, &function, &end) != 4 || id[end]) {
    domain = 0;
    end = -1;
    if (sscanf(id, "%2x:%2x.%1x%n", &bus, &slot, &function, &end) != 3 || id[end])
      return kvc_fail(KVCACHED_E_INVAL,
                      "pci_bus_id \"%.40s\": it is written like \"0000:1b:00.0\" (nvidia-smi shows it)", id);
  }
  (void)snprintf(out, 32, "%04x:%02x:%02x.%x", domain, bus, slot, function);
  return KVCACHED_OK;
}

static int find(kvc_cuda_device *d, const kvc_device_options *options) {
  const kvc_cuda_driver *driver = d->driver;
  int count = 0;
  cu_result r = driver->device_get_count(&count);
  if (r != CU_OK) return kvc_cuda_fail(driver, r, "counting CUDA devices");
  if (options->pci_bus_id) {
    char id[32];
    int err = normal_pci_id(options->pci_bus_id, id);
    if (err) return err;
    r = driver->device_get_by_pci_bus_id(&d->number, id);
    if (r == CU_INVALID_VALUE || r == CU_INVALID_DEVICE || r == CU_NO_DEVICE)
      return kvc_fail(KVCACHED_E_UNSUPPORTED,
                      "no CUDA device at PCI bus id %s among the %d that this process sees "
                      "(CUDA_VISIBLE_DEVICES may hide some)",
                      id, count);
    return r == CU_OK ? KVCACHED_OK : kvc_cuda_fail(driver, r, "looking for the CUDA device at %s", id);
  }
  if (options->ordinal < 0)
    return kvc_fail(KVCACHED_E_INVAL, "device %d: CUDA devices are counted from 0", options->ordinal);
  if (options->ordinal >= count)
    return kvc_fail(KVCACHED_E_UNSUPPORTED,
                    "no CUDA device %d: this process sees %d, counted from 0 "
                    "(CUDA_VISIBLE_DEVICES may hide some)",
                    options->ordinal, count);
  r = driver->device_get(&d->number, options->ordinal);
  return r == CU_OK ? KVCACHED_OK : kvc_cuda_fail(driver, r, "CUDA device %d", options->ordinal);
}

static int attribute(kvc_cuda_device *d, int which, int *out) {
  cu_result r = d->driver->device_get_attribute(out, which, d->number);
  return r == CU_OK ? KVCACHED_OK
                    : kvc_cuda_fail(d->driver, r, "asking %s for attribute %d", d->base.name, which);
}

static int describe(kvc_cuda_device *d) {
  const kvc_cuda_driver *driver = d->driver;
  cu_result r = driver->device_get_name(d->base.name, (int)sizeof(d->base.name), d->number);
  if (r != CU_OK) return kvc_cuda_fail(driver, r, "asking for the name of a CUDA device");
  d->base.name[sizeof(d->base.name) - 1] = 0;

  int supported = 0, major = 0;
  int err = attribute(d, CU_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT, &supported);
  if (err) return err;
  if (!supported)
    return kvc_fail(
        KVCACHED_E_UNSUPPORTED,
        "%s has no virtual memory management (attribute %d is 0): the library cannot be used on it",
        d->base.name, CU_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT);
  err = attribute(d, CU_ATTRIBUTE_MAJOR, &major);
  if (err) return err;
  /* Measured without a stall or a fault on Hopper; some older devices are known to fault. */
  d->base.edits_anytime = major >= 9;

  cu_uuid uuid;
  r = driver->device_get_uuid(&uuid, d->number);
  if (r != CU_OK) return kvc_cuda_fail(driver, r, "asking %s for its UUID", d->base.name);
  char *p = d->base.id;
  for (size_t i = 0; i < sizeof(uuid.bytes); i++)
    p += sprintf(p, "%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", uuid.bytes[i]);

  d->prop = (cu_allocation_prop){.type = CU_ALLOCATION_TYPE_PINNED,
                                 .location = {.type = CU_LOCATION_TYPE_DEVICE, .id = d->number}};
  d->access = (cu_access_desc){.location = d->prop.location, .flags = CU_ACCESS_READWRITE};
  size_t granularity = 0;
  r = driver->mem_granularity(&granularity, &d->prop, CU_GRANULARITY_MINIMUM);
  if (r != CU_OK) return kvc_cuda_fail(driver, r, "asking %s for its granularity", d->base.name);
  if (granularity == 0)
    return kvc_fail(KVCACHED_E_DEVICE, "%s: the driver tells a granularity of 0 bytes", d->base.name);
  d->base.granularity = granularity;
  return KVCACHED_OK;
}

static int choose_pages(kvc_cuda_device *d, const kvc_device_options *options) {
  size_t granularity = d->base.granularity;
  size_t page = options->page_size;
  if (page == 0) page = (DEFAULT_PAGE + granularity - 1) / granularity * granularity;
  if (page % granularity != 0)
    return kvc_fail(KVCACHED_E_INVAL, "page_size %zu: %s needs a multiple of its granularity, %zu bytes",
                    page, d->base.name, granularity);
  size_t large = options->large_page;
  if (large == 0) large = page > DEFAULT_LARGE_PAGE ? page : DEFAULT_LARGE_PAGE / page * page;
  if (large % page != 0 || (large > LARGE_PAGE_MAX && large != page))
    return kvc_fail(KVCACHED_E_INVAL,
                    "large_page %zu: it has to be a multiple of page_size (%zu bytes), up to %zu", large,
                    page, LARGE_PAGE_MAX);
  d->base.page_size = page;
  d->base.large_page = large;
  return KVCACHED_OK;
}

kvc_cuda_handles *kvc_cuda_handles_of(const kvc_cuda_device *d) {
  static kvc_cuda_handles handles[64]; /* more devices than any machine has; their numbers are small */
  return &handles[(unsigned)d->number % 64];
}

/* The context, and streams that wait for nobody's work but their own. */
static int start(kvc_cuda_device *d) {
  cu_result r = d->driver->primary_retain(&d->context, d->number);
  if (r != CU_OK) {
    d->context = NULL;
    return kvc_cuda_fail(d->driver, r, "retaining the primary context of %s", d->base.name);
  }
  int pushed;
  int err = kvc_cuda_enter(d, &pushed);
  if (err) return err;
  for (int i = 0; i < KVC_LANES && !err; i++) {
    r = d->driver->stream_create(&d->lane[i], CU_STREAM_NON_BLOCKING);
    if (r == CU_OK) continue;
    d->lane[i] = NULL;
    err = kvc_cuda_fail(d->driver, r, "making a stream on %s", d->base.name);
  }
  kvc_cuda_leave(d, pushed);
  return err;
}

/* The same, with a look at the device's memory before and after. Others' comes and goes in between, so what
   is seen there is used only where NVML cannot tell this process from others. */
static int start_and_look(kvc_cuda_device *d) {
  uint64_t before, after;
  int seen =
      kvc_nvml_open(d->base.id, &d->nvml) == KVCACHED_OK && kvc_nvml_used(&d->nvml, &before) == KVCACHED_OK;
  int err = start(d);
  if (!err && seen && kvc_nvml_used(&d->nvml, &after) == KVCACHED_OK && after > before &&
      after - before <= CONTEXT_MAX)
    d->made = after - before;
  return err;
}

int kvc_cuda_open(const kvc_device_options *options, kvc_device **out) {
  *out = NULL;
  kvc_cuda_device *d = calloc(1, sizeof(*d));
  if (!d) return kvc_fail(KVCACHED_E_NOMEM, "no memory to open a CUDA device");
  int err = kvc_cuda_load(&d->driver);
  if (!err) err = find(d, options);
  if (!err) err = describe(d);
  if (!err) err = choose_pages(d, options);
  if (!err) err = start_and_look(d);
  if (err) {
    kvc_cuda_close(&d->base);
    return err;
  }
  *out = &d->base;
  return KVCACHED_OK;
}

void kvc_cuda_close(kvc_device *device) {
  kvc_cuda_device *d = (kvc_cuda_device *)device;
  int pushed;
  if (!d) return;
  if (d->context) {
    if (kvc_cuda_enter(d, &pushed) == KVCACHED_OK) {
      for (int i = 0; i < KVC_LANES; i++)
        if (d->lane[i]) (void)d->driver->stream_destroy(d->lane[i]);
      kvc_cuda_leave(d, pushed);
    }
    (void)d->driver->primary_release(d->number);
  }
  free(d);
}
