/* Error names and sentences, and the thread's last error. */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static _Thread_local char last_error[1024];

uint32_t kvcached_abi_version(void) { return KVCACHED_ABI_VERSION; }

const char *kvcached_version(void) { return KVCACHED_VERSION; }

const char *kvcached_strerror(int err) {
  switch (err) {
#define XX(name, value, text) \
  case KVCACHED_##name: return text;
    KVCACHED_ERROR_MAP(XX)
#undef XX
    default: return "not an error of this library";
  }
}

const char *kvcached_err_name(int err) {
  switch (err) {
#define XX(name, value, text) \
  case KVCACHED_##name: return "KVCACHED_" #name;
    KVCACHED_ERROR_MAP(XX)
#undef XX
    default: return "KVCACHED_E_UNKNOWN";
  }
}

const char *kvcached_last_error(void) { return last_error; }

int kvc_fail(int err, const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  (void)vsnprintf(last_error, sizeof(last_error), fmt, ap);
  va_end(ap);
  return err;
}

int kvc_fail_errno(int err, int errnum, const char *fmt, ...) {
  char reason[96];
  va_list ap;
  va_start(ap, fmt);
  int n = vsnprintf(last_error, sizeof(last_error), fmt, ap);
  va_end(ap);
  if (n >= 0 && (size_t)n < sizeof(last_error)) {
    /* the GNU strerror_r: it may return its own string rather than fill the buffer */
    const char *text = strerror_r(errnum, reason, sizeof(reason));
    (void)snprintf(last_error + n, sizeof(last_error) - (size_t)n, ": %s", text);
  }
  return err;
}

int kvc_fail_forked(long owner) {
  return kvc_fail(KVCACHED_E_FORKED, "opened by process %ld, used in its forked child %ld", owner,
                  (long)getpid());
}
