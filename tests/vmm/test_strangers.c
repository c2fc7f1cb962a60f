/* Memory of the device that no slot of the ledger accounts for. */
#include "support.h"

#include "backend.h"

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
