/* Waiting for room on several threads of one context, and every call that does; and what ends it here. */
#include "park_kit.h"
#include "sleep_kit.h"

/* ---- each call that may wait ---- */

static int ensure(house *h) { return kvcached_ensure(h->r, 0, 12 * h->page); }

static int ensure_two(house *h) {
  kvcached_range_t two[2] = {{0, 6 * h->page}, {20 * h->page, 6 * h->page}};
  return kvcached_ensure_ranges(h->r, two, 2);
}

static int write(house *h) {
  char *buf = malloc(12 * h->page);
  CHECK(buf != NULL);
  memset(buf, 'w', 12 * h->page);
  int err = kvcached_write(h->r, 0, buf, 12 * h->page);
  free(buf);
  CHECK(err || holds(h->r, 0, 'w', 12 * h->page));
  return err;
}

static int alloc(house *h) {
  void *p = kvcached_alloc(h->ctx, 12 * h->page);
  kvcached_free(h->ctx, p);
  return p ? KVCACHED_OK : KVCACHED_E_LIMIT;
}

static int set_fixed(house *h) { return kvcached_set_fixed(h->ctx, 12 * h->page); }

static void waits(const char *name, int (*body)(house *h)) {
  house h = house_build(name, 12);
  call c;
  call_start(&c, &h, body);
  WAIT_FOR(shown(&h).parked == 1);
  CHECK_EQ(shown(&h).wants, 12 * h.page);
  CHECK_EQ(stats_of(h.ctx).wants, 12 * h.page);
  (void)go_to_sleep(h.other, KVCACHED_ALL_KINDS);
  CHECK_OK(call_result(&c));
  CHECK_EQ(shown(&h).wants, 0);
  CHECK_EQ(stats_of(h.ctx).wants, 0);
  CHECK_EQ(stats_of(h.ctx).parks, 1);
  CHECK_OK(kvcached_set_fixed(h.ctx, 0));
  house_end(&h);
}

TEST(park_threads, ensure_waits) { waits("ensure", ensure); }
TEST(park_threads, ensure_ranges_waits) { waits("ranges", ensure_two); }
TEST(park_threads, write_waits) { waits("write", write); }
TEST(park_threads, alloc_waits) { waits("alloc", alloc); }
TEST(park_threads, set_fixed_waits) { waits("set-fixed", set_fixed); }

static int enter(house *h) {
  int err = kvcached_enter(h->ctx);
  if (err) return err;
  CHECK(filled(h->r, 12, 40));
  return kvcached_leave(h->ctx);
}
static int wake(house *h) { return kvcached_wake(h->ctx, KVCACHED_ALL_KINDS); }
static int read_one(house *h) {
  char byte;
  return kvcached_read(h->r, 0, &byte, 1);
}
static int clear_one(house *h) { return kvcached_clear(h->r, 11 * h->page, 1); }

static void waking_waits(const char *name, int (*body)(house *h)) {
  house h = house_build(name, 0);
  fill(h.r, 12, 40);
  (void)go_to_sleep(h.ctx, KVCACHED_ALL_KINDS);
  CHECK_OK(kvcached_ensure(h.theirs, 0, 12 * h.page));
  call c;
  call_start(&c, &h, body);
  WAIT_FOR(shown(&h).parked == 1);
  CHECK_EQ(shown(&h).wants, 12 * h.page);
  WAIT_FOR(shown(&h).inside == 0);
  (void)go_to_sleep(h.other, KVCACHED_ALL_KINDS);
  CHECK_OK(call_result(&c));
  CHECK_EQ(asleep(h.ctx), 0);
  CHECK(filled(h.r, 11, 40));
  house_end(&h);
}

TEST(park_threads, enter_waits) { waking_waits("enter", enter); }
TEST(park_threads, wake_waits) { waking_waits("wake", wake); }
TEST(park_threads, read_waits) { waking_waits("read", read_one); }
TEST(park_threads, clear_waits) { waking_waits("clear", clear_one); }

static int more(house *h) { return kvcached_ensure(h->r, 0, 18 * h->page); }

static int look_in(house *h) {
  int err = kvcached_enter(h->ctx);
  if (err) return err;
  CHECK(filled(h->r, 4, 40));
  return kvcached_leave(h->ctx);
}

/* ---- several at once ---- */

static int inside(house *h) {
  static _Atomic size_t next;
  size_t at = (20 + 4 * (next++ % 4)) * h->page; /* four pages each */
  CHECK_OK(kvcached_enter(h->ctx));
  CHECK_OK(kvcached_enter(h->ctx));
  int err = kvcached_ensure(h->r, at, 4 * h->page);
  CHECK_EQ(stats_of(h->ctx).asleep, 0);
  CHECK(filled(h->r, 4, 50));
  if (!err) put(h->r, at, 't', 4 * h->page);
  CHECK_OK(kvcached_leave(h->ctx));
  CHECK(err || holds(h->r, at, 't', 4 * h->page));
  CHECK_OK(kvcached_leave(h->ctx));
  return err;
}

TEST(park_threads, several_of_one_context) {
  house h = house_build("several", 16);
  call c[4];
  fill(h.r, 4, 50);
  for (int i = 0; i < 4; i++) call_start(&c[i], &h, inside);
  WAIT_FOR(shown(&h).parked == 4);
  CHECK_EQ(shown(&h).wants, 16 * h.page);
  WAIT_FOR(shown(&h).inside == 0);
  /* All of them wait, so the context can sleep; what they lack is with its content then. */
  CHECK_EQ(go_to_sleep(h.ctx, KVCACHED_ALL_KINDS), 4 * h.page);
  CHECK_EQ(shown(&h).wants, 20 * h.page);
  CHECK_OK(kvcached_ensure(h.theirs, 0, FULL * h.page));
  CHECK_EQ(shown(&h).parked, 4);
  (void)go_to_sleep(h.other, KVCACHED_ALL_KINDS);
  for (int i = 0; i < 4; i++) CHECK_OK(call_result(&c[i]));
  CHECK_EQ(stats_of(h.ctx).mapped, 20 * h.page);
  CHECK_EQ(stats_of(h.ctx).parks, 4);
  CHECK_EQ(shown(&h).wants, 0);
  house_end(&h);
}

/* Put to sleep by its lessor meanwhile, it is woken by nobody else: not by another thread that enters either.
 */
TEST(park_threads, nobody_else_wakes_it) {
  house h = house_build("told", 16);
  call waits_inside, enters;
  fill(h.r, 4, 40);
  call_start(&waits_inside, &h, more);
  WAIT_FOR(shown(&h).parked == 1);
  uint64_t freed;
  CHECK_OK(kvcached_ledger_command(h.l, h.slot, KVCACHED_CMD_SLEEP, 5000, &freed));
  CHECK_EQ(freed, 4 * h.page);
  (void)go_to_sleep(h.other, KVCACHED_ALL_KINDS);
  call_start(&enters, &h, look_in);
  WAIT_FOR(shown(&h).parked == 2);
  sleep_ms(250);
  CHECK_EQ(shown(&h).parked, 2);
  CHECK_EQ(asleep(h.ctx), 4 * h.page);
  CHECK_OK(kvcached_ledger_command(h.l, h.slot, KVCACHED_CMD_WAKE, 5000, NULL));
  CHECK_OK(call_result(&enters));
  CHECK_OK(call_result(&waits_inside));
  house_end(&h);
}

TEST(park_threads, all_are_refused) {
  house h = house_build("all-refused", 16);
  call c[4];
  fill(h.r, 4, 50);
  for (int i = 0; i < 4; i++) call_start(&c[i], &h, inside);
  WAIT_FOR(shown(&h).parked == 4);
  CHECK_OK(kvcached_ledger_command(h.l, h.slot, KVCACHED_CMD_REFUSE, 5000, NULL));
  for (int i = 0; i < 4; i++) {
    CHECK_IS(call_result(&c[i]), KVCACHED_E_LIMIT);
    CHECK(strstr(c[i].detail, "its lessor refused"));
  }
  CHECK_EQ(shown(&h).wants, 0);
  house_end(&h);
}

/* ---- what else ends it ---- */

static void shutdown_ends(const char *name, int (*body)(house *h), int sleeps) {
  house h = house_build(name, 0);
  call c;
  fill(h.r, 12, 40);
  if (sleeps) (void)go_to_sleep(h.ctx, KVCACHED_ALL_KINDS);
  CHECK_OK(kvcached_ensure(h.theirs, 0, (sleeps ? 12 : 4) * h.page));
  call_start(&c, &h, body);
  WAIT_FOR(shown(&h).parked == 1);
  int64_t begin = now_ms();
  kvcached_shutdown(h.ctx);
  h.ctx = NULL;
  CHECK_IS(call_result(&c), KVCACHED_E_LIMIT);
  CHECK_LE(now_ms() - begin, 3000);
  CHECK(strstr(c.detail, "is being shut down"));
  CHECK_EQ(shown(&h).attached, 0);
  house_end(&h);
}

TEST(park_threads, shutdown_ends_an_ensure) { shutdown_ends("end-ensure", more, 0); }
TEST(park_threads, shutdown_ends_an_enter) { shutdown_ends("end-enter", enter, 1); }

/* A child that is forked meanwhile has no part in it, and its parent waits on. */
static void child_fails(void *arg) {
  house *h = arg;
  CHECK_IS(kvcached_ensure(h->r, 0, 12 * h->page), KVCACHED_E_FORKED);
}

TEST(park_threads, a_forked_child_does_not_wait) {
  house h = house_build("forks", 12);
  call c;
  call_start(&c, &h, ensure);
  WAIT_FOR(shown(&h).parked == 1);
  child_join(child_start(child_fails, &h));
  CHECK_EQ(shown(&h).parked, 1);
  (void)go_to_sleep(h.other, KVCACHED_ALL_KINDS);
  CHECK_OK(call_result(&c));
  house_end(&h);
}

/* ---- who does not wait ---- */

/* A command is answered at once, also one that would need room. */
TEST(park_threads, the_library_itself_does_not_wait) {
  house h = house_build("itself", 0);
  fill(h.r, 12, 40);
  (void)go_to_sleep(h.ctx, KVCACHED_ALL_KINDS);
  CHECK_OK(kvcached_ensure(h.theirs, 0, 12 * h.page));
  int64_t begin = now_ms();
  CHECK_IS(kvcached_ledger_command(h.l, h.slot, KVCACHED_CMD_WAKE, 10000, NULL), KVCACHED_E_LIMIT);
  CHECK_OK(kvcached_prepare(h.theirs, 0, 40 * h.page));
  WAIT_FOR(stats_of(h.other).ready == 8 * h.page); /* the first piece; the next has no room */
  CHECK_LE(now_ms() - begin, 5000);
  CHECK_EQ(stats_of(h.ctx).parks, 0);
  CHECK_EQ(stats_of(h.other).parks, 0);
  CHECK_EQ(go_to_sleep(h.other, KVCACHED_ALL_KINDS), 20 * h.page);
  enter_and_leave(h.ctx);
  house_end(&h);
}

/* Other groups leave one that waits alone: it is at work. */
TEST(park_threads, no_victim_of_other_groups) {
  house h = house_build("victim", 12);
  CHECK_OK(kvcached_ledger_set_limit(h.l, NULL, 24 * h.page, 0, NULL));
  call c;
  fill(h.r, 4, 40);
  (void)go_to_sleep(h.ctx, KVCACHED_ALL_KINDS);
  enter_and_leave(h.ctx);
  call_start(&c, &h, more);
  WAIT_FOR(shown(&h).parked == 1);
  CHECK_OK(kvcached_set_queued(h.other, 1)); /* nor is that one a victim */
  sleep_ms(2100);                            /* it has not just woken */
  kvcached_ctx_t stranger = open_in(h.path, "stranger", UINT64_MAX);
  kvcached_region_t s = reserve(stranger, KVCACHED_KV, 64 * h.page);
  CHECK_IS(kvcached_ensure(s, 0, 10 * h.page), KVCACHED_E_LIMIT);
  CHECK_EQ(shown(&h).asleep, 0);
  CHECK_EQ(shown(&h).parked, 1);
  kvcached_shutdown(stranger);
  (void)go_to_sleep(h.other, KVCACHED_ALL_KINDS);
  CHECK_OK(call_result(&c));
  house_end(&h);
}
