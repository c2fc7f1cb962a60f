/* What both raw tables share: the last error, and runs of handles. */
#include "raw.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static char last_error[256];

const char *raw_error(void) { return last_error; }

int raw_fail(const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  (void)vsnprintf(last_error, sizeof(last_error), fmt, ap);
  va_end(ap);
  return 1;
}

static size_t size_of(const raw_run *run, size_t i) {
  return i + 1 < run->n ? run->unit : run->size - i * run->unit;
}

int raw_run_reserve(raw_device *dev, raw_run *run, size_t size, size_t unit) {
  *run = (raw_run){.size = size, .unit = unit, .n = (size + unit - 1) / unit};
  run->handle = calloc(run->n, sizeof(*run->handle));
  if (!run->handle) return raw_fail("no memory for %zu handles", run->n);
  return dev->ops->reserve(dev, size, &run->base);
}

int raw_run_create(raw_device *dev, raw_run *run) {
  for (size_t i = 0; i < run->n; i++) {
    int err = dev->ops->create(dev, size_of(run, i), &run->handle[i]);
    if (err) return err;
  }
  return 0;
}

int raw_run_map(raw_device *dev, raw_run *run) {
  for (size_t i = 0; i < run->n; i++) {
    int err = dev->ops->map(dev, run->base + i * run->unit, size_of(run, i), run->handle[i]);
    if (err) return err;
  }
  return 0;
}

int raw_run_access(raw_device *dev, raw_run *run) { return dev->ops->access(dev, run->base, run->size); }

int raw_run_zero(raw_device *dev, raw_run *run) {
  int err = dev->ops->zero(dev, run->base, run->size);
  return err ? err : dev->ops->finish(dev);
}

int raw_run_unmap(raw_device *dev, raw_run *run) { return dev->ops->unmap(dev, run->base, run->size); }

int raw_run_destroy(raw_device *dev, raw_run *run) {
  for (size_t i = 0; i < run->n; i++) {
    int err = dev->ops->destroy(dev, run->handle[i]);
    if (err) return err;
  }
  return 0;
}

int raw_run_unreserve(raw_device *dev, raw_run *run) {
  int err = dev->ops->unreserve(dev, run->base, run->size);
  free(run->handle);
  *run = (raw_run){0};
  return err;
}
