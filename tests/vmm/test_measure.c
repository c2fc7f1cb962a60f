/* What the process holds on a GPU beside the pages, by NVML. */
#include "ledger_kit.h"
#include "sleep_kit.h"

enum { BESIDE = 300 }; /* MiB that the fake one says a context takes */

static uint64_t beside(void) { return BESIDE * MIB; }

/* Whether NVML is the fake one: else it is the machine's own. */
static int on_fake(void) { return getenv("FAKE_CUDA_MEMORY") != NULL; }

static void set_nvml(const char *name, const char *value) { CHECK(setenv(name, value, 1) == 0); }

/* Tests after these have none. */
static void end_nvml(void) {
  static const char *names[] = {"FAKE_NVML_BESIDE", "FAKE_NVML_OTHERS", "FAKE_NVML_NO_PID"};
  for (size_t i = 0; i < 3; i++) unsetenv(names[i]);
  if (!on_fake()) unsetenv("KVCACHED_TEST_NVML");
}

static kvcached_ctx_t open_leased(const char *path, uint64_t fixed, int *slot, kvcached_ledger_t *l) {
  kvcached_options_t o;
  test_options(&o);
  if (on_fake())
    set_nvml("FAKE_NVML_BESIDE", "314572800");
  else
    set_nvml("KVCACHED_TEST_NVML", "libnvidia-ml.so.1");
  *l = open_ledger(path);
  CHECK_OK(kvcached_ledger_lease(*l, "g", "m", 0, fixed, UINT64_MAX, slot));
  o.ledger_path = path;
  o.slot = *slot;
  return open_with(&o);
}

TEST_CUDA(measure, a_context_is_charged_as_it_is) {
  const char *path = scratch("charged");
  kvcached_ledger_t l;
  int slot;
  kvcached_ctx_t ctx = open_leased(path, 1 * MIB, &slot, &l);
  kvcached_stats_t s = stats_of(ctx);
  kvcached_slot_t t = slot_in(path, slot);
  CHECK_EQ(t.context_bytes, s.context_bytes);
  CHECK_EQ(t.fixed, s.fixed);
  if (!on_fake()) { /* a container with pids of its own may leave it unknown */
    CHECK(s.context_bytes == 0 || (s.context_bytes > 50 * MIB && s.context_bytes < 4096 * MIB));
    CHECK_EQ(s.fixed, s.context_bytes ? s.context_bytes : 1 * MIB);
  } else {
    CHECK_EQ(s.context_bytes, beside());
    CHECK_EQ(s.fixed, beside()); /* not what the lessor thought */
    /* Pages are not counted twice, nor what a caller says of memory that is measured by now. */
    kvcached_region_t r = reserve(ctx, KVCACHED_KV, 64 * test_page());
    CHECK_OK(kvcached_ensure(r, 0, 64 * test_page()));
    CHECK_OK(kvcached_set_fixed(ctx, beside() + 5 * MIB));
    CHECK_EQ(stats_of(ctx).fixed, beside() + 5 * MIB);
    CHECK_OK(kvcached_set_fixed(ctx, 2 * MIB));
    CHECK_EQ(stats_of(ctx).fixed, beside());
    CHECK_EQ(slot_in(path, slot).charge, beside() + 64 * test_page());
    /* It is looked at again once the context was used and is idle. */
    set_nvml("FAKE_NVML_BESIDE", "335544320");
    set_nvml("FAKE_NVML_OTHERS", "200"); /* a list that does not fit at first */
    sleep_ms(20);
    enter_and_leave(ctx);
    WAIT_FOR(stats_of(ctx).context_bytes == 320 * MIB);
    CHECK_EQ(slot_in(path, slot).context_bytes, 320 * MIB);
    CHECK_EQ(slot_in(path, slot).fixed, 320 * MIB);
    CHECK_EQ(slot_in(path, slot).charge, 320 * MIB + 64 * test_page());
  }
  kvcached_shutdown(ctx);
  CHECK_OK(kvcached_ledger_unlease(l, slot));
  kvcached_ledger_close(l);
  end_nvml();
}

/* Without a lease it is shown, and charged is what the options say. */
TEST_CUDA(measure, without_a_lease_it_is_shown) {
  const char *path = scratch("shown");
  kvcached_options_t o;
  test_options(&o);
  if (on_fake()) set_nvml("FAKE_NVML_BESIDE", "314572800");
  o.ledger_path = path;
  o.fixed = 1 * MIB;
  kvcached_ctx_t ctx = open_with(&o);
  CHECK_EQ(stats_of(ctx).context_bytes, on_fake() ? beside() : 0);
  CHECK_EQ(stats_of(ctx).fixed, 1 * MIB);
  CHECK_EQ(slot_in(path, slot_of_ctx(ctx)).context_bytes, on_fake() ? beside() : 0);
  CHECK_EQ(slot_in(path, slot_of_ctx(ctx)).charge, 1 * MIB);
  kvcached_shutdown(ctx);
  end_nvml();
}

static int said;

static void listen(int level, const char *msg, void *unused) {
  (void)unused;
  if (level == KVCACHED_LOG_DEBUG && strstr(msg, "not measured")) said++;
}

/* A process that NVML knows under another number: what was said before holds. */
TEST_CUDA(measure, what_cannot_be_known) {
  const char *path = scratch("unknown");
  kvcached_options_t o;
  test_options(&o);
  if (on_fake()) set_nvml("FAKE_NVML_NO_PID", "1"); /* else no NVML is asked */
  o.ledger_path = path;
  o.log = listen;
  kvcached_ledger_t l = open_ledger(path);
  CHECK_OK(kvcached_ledger_lease(l, "g", "m", 0, 3 * MIB, UINT64_MAX, &o.slot));
  kvcached_ctx_t ctx = open_with(&o);
  CHECK(strstr(kvcached_last_error(), "NVML") == NULL); /* nothing has failed */
  CHECK_EQ(stats_of(ctx).context_bytes, 0);
  CHECK_EQ(stats_of(ctx).fixed, 3 * MIB);
  CHECK_EQ(said, 1);
  kvcached_shutdown(ctx);
  CHECK_OK(kvcached_ledger_unlease(l, o.slot));
  kvcached_ledger_close(l);
  end_nvml();
}
