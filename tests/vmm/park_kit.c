/* Processes under one leased group. */
#include "park_kit.h"

#include <inttypes.h>
#include <pthread.h>

family family_start(const char *name) {
  family f = {.path = scratch(name), .page = test_page()};
  f.l = open_ledger(f.path);
  return f;
}

void family_end(family *f) {
  kvcached_ledger_close(f->l);
  CHECK_EQ(live_slots(f->path), 0);
}

child child_of(family *f, uint32_t wait_ms) {
  child c;
  char more[64];
  CHECK_OK(kvcached_ledger_lease(f->l, "g", "m", 0, 0, FULL * f->page, &c.slot));
  snprintf(more, sizeof(more), "group_wait_ms=%" PRIu32, wait_ms);
  c.p = peer_start_with(f->path, "-", FULL * f->page, c.slot, more);
  peer_expect_open(c.p);
  return c;
}

void child_end(family *f, child *c) {
  peer_stop(&c->p);
  CHECK_OK(kvcached_ledger_unlease(f->l, c->slot));
}

kvcached_slot_t slot_of(const family *f, child c) { return slot_in(f->path, c.slot); }

void child_parks(family *f, child c, const char *line, size_t pages) {
  CHECK_OK(kvcached_ledger_wait(f->l, &f->seen, 0));
  peer_send(c.p, line);
  WAIT_FOR(slot_of(f, c).parked == 1 && slot_of(f, c).inside == 0);
  kvcached_slot_t s = slot_of(f, c);
  CHECK_EQ(s.wants, pages * f->page);
  CHECK(s.wants_since_ns > 0);
  CHECK_EQ(s.inside, 0);
  /* The bell has been rung for it. */
  uint32_t seen = f->seen;
  CHECK_OK(kvcached_ledger_wait(f->l, &seen, 0));
  CHECK(seen != f->seen);
  f->seen = seen;
}

void child_answers(child c, const char *reply) {
  char line[600];
  peer_reply(c.p, line, sizeof(line));
  CHECK_TEXT(line, reply);
}

void tell(family *f, child c, int command) {
  CHECK_OK(kvcached_ledger_command(f->l, c.slot, command, 10000, NULL));
}

/* ---- one process ---- */

kvcached_ctx_t house_open(const house *h, int slot) {
  kvcached_options_t o;
  test_options(&o);
  o.ledger_path = h->path;
  o.slot = slot;
  o.limit = FULL * h->page;
  o.group_wait_ms = 60000;
  return open_with(&o);
}

house house_build(const char *name, size_t full) {
  house h = {.path = scratch(name), .page = test_page()};
  h.l = open_ledger(h.path);
  CHECK_OK(kvcached_ledger_lease(h.l, "g", "m", 0, 0, FULL * h.page, &h.slot));
  CHECK_OK(kvcached_ledger_lease(h.l, "g", "m", 0, 0, FULL * h.page, &h.other_slot));
  h.ctx = house_open(&h, h.slot);
  h.other = house_open(&h, h.other_slot);
  h.r = reserve(h.ctx, KVCACHED_KV, 64 * h.page);
  h.theirs = reserve(h.other, KVCACHED_KV, 64 * h.page);
  if (full) CHECK_OK(kvcached_ensure(h.theirs, 0, full * h.page));
  return h;
}

void house_end(house *h) {
  if (h->ctx) {
    check_context(h->ctx);
    kvcached_shutdown(h->ctx);
  }
  kvcached_shutdown(h->other);
  CHECK_OK(kvcached_ledger_unlease(h->l, h->slot));
  CHECK_OK(kvcached_ledger_unlease(h->l, h->other_slot));
  kvcached_ledger_close(h->l);
}

static void *make_call(void *arg) {
  call *c = arg;
  c->err = c->body(c->h);
  (void)snprintf(c->detail, sizeof(c->detail), "%s", c->err ? kvcached_last_error() : "");
  return NULL;
}

void call_start(call *c, house *h, int (*body)(house *h)) {
  *c = (call){.h = h, .body = body};
  CHECK(pthread_create(&c->thread, NULL, make_call, c) == 0);
}

int call_result(call *c) {
  CHECK(pthread_join(c->thread, NULL) == 0);
  return c->err;
}

kvcached_slot_t shown(const house *h) { return slot_in(h->path, h->slot); }
