/* A process that takes turns with others: what it had in its last round is there in the next. */
#include "rounds.h"

#include "support.h"

static void look(kvcached_region_t region, const uint8_t *tag) {
  for (size_t i = 0; i < ROUNDS_PAGES; i++)
    if (tag[i]) CHECK(holds_ends(region, i, tag[i]));
}

static void grow(kvcached_region_t region, size_t page, uint8_t *tag, size_t n, uint32_t *seed) {
  if (next_random(seed) % 2) {
    CHECK_OK(kvcached_ensure(region, 0, n * page));
  } else { /* an odd and an even half, as one call */
    kvcached_range_t part[2] = {{0, n / 2 * page}, {n / 2 * page, (n - n / 2) * page}};
    CHECK_OK(kvcached_ensure_ranges(region, part, 2));
  }
  for (size_t i = 0; i < n; i++) {
    if (tag[i]) continue;
    CHECK(holds_ends(region, i, 0));
    tag[i] = (uint8_t)(1 + next_random(seed) % 255);
    put_ends(region, i, tag[i]);
  }
}

void rounds_peer(kvcached_ctx_t ctx, kvcached_region_t region, unsigned n, uint32_t seed) {
  const size_t page = kvcached_page_size(ctx);
  uint8_t tag[ROUNDS_PAGES] = {0}; /* content of a page in use; 0: it is none */
  const char *base = kvcached_region_base(region);
  for (unsigned round = 0; round < n; round++) {
    unsigned depth = 1 + next_random(&seed) % 2;
    for (unsigned i = 0; i < depth; i++) CHECK_OK(kvcached_enter(ctx));
    CHECK_EQ(stats_of(ctx).asleep, 0);
    look(region, tag);
    for (size_t step = next_random(&seed) % 4, most = ROUNDS_PAGES; step > 0; step--) {
      grow(region, page, tag, 1 + next_random(&seed) % most, &seed);
      CHECK_EQ(stats_of(ctx).asleep, 0); /* inside, whatever it waited for */
      if (next_random(&seed) % 4 == 0) sleep_ms(1);
      look(region, tag);
    }
    size_t drop = next_random(&seed) % ROUNDS_PAGES;
    if (next_random(&seed) % 4 == 0) {
      CHECK_OK(kvcached_release(region, drop * page, (ROUNDS_PAGES - drop) * page));
      memset(tag + drop, 0, ROUNDS_PAGES - drop);
    }
    for (unsigned i = 0; i < depth; i++) CHECK_OK(kvcached_leave(ctx));
    if (next_random(&seed) % 8 == 0) sleep_ms(next_random(&seed) % 4);
  }
  CHECK(kvcached_region_base(region) == base);
  printf("ok\n");
}
