/* Options and structures that grow, ranges, and what of them is refused. */
#include "support.h"

/* ---- options ---- */

TEST(api, bad_options) {
  kvcached_options_t o;
  kvcached_ctx_t ctx = (kvcached_ctx_t)1;
  test_options(&o);
  CHECK_IS(kvcached_open(NULL, &ctx), KVCACHED_E_INVAL);
  CHECK(ctx == NULL);
  CHECK_IS(kvcached_open(&o, NULL), KVCACHED_E_INVAL);
#define REFUSED(field, value, text)                      \
  do {                                                   \
    test_options(&o);                                    \
    o.field = value;                                     \
    ctx = (kvcached_ctx_t)1;                             \
    CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_INVAL); \
    CHECK(ctx == NULL);                                  \
    CHECK_DETAIL(text);                                  \
  } while (0)
  REFUSED(page_size, test_page() + 1, "page_size");
  REFUSED(page_size, 3, "page_size");
  REFUSED(large_page, test_page() + 512, "large_page");
  REFUSED(slot, 3, "slot"); /* without a ledger */
  REFUSED(slot, -2, "slot");
  REFUSED(struct_size, 0, "struct_size");
  REFUSED(lookahead, 17, "lookahead");
  REFUSED(flags, 0x80, "flags");
  REFUSED(group, "", "group");
  REFUSED(group, "a group whose name is much too long", "group");
#undef REFUSED
  test_options(&o);
  o.backend = 7;
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_UNSUPPORTED);
  test_options(&o);
  o.limit = 10;
  o.fixed = 11;
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_LIMIT);
  CHECK(ctx == NULL);
}

TEST_CUDA(api, no_such_device) {
  kvcached_options_t o;
  kvcached_ctx_t ctx;
  test_options(&o);
  o.device = 4711;
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_UNSUPPORTED);
  CHECK_DETAIL("4711");
  test_options(&o);
  o.pci_bus_id = "ffff:ff:1f.0";
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_UNSUPPORTED);
  CHECK_DETAIL("ffff:ff:1f.0");
  CHECK(kvcached_init(4711) == NULL);
  CHECK(*kvcached_last_error());
}

/* A structure that ended earlier: what lies behind its end is not looked at. */
TEST(api, older_callers) {
  const size_t page = test_page();
  kvcached_options_t o;
  kvcached_ctx_t ctx;
  test_options(&o);
  memset((char *)&o + offsetof(kvcached_options_t, device), 0xee,
         sizeof(o) - offsetof(kvcached_options_t, device));
  o.struct_size = offsetof(kvcached_options_t, device); /* that of ABI 1 */
  o.limit = 10 * page;
  CHECK_OK(kvcached_open(&o, &ctx));
  kvcached_region_t r = reserve(ctx, KVCACHED_KV, 20 * page);
  CHECK_IS(kvcached_ensure(r, 0, 11 * page), KVCACHED_E_LIMIT);
  CHECK_OK(kvcached_ensure(r, 0, 10 * page));

  struct {
    kvcached_stats_t s;
    unsigned char behind[64];
  } stats;
  memset(&stats, 0xee, sizeof(stats));
  size_t abi_1 = offsetof(kvcached_stats_t, kind_mapped);
  stats.s.struct_size = abi_1;
  CHECK_OK(kvcached_stats(ctx, &stats.s));
  CHECK_EQ(stats.s.mapped, 10 * page);
  CHECK(all_bytes((char *)&stats + abi_1, sizeof(stats) - abi_1, 0xee));
  CHECK_EQ(stats.s.struct_size, abi_1);
  stats.s.struct_size = 0;
  CHECK_IS(kvcached_stats(ctx, &stats.s), KVCACHED_E_INVAL);
  kvcached_shutdown(ctx);

  test_options(&o);
  memset((char *)&o + offsetof(kvcached_options_t, event), 0xee,
         sizeof(o) - offsetof(kvcached_options_t, event));
  o.struct_size = offsetof(kvcached_options_t, event); /* that of ABI 2 */
  CHECK_OK(kvcached_open(&o, &ctx));
  CHECK_OK(kvcached_ensure(reserve(ctx, KVCACHED_KV, page), 0, page));
  CHECK_OK(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 0, NULL)); /* tells nobody */
  memset(&stats, 0xee, sizeof(stats));
  size_t abi_2 = offsetof(kvcached_stats_t, last_inside_ns);
  stats.s.struct_size = abi_2;
  CHECK_OK(kvcached_stats(ctx, &stats.s));
  CHECK_EQ(stats.s.asleep, page);
  CHECK(all_bytes((char *)&stats + abi_2, sizeof(stats) - abi_2, 0xee));
  memset(&stats, 0xee, sizeof(stats));
  size_t abi_3 = offsetof(kvcached_stats_t, fixed);
  stats.s.struct_size = abi_3;
  CHECK_OK(kvcached_stats(ctx, &stats.s));
  CHECK_EQ(stats.s.kind_asleep[KVCACHED_KV], page);
  CHECK(all_bytes((char *)&stats + abi_3, sizeof(stats) - abi_3, 0xee));
  kvcached_shutdown(ctx);

  test_options(&o); /* cut in the middle: the fields that are whole hold */
  o.limit = 1;
  o.page_size = 12345;
  o.struct_size = offsetof(kvcached_options_t, limit);
  CHECK_IS(kvcached_open(&o, &ctx), KVCACHED_E_INVAL);
  CHECK_DETAIL("12345");
}

/* One that ends later: good while the unknown part is empty. */
TEST(api, newer_callers) {
  struct {
    kvcached_options_t known;
    uint64_t unknown;
  } longer;
  kvcached_ctx_t ctx;
  memset(&longer, 0, sizeof(longer));
  test_options(&longer.known);
  longer.known.struct_size = sizeof(longer);
  CHECK_OK(kvcached_open(&longer.known, &ctx));
  struct {
    kvcached_stats_t s;
    unsigned char behind[64];
  } stats;
  memset(&stats, 0xee, sizeof(stats));
  stats.s.struct_size = sizeof(stats);
  CHECK_OK(kvcached_stats(ctx, &stats.s));
  CHECK_LE(stats.s.struct_size, sizeof(stats));
  kvcached_shutdown(ctx);
  longer.unknown = 1;
  CHECK_IS(kvcached_open(&longer.known, &ctx), KVCACHED_E_INVAL);
}

TEST_HOST(api, default_options) {
  struct {
    kvcached_options_t o;
    unsigned char behind[32];
  } x;
  memset(&x, 0xee, sizeof(x));
  kvcached_options_init(&x.o);
  kvcached_options_init(NULL);
  CHECK_EQ(x.o.struct_size, sizeof(x.o));
  CHECK(all_bytes(x.behind, sizeof(x.behind), 0xee));
  CHECK_EQ(x.o.backend, KVCACHED_BACKEND_HOST);
  CHECK(x.o.page_size == 0 && x.o.large_page == 0 && x.o.limit == UINT64_MAX && x.o.slot == -1);
  CHECK(!x.o.name && !x.o.group && !x.o.ledger_path && !x.o.log && !x.o.pci_bus_id);
  CHECK(!x.o.event && !x.o.event_user && x.o.idle_trim_ms == 0);
  CHECK(x.o.fixed == 0 && x.o.headroom == 0 && x.o.flags == 0 && x.o.device == 0);
  CHECK_EQ(x.o.pool_limit, 64 * MIB);
  CHECK_EQ(x.o.host_limit, UINT64_MAX);
  CHECK_EQ(x.o.room_wait_ms, 1000);
  CHECK_EQ(x.o.lookahead, KVCACHED_LOOKAHEAD_AUTO);
}

/* ---- ranges ---- */

TEST(api, bad_ranges) {
  const size_t page = test_page();
  kvcached_ctx_t ctx = open_alone(0, UINT64_MAX);
  kvcached_region_t r = (kvcached_region_t)1;
  CHECK_IS(kvcached_reserve(ctx, KVCACHED_KV, 0, &r), KVCACHED_E_INVAL);
  CHECK(r == NULL);
  CHECK_IS(kvcached_reserve(NULL, KVCACHED_KV, 1, &r), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_reserve(ctx, KVCACHED_KV, page, NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_reserve(ctx, 3, page, &r), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_reserve(ctx, -1, page, &r), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_reserve(ctx, KVCACHED_KV, SIZE_MAX, &r), KVCACHED_E_NOMEM);
  CHECK_IS(kvcached_reserve(ctx, KVCACHED_KV, SIZE_MAX / 2, &r), KVCACHED_E_NOMEM);
  CHECK_IS(kvcached_reserve(ctx, KVCACHED_WEIGHTS, SIZE_MAX - page, &r), KVCACHED_E_NOMEM);
  CHECK(r == NULL);
  CHECK_EQ(stats_of(ctx).reserved, 0);
  r = reserve(ctx, KVCACHED_KV, 3 * page - 1);
  const size_t size = 3 * page;
  size_t run;
  int ensured;
  CHECK_IS(kvcached_ensure(r, 0, size + 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ensure(r, size + 1, 0), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_ensure(r, 2, SIZE_MAX), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_prepare(r, 2, SIZE_MAX), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_release(r, page, 2 * page + 1), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_mapped_run(r, 0, size + 1, &run, &ensured), KVCACHED_E_INVAL);
  CHECK_OK(kvcached_ensure(r, size, 0));
  CHECK_OK(kvcached_prepare(r, size, 0));
  CHECK_OK(kvcached_release(r, 0, 0));
  CHECK_OK(kvcached_mapped_run(r, 5, 0, &run, &ensured));
  CHECK_EQ(run, 0);
  CHECK_IS(kvcached_prepare_sleep(ctx, 0), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_prepare_sleep(ctx, 8), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_sleep(ctx, 8, 0, NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_sleep(ctx, 0, 0, NULL), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_wake(ctx, 0x100), KVCACHED_E_INVAL);
  CHECK_EQ(stats_of(ctx).mapped, 0);
  check_context(ctx);
  kvcached_shutdown(ctx);
}
