/* One process of a storm: it works at random, and looks at the limits and at its pages' content all the time.
 */
#include "storm.h"

#include "context.h"
#include "support.h"

#include <inttypes.h>
#include <sys/mman.h>

typedef struct sky {
  storm *s;
  kvcached_ctx_t ctx;
  kvcached_region_t region;
  size_t page;
  int me;
  uint32_t seed;
  uint8_t tag[STORM_PAGES]; /* content of an ensured page; 0: not ensured */
  size_t ensured;
} sky;

static void hold_bytes(sky *k, int64_t bytes) {
  atomic_store(&k->s->changing[k->me], 1);
  atomic_fetch_add(&k->s->mine[k->me], bytes);
  storm_add(k->s, k->me, bytes);
  atomic_store(&k->s->changing[k->me], 0);
}

static void let_go(sky *k) { hold_bytes(k, -atomic_load(&k->s->mine[k->me])); }

static uint64_t memory(const sky *k) {
  kvcached_stats_t s = stats_of(k->ctx);
  return s.mapped + s.pooled;
}

/* What the ledger and the account say at the moment, for whoever has to find out how it came. */
static void tell(const sky *k, int which, int64_t total, uint64_t limit, uint64_t before, uint64_t after) {
  kvcached_slot_t all[16];
  size_t n = 0;
  char line[2000];
  all[0].struct_size = sizeof(all[0]);
  (void)kvcached_ledger_slots(k->ctx->ledger, all, 16, &n);
  int len =
      snprintf(line, sizeof(line),
               "peer %d got more (%" PRIu64 " after %" PRIu64 "), total %d is %" PRId64 " above %" PRIu64
               "; slots (pid group claim+asked inside):",
               k->me, after / k->page, before / k->page, which, total / (int64_t)k->page, limit / k->page);
  for (size_t i = 0; i < n && i < 16 && len < 1800; i++)
    len += snprintf(line + len, sizeof(line) - (size_t)len, " %lld %s %" PRIu64 "+%" PRIu64 " %u,",
                    (long long)all[i].pid, all[i].group, all[i].claim / k->page,
                    (all[i].charge - all[i].claim) / k->page, all[i].inside);
  len += snprintf(line + len, sizeof(line) - (size_t)len, " account:");
  for (int i = 0; i < STORM_PEERS && len < 1950; i++)
    len += snprintf(line + len, sizeof(line) - (size_t)len, " %" PRId64,
                    atomic_load(&k->s->mine[i]) / (int64_t)k->page);
  fprintf(stderr, "%s\n", line);
}

/* After a call that got more memory than there was `before`, all that is held must be within the limits, if
   they were the same all the time since `limit_no`. (Where one was lowered, what is in use stays in use.) */
static void check_limit(sky *k, uint64_t limit_no, uint64_t before) {
  uint64_t after = memory(k);
  if (after <= before) return;
  int64_t total[TOTALS];
  uint64_t limit[TOTALS];
  for (int t = 0; t < TOTALS; t++) {
    total[t] = atomic_load(&k->s->total[t]);
    limit[t] = atomic_load(&k->s->limit[t]);
  }
  if (limit_no % 2 != 0 || atomic_load(&k->s->limit_no) != limit_no) return;
  atomic_fetch_add(&k->s->checked, 1);
  for (int t = 0; t < TOTALS; t++) {
    if (t != CARD_TOTAL && t != k->me % 2) continue;
    if (total[t] <= (int64_t)limit[t]) continue;
    atomic_fetch_add(&k->s->over, 1);
    tell(k, t, total[t], limit[t], before, after);
  }
}

/* One visit: in through the gate, something done, everything looked at, out again. */
static int visit(sky *k) {
  uint64_t limit_no = atomic_load(&k->s->limit_no), before = memory(k);
  int err = kvcached_enter(k->ctx);
  if (err) return err;
  hold_bytes(k, (int64_t)(k->ensured * k->page));
  check_limit(k, limit_no, before);
  size_t first = next_random(&k->seed) % STORM_PAGES, n = 1 + next_random(&k->seed) % (STORM_PAGES - first);
  switch (next_random(&k->seed) % 4) {
    case 0:
    case 1: {
      limit_no = atomic_load(&k->s->limit_no);
      before = memory(k);
      if (next_random(&k->seed) % 3 == 0) CHECK_OK(kvcached_prepare(k->region, first * k->page, n * k->page));
      err = kvcached_ensure(k->region, first * k->page, n * k->page);
      if (err) break;
      size_t more = 0;
      for (size_t i = first; i < first + n; i++) more += k->tag[i] == 0;
      hold_bytes(k, (int64_t)(more * k->page));
      check_limit(k, limit_no, before);
      for (size_t i = first; i < first + n; i++) {
        if (k->tag[i]) continue;
        CHECK(holds_ends(k->region, i, 0));
        k->tag[i] = (uint8_t)(1 + next_random(&k->seed) % 255);
        put_ends(k->region, i, k->tag[i]);
      }
      k->ensured += more;
      break;
    }
    case 2:
      let_go(k);
      CHECK_OK(kvcached_release(k->region, first * k->page, n * k->page));
      for (size_t i = first; i < first + n; i++) {
        k->ensured -= k->tag[i] != 0;
        k->tag[i] = 0;
      }
      hold_bytes(k, (int64_t)(k->ensured * k->page));
      break;
    default: sleep_ms(next_random(&k->seed) % 3); break;
  }
  for (size_t i = 0; i < STORM_PAGES; i++)
    if (k->tag[i]) CHECK(holds_ends(k->region, i, k->tag[i]));
  let_go(k);
  CHECK_OK(kvcached_leave(k->ctx));
  return err;
}

void storm_peer(kvcached_ctx_t ctx, kvcached_region_t region, const char *path, int me, uint32_t seed) {
  const size_t page = kvcached_page_size(ctx);
  sky k = {.s = share_file(path, sizeof(storm)),
           .ctx = ctx,
           .region = region,
           .page = page,
           .me = me,
           .seed = seed};
  while (!atomic_load(&k.s->ends)) {
    uint32_t stops = atomic_load(&k.s->stops[me]);
    int64_t start = now_ms();
    int err;
    switch (next_random(&k.seed) % 8) {
      case 0: err = kvcached_trim(ctx, next_random(&k.seed) % 4 * page, NULL); break;
      case 1: err = kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 20, NULL); break;
      case 2: err = kvcached_set_queued(ctx, next_random(&k.seed) % 2); break;
      case 3: err = kvcached_set_fixed(ctx, next_random(&k.seed) % 4 * page); break;
      default: err = visit(&k);
    }
    uint32_t took = (uint32_t)(now_ms() - start), slowest = atomic_load(&k.s->slow_ms);
    if (stops == atomic_load(&k.s->stops[me]))
      while (took > slowest && !atomic_compare_exchange_weak(&k.s->slow_ms, &slowest, took)) {
      }
    if (err && err != KVCACHED_E_LIMIT && err != KVCACHED_E_BUSY && err != KVCACHED_E_NOMEM)
      check_failed(__FILE__, __LINE__, "%s in a storm", kvcached_err_name(err));
    atomic_fetch_add(&k.s->steps, 1);
    if (err) {
      atomic_fetch_add(&k.s->refused, 1);
      sleep_ms(next_random(&k.seed) % 4);
    }
  }
  munmap(k.s, sizeof(storm));
  printf("ok\n");
}
