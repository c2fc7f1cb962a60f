/* An event function for the tests. */
#include "event_kit.h"

#include "context.h"

static void refused(kvcached_ctx_t ctx) {
  kvcached_stats_t s = {.struct_size = sizeof(s)};
  size_t freed;
  CHECK_IS(kvcached_stats(ctx, &s), KVCACHED_E_INVAL);
  CHECK_DETAIL("event function");
  CHECK_IS(kvcached_enter(ctx), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_trim(ctx, 0, &freed), KVCACHED_E_INVAL);
  CHECK_IS(kvcached_sleep(ctx, KVCACHED_ALL_KINDS, 1000, NULL), KVCACHED_E_INVAL);
  CHECK_EQ(kvcached_available(ctx), 0);
  CHECK(kvcached_alloc(ctx, 1) == NULL);
  for (kvcached_region_t r = ctx->regions; r; r = r->next) {
    CHECK_IS(kvcached_ensure(r, 0, 1), KVCACHED_E_INVAL);
    CHECK_IS(kvcached_prepare(r, 0, 1), KVCACHED_E_INVAL);
    kvcached_unreserve(r);
  }
  kvcached_set_limit(ctx, 0);
  kvcached_shutdown(ctx);
}

/* Nobody is inside and nothing has been taken yet. */
static void check_last_moment(kvcached_ctx_t ctx) {
  CHECK_EQ(kvc_gate_inside(&ctx->gate), 0);
  CHECK_EQ(atomic_load(&ctx->gate.state), 0x80000000u);
  for (kvcached_region_t r = ctx->regions; r && on_host(); r = r->next)
    for (size_t i = 0; i < r->pages.top; i++)
      if (r->pages.state[i] == KVC_ENSURED) CHECK(accessible((char *)r->space.base + i * r->unit));
}

static void note(int event, const struct kvcached_stats *now, void *user) {
  hearing *h = user;
  unsigned n = atomic_load(&h->n);
  h->plain++;
  CHECK(event >= KVCACHED_EVENT_SLEEPING && event <= KVCACHED_EVENT_TRIMMED);
  CHECK_EQ(now->struct_size, sizeof(*now));
  CHECK_LE(now->idle, now->mapped);
  CHECK_EQ(now->kind_mapped[0] + now->kind_mapped[1] + now->kind_mapped[2], now->mapped);
  CHECK_EQ(now->kind_asleep[0] + now->kind_asleep[1] + now->kind_asleep[2], now->asleep);
  if (h->ctx && event == KVCACHED_EVENT_SLEEPING) check_last_moment(h->ctx);
  if (h->ctx && h->refuse_calls) refused(h->ctx);
  if (h->also) h->also(h, event);
  if (n < HEARD_MAX) {
    h->event[n] = event;
    h->now[n] = *now;
  }
  atomic_store(&h->n, n + 1);
}

void hear(hearing *h, kvcached_options_t *o) {
  o->event = note;
  o->event_user = h;
}

void expect_events(hearing *h, const char *letters) {
  const size_t n = strlen(letters);
  char got[HEARD_MAX + 1];
  WAIT_FOR(atomic_load(&h->n) >= n);
  const unsigned came = atomic_load(&h->n);
  for (unsigned i = 0; i < came && i < HEARD_MAX; i++) got[i] = "?Sswt"[h->event[i]];
  got[came < HEARD_MAX ? came : HEARD_MAX] = 0;
  CHECK_TEXT(got, letters);
  atomic_store(&h->n, 0);
}

kvcached_stats_t last_heard(const hearing *h, int event) {
  for (unsigned i = HEARD_MAX; i-- > 0;)
    if (h->event[i] == event && h->now[i].struct_size) return h->now[i];
  check_failed(__FILE__, __LINE__, "event %d was never heard", event);
}
