/*
 * Commands: one mailbox a slot.
 *
 *   mail     sequence << 16 | command << 8 | state; FREE -> POSTED by an asker, POSTED -> TAKEN by the slot's
 *            control thread, TAKEN -> FREE by it after its answer, POSTED -> FREE by an asker whose time is
 * up answer   units of 4096 bytes freed << 32 | result << 24 | low bits of the sequence, in the place that
 * the sequence says: the last few are kept, so that no asker has to fetch its own before the next command is
 * posted, and an asker that is stopped or dead holds up nobody
 *
 * Every step is one compare-and-swap of `mail`, so a command is carried out once or taken back, not both.
 * Whoever waits sleeps on a futex, and looks now and then whether the other side still lives: the kernel does
 * not tell.
 */
#include "ledger_impl.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { FREE = 0, POSTED = 1, TAKEN = 2 };
#define STATE(mail) ((unsigned)((mail)&0xff))
#define COMMAND(mail) ((int)((mail) >> 8 & 0xff))
#define SEQUENCE(mail) ((mail) >> 16)
#define ANSWER_SEQUENCE UINT64_C(0xffffff)

#define LOOK_NS INT64_C(20000000) /* between two looks at the other side */

static uint64_t mail_of(uint64_t sequence, int command, unsigned state) {
  return sequence << 16 | (uint64_t)(command & 0xff) << 8 | state;
}

static const char *name_of(int command) {
  switch (command) {
    case KVCACHED_CMD_TRIM: return "trim";
    case KVCACHED_CMD_SLEEP: return "sleep";
    case KVCACHED_CMD_WAKE: return "wake";
    default: return NULL;
  }
}

/* ---- futexes ---- */

/* Shared ones: the words lie in a file that several processes map. */

static void ring(_Atomic uint32_t *bell, int waiters) {
  atomic_fetch_add(bell, 1);
  (void)syscall(SYS_futex, bell, FUTEX_WAKE, waiters, NULL, NULL, 0);
}

/* Until the bell no longer shows `seen`, or for ns; may end early. */
static void wait_for(_Atomic uint32_t *bell, uint32_t seen, int64_t ns) {
  if (ns <= 0) return;
  struct timespec ts = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
  if (syscall(SYS_futex, bell, FUTEX_WAIT, seen, &ts, NULL, 0) == 0) return;
  if (errno == EAGAIN || errno == EINTR || errno == ETIMEDOUT) return;
  (void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL); /* forbidden here: look again and again */
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

/* Posts a command if the mailbox is free: its word goes to *posted. E_SLOT; E_BUSY, with what is there in
 * *posted. */
static int post(struct kvcached_ledger *l, int slot, int command, uint64_t *posted) {
  kvc_ledger_slot *s = &l->map->slot[slot];
  for (;;) {
    /* Read before looking who is there: a new user changes it, and does not get the last one's commands. */
    uint64_t mail = atomic_load(&s->mail);
    int there = answers_in(l, slot);
    if (there < 0) return there;
    if (!there) return nobody(l, slot, "");
    *posted = mail;
    if (STATE(mail) == POSTED || STATE(mail) == TAKEN) {
      const char *name = name_of(COMMAND(mail));
      return kvc_fail(KVCACHED_E_BUSY, "slot %d of %s: another command (%s) is %s", slot, l->path,
                      name ? name : "unknown", STATE(mail) == TAKEN ? "being carried out" : "waiting there");
    }
    uint64_t mine = mail_of((SEQUENCE(mail) + 1) & (UINT64_MAX >> 16), command, POSTED);
    if (!atomic_compare_exchange_strong(&s->mail, &mail, mine)) continue;
    *posted = mine;
    ring(&s->doorbell, 1);
    return KVCACHED_OK;
  }
}

int kvc_command_leave(struct kvcached_ledger *l, int slot, int command) {
  uint64_t there;
  int err = post(l, slot, command, &there);
  /* The same command, not begun yet, is as good. */
  if (err == KVCACHED_E_BUSY && STATE(there) == POSTED && COMMAND(there) == command) return KVCACHED_OK;
  return err;
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

/* Takes a command back that nobody has taken. */
static int take_back(kvc_ledger_slot *s, uint64_t posted) {
  uint64_t expected = posted;
  if (!atomic_compare_exchange_strong(&s->mail, &expected, mail_of(SEQUENCE(posted), 0, FREE))) return 0;
  ring(&s->answered, INT_MAX); /* the next asker may be waiting */
  return 1;
}

/* Waits for the answer to a posted command. */
static int wait_answer(struct kvcached_ledger *l, int slot, int command, uint64_t posted, uint32_t wait_ms,
                       int64_t deadline, uint64_t *freed) {
  kvc_ledger_slot *s = &l->map->slot[slot];
  const char *name = name_of(command);
  for (;;) {
    uint32_t seen = atomic_load(&s->answered);
    uint64_t mail = atomic_load(&s->mail);
    int result;
    if (find_answer(s, posted, &result, freed)) {
      if (result == KVCACHED_OK) return result;
      return kvc_fail(result, "slot %d of %s (pid %" PRIu64 ") answered to %s: %s", slot, l->path,
                      atomic_load(&s->user_pid), name, kvcached_strerror(result));
    }
    int there = answers_in(l, slot);
    if (there < 0) return there;
    int ended = SEQUENCE(mail) != SEQUENCE(posted) || (STATE(mail) != POSTED && STATE(mail) != TAKEN);
    if (ended && find_answer(s, posted, &result, freed)) continue; /* it came just now */
    if (ended || !there) {
      (void)take_back(s, posted);
      return there ? kvc_fail(KVCACHED_E_TIMEOUT,
                              "slot %d of %s: the answer to %s was lost: another process "
                              "uses the slot by now, or many commands were answered since",
                              slot, l->path, name)
                   : nobody(l, slot, " any more: it ended before it answered");
    }
    int64_t left = until(deadline);
    if (left <= 0) break;
    wait_for(&s->answered, seen, at_most(left, LOOK_NS));
  }
  if (take_back(s, posted))
    return kvc_fail(KVCACHED_E_TIMEOUT,
                    "slot %d of %s (pid %" PRIu64
                    ") did not look at its commands in %u ms: the %s was taken "
                    "back",
                    slot, l->path, atomic_load(&s->user_pid), wait_ms, name);
  return kvc_fail(KVCACHED_E_TIMEOUT,
                  "slot %d of %s (pid %" PRIu64 ") did not end the %s in %u ms: it may still carry it out",
                  slot, l->path, atomic_load(&s->user_pid), name, wait_ms);
}

int kvcached_ledger_command(kvcached_ledger_t l, int slot, int command, uint32_t wait_ms, uint64_t *freed) {
  uint64_t unused, posted;
  if (!freed) freed = &unused;
  *freed = 0;
  int err = kvc_check_ledger(l);
  if (err) return err;
  if (!name_of(command))
    return kvc_fail(KVCACHED_E_INVAL, "command %d: 1 is trim, 2 is sleep, 3 is wake", command);
  err = kvc_check_slot(l, slot);
  if (err) return err;
  if (wait_ms == 0) return kvc_command_leave(l, slot, command);

  kvc_ledger_slot *s = &l->map->slot[slot];
  const int64_t deadline = kvc_now_ns() + (int64_t)wait_ms * 1000000;
  for (;;) { /* for the mailbox to be free */
    uint32_t seen = atomic_load(&s->answered);
    err = post(l, slot, command, &posted);
    int64_t left = until(deadline);
    if (err != KVCACHED_E_BUSY || left <= 0) break;
    wait_for(&s->answered, seen, at_most(left, LOOK_NS));
  }
  return err ? err : wait_answer(l, slot, command, posted, wait_ms, deadline, freed);
}

/* ---- the answering side ---- */

void kvc_ledger_control(kvcached_ledger_t l, int slot, int on) {
  kvc_ledger_slot *s = &l->map->slot[slot];
  atomic_store(&s->controlled, on ? 1 : 0);
  if (on) return;
  /* Whoever posted before it could see this needs not wait. */
  uint64_t mail = atomic_load(&s->mail);
  if (STATE(mail) == POSTED) (void)take_back(s, mail);
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
      uint64_t taken = mail_of(SEQUENCE(mail), COMMAND(mail), TAKEN);
      if (!atomic_compare_exchange_strong(&s->mail, &mail, taken)) continue;
      atomic_store(&l->taken, taken);
      *command = COMMAND(taken);
      if (name_of(*command)) return 1;
      kvc_ledger_answer(l, slot, KVCACHED_E_INVAL, 0);
      continue;
    }
    int64_t left = until(deadline);
    if (left <= 0) return 0;
    wait_for(&s->doorbell, seen, left);
  }
}

void kvc_ledger_answer(kvcached_ledger_t l, int slot, int result, uint64_t freed) {
  kvc_ledger_slot *s = &l->map->slot[slot];
  uint64_t taken = atomic_exchange(&l->taken, 0), sequence = SEQUENCE(taken), units = freed / 4096;
  if (!taken) return;
  if (units > UINT32_MAX) units = UINT32_MAX;
  atomic_store(&s->answer[sequence % KVC_LEDGER_ANSWERS],
               units << 32 | (uint64_t)(-result & 0xff) << 24 | (sequence & ANSWER_SEQUENCE));
  (void)atomic_compare_exchange_strong(&s->mail, &taken, mail_of(sequence, 0, FREE));
  ring(&s->answered, INT_MAX);
}

void kvc_ledger_ring(kvcached_ledger_t l, int slot) {
  atomic_store(&l->rung, 1);
  ring(&l->map->slot[slot].doorbell, 1);
}
