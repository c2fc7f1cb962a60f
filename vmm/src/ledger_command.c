/*
 * Commands: one mailbox a slot.
 *
 *   mail     sequence << 16 | command << 8 | state. FREE -> POSTED by an asker, POSTED -> TAKEN by the slot's
 *            control thread, TAKEN -> DONE by it after its answer, DONE -> FREE by the asker that has read
 * it. POSTED -> FREE by an asker whose time is up: it took the command back. ALONE, a bit beside the state,
 * says that nobody will read the answer: TAKEN -> FREE then answer   units of 4096 bytes freed << 32 | result
 * << 24 | low bits of the sequence, in the place that the sequence says: the last few are kept
 *
 * Every step is one compare-and-swap of `mail`, so a command is carried out once or taken back, not both. An
 * asker that is stopped or dead and never reads its answer holds up nobody for long: the next one posts over
 * it after a moment, and the answer is still to be found afterwards. Whoever waits sleeps on a futex, and
 * looks now and then whether the other side still lives: the kernel does not tell.
 */
#include "ledger_impl.h"

#include <inttypes.h>
#include <limits.h>
#include <string.h>

enum { FREE = 0, POSTED = 1, TAKEN = 2, DONE = 3, ALONE = 0x80 };
#define STATE(mail) ((unsigned)((mail)&0x7f))
#define COMMAND(mail) ((int)((mail) >> 8 & 0xff))
#define SEQUENCE(mail) ((mail) >> 16)
#define ANSWER_SEQUENCE UINT64_C(0xffffff)

#define LOOK_NS INT64_C(20000000)   /* between two looks at the other side */
#define UNREAD_NS INT64_C(50000000) /* how long an answer keeps the mailbox for its asker */

static uint64_t mail_of(uint64_t sequence, int command, unsigned state) {
  return sequence << 16 | (uint64_t)(command & 0xff) << 8 | state;
}

static const char *name_of(int command) {
  switch (command) {
    case KVCACHED_CMD_TRIM: return "trim";
    case KVCACHED_CMD_SLEEP: return "sleep";
    case KVCACHED_CMD_WAKE: return "wake";
    case KVCACHED_CMD_REFUSE: return "refuse";
    default: return NULL;
  }
}

static void ring(_Atomic uint32_t *bell, int waiters) {
  atomic_fetch_add(bell, 1);
  kvc_futex_wake(bell, waiters);
}

static int64_t until(int64_t deadline) { return deadline - kvc_now_ns(); }
static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- the asking side ---- */

void kvc_mail_reset(kvc_ledger_slot *s) {
  uint64_t mail = atomic_load(&s->mail);
  while (!atomic_compare_exchange_weak(&s->mail, &mail, mail_of(SEQUENCE(mail) + 1, 0, FREE))) {
  }
  ring(&s->answered, INT_MAX);
}

/* 1 when somebody in the slot answers commands, 0 when not, negative on error. */
static int answers_in(struct kvcached_ledger *l, int slot) {
  kvc_slot_view v;
  int err = kvc_slot_read(l, slot, &v);
  if (err) return err;
  return (v.holders & KVC_HOLD_USER) != 0 && atomic_load(&l->map->slot[slot].controlled) == 1;
}

static int nobody(const struct kvcached_ledger *l, int slot, const char *when) {
  return kvc_fail(KVCACHED_E_SLOT, "slot %d of %s: no process with a control thread uses it%s", slot, l->path,
                  when);
}

/* Posts a command if the mailbox is free, or holds an answer that nobody reads and `over` allows to go on.
   Its word goes to *posted. E_SLOT; E_BUSY, with what is there in *posted. */
static int post(struct kvcached_ledger *l, int slot, int command, unsigned flags, int over,
                uint64_t *posted) {
  kvc_ledger_slot *s = &l->map->slot[slot];
  for (;;) {
    /* Read before looking who is there: a new user changes it, and does not get the last one's commands. */
    uint64_t mail = atomic_load(&s->mail);
    int there = answers_in(l, slot);
    if (there < 0) return there;
    if (!there) return nobody(l, slot, "");
    *posted = mail;
    if (STATE(mail) == POSTED || STATE(mail) == TAKEN || (STATE(mail) == DONE && !over)) {
      const char *name = name_of(COMMAND(mail));
      return kvc_fail(KVCACHED_E_BUSY, "slot %d of %s: another command (%s) is %s", slot, l->path,
                      name ? name : "unknown",
                      STATE(mail) == POSTED  ? "waiting there"
                      : STATE(mail) == TAKEN ? "being carried out"
                                             : "just done");
    }
    uint64_t mine = mail_of(SEQUENCE(mail) + 1, command, POSTED | flags);
    if (!atomic_compare_exchange_strong(&s->mail, &mail, mine)) continue;
    *posted = mine;
    ring(&s->doorbell, 1);
    return KVCACHED_OK;
  }
}

int kvc_command_leave(struct kvcached_ledger *l, int slot, int command) {
  uint64_t there;
  int err = post(l, slot, command, ALONE, 1, &there);
  /* The same command, not begun yet, is as good. */
  if (err == KVCACHED_E_BUSY && STATE(there) == POSTED && COMMAND(there) == command) return KVCACHED_OK;
  return err;
}

/* Posts a command that will be waited for, once the mailbox is free. */
static int post_in_time(struct kvcached_ledger *l, int slot, int command, int64_t deadline,
                        uint64_t *posted) {
  kvc_ledger_slot *s = &l->map->slot[slot];
  uint64_t unread = 0;
  int64_t since = 0;
  for (;;) {
    uint32_t seen = atomic_load(&s->answered);
    int64_t now = kvc_now_ns();
    int err = post(l, slot, command, 0, unread && now - since >= UNREAD_NS, posted);
    if (err != KVCACHED_E_BUSY || now >= deadline) return err;
    if (STATE(*posted) != DONE) {
      unread = 0;
    } else if (*posted != unread) {
      unread = *posted;
      since = now;
    }
    kvc_futex_wait(&s->answered, seen, at_most(until(deadline), LOOK_NS));
  }
}

/* 1 and the answer to a posted command, if it is there. */
static int find_answer(kvc_ledger_slot *s, uint64_t posted, int *result, uint64_t *freed) {
  uint64_t sequence = SEQUENCE(posted), answer = atomic_load(&s->answer[sequence % KVC_LEDGER_ANSWERS]);
  if ((answer & ANSWER_SEQUENCE) != (sequence & ANSWER_SEQUENCE)) return 0;
  *result = -(int)(answer >> 24 & 0xff);
  if (*result < KVCACHED_E_RELOAD) *result = KVCACHED_E_SYSTEM; /* nobody answers so: a damaged file */
  *freed = (answer >> 32) * 4096;
  return 1;
}

/* Empties the mailbox if it is in a state that the caller found, or left. */
static int set_free(kvc_ledger_slot *s, uint64_t mail) {
  uint64_t sequence = SEQUENCE(mail);
  if (!atomic_compare_exchange_strong(&s->mail, &mail, mail_of(sequence, 0, FREE))) return 0;
  ring(&s->answered, INT_MAX); /* the next asker may be waiting */
  return 1;
}

/* Says that the asker of a command that was taken does not look for the answer any more. */
static void leave_alone(kvc_ledger_slot *s, uint64_t sequence, int command) {
  uint64_t taken = mail_of(sequence, command, TAKEN);
  if (!atomic_compare_exchange_strong(&s->mail, &taken, taken | ALONE))
    (void)set_free(s, mail_of(sequence, command, DONE));
}

/* Waits for the answer to a posted command. */
static int wait_answer(struct kvcached_ledger *l, int slot, int command, uint64_t posted, uint32_t wait_ms,
                       int64_t deadline, uint64_t *freed) {
  kvc_ledger_slot *s = &l->map->slot[slot];
  const uint64_t sequence = SEQUENCE(posted), taken = mail_of(sequence, command, TAKEN);
  const char *name = name_of(command);
  const uint64_t pid = atomic_load(&s->user_pid);
  for (;;) {
    uint32_t seen = atomic_load(&s->answered);
    uint64_t mail = atomic_load(&s->mail); /* before the answer, which was written before it */
    int result, there = answers_in(l, slot);
    if (find_answer(s, posted, &result, freed)) {
      leave_alone(s, sequence, command);
      if (result == KVCACHED_OK) return result;
      return kvc_fail(result, "slot %d of %s (pid %" PRIu64 ") answered to %s: %s", slot, l->path, pid, name,
                      kvcached_err_name(result));
    }
    if (there < 0) return there;
    if (!there) {
      (void)set_free(s, posted);
      return nobody(l, slot, " any more: it ended before it answered");
    }
    if (mail != posted && mail != taken)
      return kvc_fail(
          KVCACHED_E_TIMEOUT,
          "slot %d of %s: the answer to %s was lost: another process uses the slot by now, or many "
          "commands were answered since",
          slot, l->path, name);
    int64_t left = until(deadline);
    if (left <= 0) break;
    kvc_futex_wait(&s->answered, seen, at_most(left, LOOK_NS));
  }
  if (set_free(s, posted))
    return kvc_fail(KVCACHED_E_TIMEOUT,
                    "slot %d of %s (pid %" PRIu64
                    ") did not look at its commands in %u ms: the %s was taken "
                    "back",
                    slot, l->path, pid, wait_ms, name);
  leave_alone(s, sequence, command);
  return kvc_fail(KVCACHED_E_TIMEOUT,
                  "slot %d of %s (pid %" PRIu64 ") did not end the %s in %u ms: it may still carry it out",
                  slot, l->path, pid, name, wait_ms);
}

int kvcached_ledger_command(kvcached_ledger_t l, int slot, int command, uint32_t wait_ms, uint64_t *freed) {
  uint64_t unused, posted;
  if (!freed) freed = &unused;
  *freed = 0;
  int err = kvc_check_ledger(l);
  if (err) return err;
  if (!name_of(command))
    return kvc_fail(KVCACHED_E_INVAL, "command %d: 1 is trim, 2 is sleep, 3 is wake, 4 is refuse", command);
  err = kvc_check_slot(l, slot);
  if (err) return err;
  if (wait_ms == 0) return kvc_command_leave(l, slot, command);
  const int64_t deadline = kvc_now_ns() + (int64_t)wait_ms * 1000000;
  err = post_in_time(l, slot, command, deadline, &posted);
  return err ? err : wait_answer(l, slot, command, posted, wait_ms, deadline, freed);
}

/* ---- the answering side ---- */

void kvc_ledger_control(kvcached_ledger_t l, int slot, int on) {
  kvc_ledger_slot *s = &l->map->slot[slot];
  atomic_store(&s->controlled, on ? 1 : 0);
  if (on) return;
  /* Whoever posted before it could see this needs not wait. */
  uint64_t mail = atomic_load(&s->mail);
  if (STATE(mail) == POSTED) (void)set_free(s, mail);
  ring(&s->answered, INT_MAX);
}

int kvc_ledger_next_command(kvcached_ledger_t l, int slot, uint32_t wait_ms, int *command) {
  kvc_ledger_slot *s = &l->map->slot[slot];
  const int64_t deadline = kvc_now_ns() + (int64_t)wait_ms * 1000000;
  for (;;) {
    uint32_t seen = atomic_load(&s->doorbell);
    if (atomic_exchange(&l->rung, 0)) return 0;
    uint64_t mail = atomic_load(&s->mail);
    if (STATE(mail) == POSTED) {
      uint64_t taken = mail_of(SEQUENCE(mail), COMMAND(mail), TAKEN | (unsigned)(mail & ALONE));
      if (!atomic_compare_exchange_strong(&s->mail, &mail, taken)) continue;
      atomic_store(&l->taken, taken);
      *command = COMMAND(taken);
      if (name_of(*command)) return 1;
      kvc_ledger_answer(l, slot, KVCACHED_E_INVAL, 0);
      continue;
    }
    int64_t left = until(deadline);
    if (left <= 0) return 0;
    kvc_futex_wait(&s->doorbell, seen, left);
  }
}

void kvc_ledger_answer(kvcached_ledger_t l, int slot, int result, uint64_t freed) {
  kvc_ledger_slot *s = &l->map->slot[slot];
  uint64_t taken = atomic_exchange(&l->taken, 0), sequence = SEQUENCE(taken), units = freed / 4096;
  if (!taken) return;
  if (units > UINT32_MAX) units = UINT32_MAX;
  atomic_store(&s->answer[sequence % KVC_LEDGER_ANSWERS],
               units << 32 | (uint64_t)(-result & 0xff) << 24 | (sequence & ANSWER_SEQUENCE));
  /* Its asker may have gone meanwhile, and says so in the word. */
  uint64_t waited_for = taken & ~(uint64_t)ALONE;
  if ((taken & ALONE) ||
      !atomic_compare_exchange_strong(&s->mail, &waited_for, mail_of(sequence, COMMAND(taken), DONE))) {
    taken |= ALONE;
    (void)atomic_compare_exchange_strong(&s->mail, &taken, mail_of(sequence, 0, FREE));
  }
  ring(&s->answered, INT_MAX);
}

void kvc_ledger_ring(kvcached_ledger_t l, int slot) {
  atomic_store(&l->rung, 1);
  ring(&l->map->slot[slot].doorbell, 1);
}
