/* Regions on host memory: states, content and limits, and that the system's own figures agree. */
#include "support.h"

#include <string.h>

static void test_names(void) {
  CHECK_EQ(kvcached_abi_version(), KVCACHED_ABI_VERSION);
  CHECK(strcmp(kvcached_version(), KVCACHED_VERSION) == 0);
  CHECK(strcmp(kvcached_err_name(KVCACHED_E_LIMIT), "KVCACHED_E_LIMIT") == 0);
  CHECK(strcmp(kvcached_err_name(-99), "KVCACHED_E_UNKNOWN") == 0);
#define XX(name, value, text) CHECK(strcmp(kvcached_strerror(KVCACHED_##name), text) == 0);
  KVCACHED_ERROR_MAP(XX)
#undef XX
  CHECK(*kvcached_strerror(-99));
}

static void test_bad_arguments(void) {
  kvcached_options_t o;
  kvcached_ctx_t ctx = (kvcached_ctx_t)1;
  kvcached_options_init(&o);
  o.ledger_path = "";
  CHECK_IS(kvcached_open(NULL, &ctx), KVCACHED_E_INVAL);
  CHECK(ctx == NULL);
  CHECK_IS(kvcached_open(&o, NULL), KVCACHED_E_INVAL);
  o.page_size = 8192;
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_INVAL);
  CHECK_DETAIL("page_size 8192");
  o.page_size = 0;
  o.backend = 7;
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_UNSUPPORTED);
  o.backend = KVCACHED_BACKEND_HOST;
  o.slot = 3;
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_INVAL);
  o.slot = -2;
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_INVAL);
  o.slot = -1;
  o.struct_size = 0;
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_INVAL);
  o.struct_size = sizeof(o);
  o.limit = 10;
  o.fixed = 11;
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_LIMIT);

  /* a newer caller's longer options: good while the unknown part is empty */
  struct {
    kvcached_options_t known;
    uint64_t unknown;
  } longer;
  memset(&longer, 0, sizeof(longer));
  kvcached_options_init(&longer.known);
  longer.known.ledger_path = "";
  longer.known.struct_size = sizeof(longer);
  CHECK_OK(kvcached_open(&longer.known, &ctx));
  kvcached_shutdown(ctx);
  longer.unknown = 1;
  CHECK_IS(kvcached_open(&longer.known, &ctx), KVCACHED_E_INVAL);
  /* an older caller's shorter ones: the rest has its defaults, whatever lies behind them */
  kvcached_options_init(&o);
  o.limit = 1;
  o.ledger_path = "/nonexistent/ledger";
  o.struct_size = offsetof(kvcached_options_t, limit);
  o.page_size = 12345;
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_INVAL);

  ctx = open_alone(0, UINT64_MAX);
  kvcached_region_t r;
  CHECK_IS(kvcached_reserve(ctx, 0, &r), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_reserve(NULL, 1, &r), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_reserve(ctx, SIZE_MAX, &r), KVCACHED_E_NOMEM);
  CHECK_IS(kvcached_reserve(ctx, SIZE_MAX / 2, &r), KVCACHED_E_NOMEM);
  CHECK(r == NULL);
  CHECK_OK(kvcached_reserve(ctx, 10000, &r));
  CHECK_EQ(kvcached_region_size(r), 12288);
  CHECK_EQ((uintptr_t)kvcached_region_base(r) % 4096, 0);
  CHECK_IS(kvcached_ensure(r, 0, 12289), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ensure(r, 12289, 0), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ensure(r, 2, SIZE_MAX), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_release(r, 4096, 8193), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ensure(NULL, 0, 1), KVCACHED_E_INVAL);
  CHECK_OK(kvcached_ensure(r, 12288, 0));
  CHECK_OK(kvcached_release(r, 0, 0));
  size_t run;
  int ensured;
  CHECK_IS(kvcached_mapped_run(r, 0, 12289, &run, &ensured), KVCACHED_E_INVAL);
  CHECK_OK(kvcached_mapped_run(r, 5, 0, &run, &ensured));
  CHECK_EQ(run, 0);
  kvcached_stats_t s = {.struct_size = 0};
  CHECK_IS(kvcached_stats(ctx, &s), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_trim(NULL, 0, NULL), KVCACHED_E_INVAL);
  CHECK_EQ(stats_of(ctx).mapped, 0);
  kvcached_shutdown(ctx);
  kvcached_shutdown(NULL);
  kvcached_unreserve(NULL);
  kvcached_ledger_close(NULL);
}

static void states_of(size_t page) {
  kvcached_ctx_t ctx = open_alone(page, UINT64_MAX);
  kvcached_region_t r;
  CHECK_EQ(kvcached_page_size(ctx), page);
  CHECK_OK(kvcached_reserve(ctx, 16 * page, &r));
  char *base = kvcached_region_base(r);
  CHECK_EQ((uintptr_t)base % page, 0);
  check_region(r);
  CHECK(!accessible(base) && !accessible(base + 16 * page - 1) && !accessible(base + 16 * page));

  CHECK_OK(kvcached_ensure(r, 2 * page + 5, page)); /* touches pages 2 and 3 */
  check_region(r);
  CHECK_EQ(stats_of(ctx).mapped, 2 * page);
  CHECK(all_bytes(base + 2 * page, 2 * page, 0));
  CHECK(!accessible(base + 2 * page - 1) && !accessible(base + 4 * page));
  memset(base + 2 * page, 'a', 2 * page);

  CHECK_OK(kvcached_ensure(r, 0, 6 * page)); /* ensured ones keep their content */
  CHECK(all_bytes(base + 2 * page, 2 * page, 'a') && all_bytes(base, 2 * page, 0) &&
        all_bytes(base + 4 * page, 2 * page, 0));
  memset(base, 'b', 6 * page);
  check_region(r);

  CHECK_OK(kvcached_release(r, 1, 3 * page - 1)); /* whole pages inside: 1 and 2 */
  kvcached_stats_t s = stats_of(ctx);
  CHECK_EQ(s.mapped, 6 * page);
  CHECK_EQ(s.idle, 2 * page);
  check_region(r);
  size_t run;
  int ensured;
  CHECK_OK(kvcached_mapped_run(r, 7, 16 * page - 7, &run, &ensured));
  CHECK(ensured && run == page - 7);
  CHECK_OK(kvcached_mapped_run(r, page, 2 * page - 9, &run, &ensured));
  CHECK(!ensured && run == 2 * page - 9);
  CHECK_OK(kvcached_mapped_run(r, 3 * page, 13 * page, &run, &ensured));
  CHECK(ensured && run == 3 * page);
  CHECK_OK(kvcached_mapped_run(r, 6 * page, 10 * page, &run, &ensured));
  CHECK(!ensured && run == 10 * page);

  CHECK_OK(kvcached_ensure(r, page, page)); /* recycled: zero, the others untouched */
  CHECK(all_bytes(base, page, 'b') && all_bytes(base + page, page, 0) &&
        all_bytes(base + 3 * page, 3 * page, 'b'));
  CHECK_EQ(stats_of(ctx).idle, page);
  memset(base + page, 'c', page);

  CHECK_OK(kvcached_release(r, 0, 16 * page));
  CHECK_OK(kvcached_release(r, 0, 16 * page)); /* again: nothing to do */
  CHECK_EQ(stats_of(ctx).idle, 6 * page);
  size_t freed = 77;
  CHECK_OK(kvcached_trim(ctx, 4 * page + 1, &freed));
  CHECK_EQ(freed, 2 * page);
  check_region(r);
  CHECK(accessible(base + 3 * page) && !accessible(base + 4 * page)); /* highest first */
  CHECK_OK(kvcached_trim(ctx, 4 * page, &freed));
  CHECK_EQ(freed, 0);
  CHECK_OK(kvcached_trim(ctx, 0, NULL));
  CHECK_EQ(stats_of(ctx).mapped, 0);
  CHECK_EQ(resident(base, 16 * page), 0);
  CHECK(!accessible(base));

  CHECK_OK(kvcached_ensure(r, 0, 16 * page)); /* trimmed pages come back as zero */
  CHECK(all_bytes(base, 16 * page, 0));
  CHECK_EQ(mappings(base, 16 * page), 1);
  check_region(r);
  s = stats_of(ctx);
  CHECK_EQ(s.reserved, 16 * page);
  CHECK_EQ(s.ensures, 4);
  CHECK_EQ(s.releases, 2);
  CHECK_EQ(s.trims, 2);
  CHECK_EQ(s.group_charge, s.mapped);
  kvcached_unreserve(r);
  s = stats_of(ctx);
  CHECK(s.reserved == 0 && s.mapped == 0 && s.group_charge == 0 && s.ensures == 4);
  CHECK(!accessible(base));
  kvcached_shutdown(ctx);
}

static void test_states_small_pages(void) { states_of(4 * KIB); }
static void test_states_big_pages(void) { states_of(2 * MIB); }

/* Regions side by side must stay apart in smaps, and end with the context. */
static void test_neighbours(void) {
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  kvcached_region_t r[20];
  for (int i = 0; i < 20; i++) {
    CHECK_OK(kvcached_reserve(ctx, (size_t)(i + 1) * 4096, &r[i]));
    CHECK_OK(kvcached_ensure(r[i], 0, kvcached_region_size(r[i])));
  }
  for (int i = 0; i < 20; i++) {
    check_region(r[i]);
    CHECK(!accessible((char *)kvcached_region_base(r[i]) +
                      kvcached_region_size(r[i]))); /* the next one does not begin here */
  }
  for (int i = 0; i < 20; i += 2) kvcached_unreserve(r[i]);
  for (int i = 1; i < 20; i += 2) check_region(r[i]);
  CHECK_EQ(stats_of(ctx).mapped, 110 * 4096);
  void *last = kvcached_region_base(r[19]);
  kvcached_shutdown(ctx);
  CHECK(!accessible(last));
}

/* Random calls, with a model of what each page must hold. */
static void test_random_calls(void) {
  enum { PAGES = 96, REGIONS = 3 };
  const size_t page = 4096, limit = 150 * page;
  kvcached_ctx_t ctx = open_alone(page, limit);
  kvcached_region_t r[REGIONS];
  uint8_t tag[REGIONS][PAGES] = {{0}}; /* content of an ensured page */
  int state[REGIONS][PAGES] = {{0}};   /* 1 = ensured */
  uint32_t seed = 99;
  unsigned refused = 0;
  for (int i = 0; i < REGIONS; i++) CHECK_OK(kvcached_reserve(ctx, PAGES * page, &r[i]));
  for (int step = 0; step < 3000; step++) {
    int k = (int)(next_random(&seed) % REGIONS);
    size_t first = next_random(&seed) % PAGES, n = 1 + next_random(&seed) % (PAGES - first);
    char *base = kvcached_region_base(r[k]);
    switch (next_random(&seed) % 5) {
      case 0:
      case 1: {
        size_t in_use = 0, more = 0;
        for (int i = 0; i < REGIONS; i++)
          for (int j = 0; j < PAGES; j++) in_use += (size_t)state[i][j];
        for (size_t j = first; j < first + n; j++) more += !state[k][j];
        int err = kvcached_ensure(r[k], first * page, n * page);
        /* idle pages never stand in the way: what counts is what is in use */
        CHECK_IS(err, (in_use + more) * page <= limit ? KVCACHED_OK : KVCACHED_E_LIMIT);
        if (err) {
          refused++;
          break;
        }
        for (size_t j = first; j < first + n; j++) {
          if (state[k][j]) continue;
          CHECK(all_bytes(base + j * page, page, 0));
          state[k][j] = 1;
          tag[k][j] = (uint8_t)next_random(&seed);
          memset(base + j * page, tag[k][j], page);
        }
        break;
      }
      case 2:
      case 3:
        CHECK_OK(kvcached_release(r[k], first * page, n * page));
        for (size_t j = first; j < first + n; j++) state[k][j] = 0;
        break;
      default: CHECK_OK(kvcached_trim(ctx, next_random(&seed) % 60 * page, NULL));
    }
    CHECK(stats_of(ctx).mapped <= limit);
    if (step % 50) continue;
    for (int i = 0; i < REGIONS; i++) {
      check_region(r[i]);
      for (size_t j = 0; j < PAGES; j++)
        if (state[i][j]) CHECK(all_bytes((char *)kvcached_region_base(r[i]) + j * page, page, tag[i][j]));
    }
  }
  CHECK(refused > 20); /* else the test has not tried the limit */
  CHECK_EQ(stats_of(ctx).limit_failures, refused);
  kvcached_shutdown(ctx);
}

static void test_limit(void) {
  const size_t page = 4096;
  kvcached_ctx_t ctx = open_alone(page, 10 * page + 100);
  kvcached_region_t a, b;
  CHECK_OK(kvcached_reserve(ctx, 100 * page, &a)); /* addresses are free */
  CHECK_OK(kvcached_reserve(ctx, 100 * page, &b));
  CHECK_OK(kvcached_ensure(a, 0, 10 * page));
  CHECK_IS(kvcached_ensure(b, 0, 1), KVCACHED_E_LIMIT);
  CHECK_DETAIL("limit is 41060");
  CHECK_EQ(stats_of(ctx).limit_failures, 1);
  check_region(a);
  check_region(b);

  CHECK_OK(kvcached_release(a, 0, 4 * page));
  CHECK_IS(kvcached_ensure(b, 0, 5 * page),
           KVCACHED_E_LIMIT); /* four idle ones do not suffice: none is taken */
  CHECK_EQ(stats_of(ctx).idle, 4 * page);
  CHECK_OK(kvcached_ensure(b, 0, 3 * page)); /* three of them are used */
  kvcached_stats_t s = stats_of(ctx);
  CHECK(s.mapped == 10 * page && s.idle == page && s.group_charge == 10 * page);
  check_region(a);
  check_region(b);
  CHECK_OK(kvcached_ensure(a, 0, page)); /* the last idle page is this very one */
  CHECK_EQ(stats_of(ctx).idle, 0);
  CHECK_IS(kvcached_ensure(a, 0, 2 * page), KVCACHED_E_LIMIT);
  kvcached_unreserve(b);
  CHECK_OK(kvcached_ensure(a, 0, 4 * page));
  CHECK_IS(kvcached_ensure(a, 0, 100 * page), KVCACHED_E_LIMIT);
  check_region(a);
  kvcached_shutdown(ctx);

  kvcached_options_t o; /* what is held elsewhere counts */
  kvcached_options_init(&o);
  o.ledger_path = "";
  o.limit = 10 * page;
  o.fixed = 8 * page;
  CHECK_OK(kvcached_open(&o, &ctx));
  CHECK_OK(kvcached_reserve(ctx, 100 * page, &a));
  CHECK_IS(kvcached_ensure(a, 0, 3 * page), KVCACHED_E_LIMIT);
  CHECK_OK(kvcached_ensure(a, 0, 2 * page));
  CHECK_EQ(stats_of(ctx).group_charge, 10 * page);
  kvcached_shutdown(ctx);
}

static int messages;
static void count_message(int level, const char *msg, void *user) {
  CHECK(level >= KVCACHED_LOG_ERROR && level <= KVCACHED_LOG_DEBUG && *msg && user == &messages);
  messages++;
}

static void test_log(void) {
  kvcached_options_t o;
  kvcached_ctx_t ctx;
  kvcached_options_init(&o);
  o.ledger_path = "";
  o.log = count_message;
  o.log_user = &messages;
  CHECK_OK(kvcached_open(&o, &ctx));
  CHECK(messages > 0);
  kvcached_shutdown(ctx);
}

int main(void) {
  RUN(test_names);
  RUN(test_bad_arguments);
  RUN(test_states_small_pages);
  RUN(test_states_big_pages);
  RUN(test_neighbours);
  RUN(test_random_calls);
  RUN(test_limit);
  RUN(test_log);
  return 0;
}
