/* Eight processes that take turns under a limit of which two fill it, and a lessor that makes room for them:
   all of them get on, and nothing of theirs is lost. */
#include "park_kit.h"
#include "rounds.h"

#include <poll.h>

enum { CHILDREN = 8 };

static int give(const family *f, const kvcached_slot_t *who, int command) {
  int err = kvcached_ledger_command(f->l, who->slot, command, 5000, NULL);
  /* It has begun to work; or somebody was faster to take the room. */
  CHECK(err == KVCACHED_OK || err == KVCACHED_E_BUSY ||
        (command == KVCACHED_CMD_WAKE && err == KVCACHED_E_LIMIT));
  return err ? 0 : command;
}

/* The lessor's rule. The oldest that wants is woken when there is room for it, if it sleeps. Else room is
   made: by idle memory of others, then by having idle ones sleep, least recently used first, and where nobody
   is idle and all that are in use wait, by having the one sleep that came last. Returns what it told
   somebody. */
static int make_room(const family *f, const kvcached_slot_t *s, size_t n) {
  const kvcached_slot_t *first = NULL, *spare = NULL, *idle = NULL, *last = NULL;
  uint64_t charge = 0;
  int at_work = 0;
  for (size_t i = 0; i < n; i++) {
    charge += s[i].charge;
    if (s[i].wants && (!first || s[i].wants_since_ns < first->wants_since_ns)) first = &s[i];
  }
  if (!first) return 0;
  if (charge + first->wants <= FULL * f->page)
    return first->asleep > 0 ? give(f, first, KVCACHED_CMD_WAKE) : 0;
  for (size_t i = 0; i < n; i++) {
    if (&s[i] == first) continue;
    if (s[i].inside) {
      at_work = 1;
    } else if (s[i].idle + s[i].pooled > 0) {
      spare = &s[i];
    } else if (s[i].claim == 0) {
      continue;
    } else if (!s[i].wants) {
      if (!idle || s[i].last_use_ns < idle->last_use_ns) idle = &s[i];
    } else if (!last || s[i].wants_since_ns > last->wants_since_ns) {
      last = &s[i];
    }
  }
  const kvcached_slot_t *who = spare ? spare : idle ? idle : at_work ? NULL : last;
  if (!who) return 0;
  return give(f, who, who == spare ? KVCACHED_CMD_TRIM : KVCACHED_CMD_SLEEP);
}

static int has_answered(child c) {
  struct pollfd p = {.fd = c.p.out, .events = POLLIN};
  return poll(&p, 1, 0) == 1;
}

TEST(park, all_of_many_get_on) {
  family f = family_start("many");
  child c[CHILDREN];
  int told[KVCACHED_CMD_REFUSE] = {0}, left = CHILDREN;
  uint64_t parks = 0, most = 0;
  char line[64];
  for (int i = 0; i < CHILDREN; i++) c[i] = child_of(&f, 120000);
  for (int i = 0; i < CHILDREN; i++) {
    snprintf(line, sizeof(line), "rounds %u %u", rounds(100), first_seed(4711) + 7919 * (unsigned)i);
    peer_send(c[i].p, line);
  }
  while (left > 0) {
    kvcached_slot_t s[CHILDREN + 1];
    size_t n;
    uint64_t charge = 0;
    /* Not looked at every moment: the bell has to tell. Nobody is killed here. */
    CHECK_OK(kvcached_ledger_wait(f.l, &f.seen, 1000));
    s[0].struct_size = sizeof(s[0]);
    CHECK_OK(kvcached_ledger_slots(f.l, s, CHILDREN + 1, &n));
    for (size_t i = 0; i < n; i++) charge += s[i].charge;
    if (charge > most) most = charge;
    told[make_room(&f, s, n)]++;
    left = 0;
    for (int i = 0; i < CHILDREN; i++) left += !has_answered(c[i]);
  }
  for (int i = 0; i < CHILDREN; i++) {
    child_answers(c[i], "ok");
    peer_send(c[i].p, "parks");
    peer_reply(c[i].p, line, sizeof(line));
    parks += strtoull(line + 6, NULL, 10);
    child_end(&f, &c[i]);
  }
  /* It was as tight as it was meant to be. */
  CHECK(parks > rounds(25));
  CHECK(told[KVCACHED_CMD_SLEEP] > CHILDREN);
  CHECK(told[KVCACHED_CMD_WAKE] > 0);
  CHECK(most > FULL * f.page / 2);
  family_end(&f);
}
