/* Those who only look at a ledger, and memory of the device that no slot of it accounts for. */
#include "support.h"

#include "backend.h"

#include <dlfcn.h>

/* The first of this suite: nothing else has loaded the driver in this process yet. */
TEST_CUDA(strangers, who_looks_at_a_ledger_loads_no_driver) {
  const char *path = scratch("looked-at");
  char name[KVCACHED_PATH_MAX];
  kvcached_ledger_t l;
  kvcached_limit_t limit = {.struct_size = sizeof(limit)};
  size_t n;
  CHECK(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD) == NULL);
  CHECK_OK(kvcached_ledger_default_path("GPU-8f1e4c2a-0b5d-4e3f-9a6b-7c8d9e0f1a2b", name, sizeof(name)));
  CHECK_OK(kvcached_ledger_open(path, &l));
  CHECK_OK(kvcached_ledger_slots(l, NULL, 0, &n));
  CHECK_EQ(n, 0);
  CHECK_OK(kvcached_ledger_set_limit(l, NULL, 1 << 30, 0, &limit));
  CHECK_IS(kvcached_ledger_command(l, 0, KVCACHED_CMD_TRIM, 0, NULL), KVCACHED_E_SLOT);
  kvcached_ledger_close(l);
  CHECK(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD) == NULL);
  kvcached_shutdown(open_in(path, "g", UINT64_MAX)); /* a context does */
  CHECK(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD) != NULL);
}

static void count_warnings(int level, const char *message, void *user) {
  if (level == KVCACHED_LOG_WARN && strstr(message, "no slot")) ++*(int *)user;
}

/* Opens a context and says how often it speaks of strangers meanwhile. */
static int warnings(const char *ledger, uint64_t fixed) {
  int n = 0;
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = ledger;
  o.fixed = fixed;
  o.log = count_warnings;
  o.log_user = &n;
  kvcached_shutdown(open_with(&o));
  return n;
}

TEST_CUDA(strangers, memory_that_no_slot_accounts_for) {
  const char *ledger = scratch("ledger");
  CHECK_EQ(warnings(ledger, 0), 0);

  /* A program that does not use the library. */
  const kvc_backend *backend = kvc_backend_get(KVCACHED_BACKEND_CUDA);
  kvc_device_options options = {0};
  kvc_device *device;
  kvc_handle handle;
  uint64_t available, total;
  CHECK_OK(backend->open(&options, &device));
  CHECK_OK(backend->memory(device, &available, &total));
  size_t size = (total / 20 > 1024 * MIB ? total / 20 : 1024 * MIB) + 256 * MIB;
  size -= size % device->granularity;
  CHECK_OK(backend->create(device, size, &handle));
  CHECK_EQ(warnings(ledger, 0), 1);
  CHECK_EQ(warnings(ledger, size), 0); /* a slot accounts for it */
  CHECK_EQ(warnings("", 0), 0);        /* who has no ledger does not compare */
  CHECK_OK(backend->destroy(device, size, handle));
  backend->close(device);
  CHECK_EQ(warnings(ledger, 0), 0);
}
