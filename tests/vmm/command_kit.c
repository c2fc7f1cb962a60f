/* Threads that ask, and how they are answered. */
#include "command_kit.h"

void answer_one(user u, int command, unsigned number) {
  kvc_ledger_answer(u.ledger, u.slot, command == KVCACHED_CMD_SLEEP ? KVCACHED_E_BUSY : KVCACHED_OK,
                    (1000 + number) * (uint64_t)UNIT);
}

static void *ask(void *arg) {
  asking *q = arg;
  kvcached_ledger_t l = open_ledger(q->path);
  q->err = kvcached_ledger_command(l, q->slot, q->command, q->wait_ms, &q->freed);
  snprintf(q->detail, sizeof(q->detail), "%s", kvcached_last_error());
  kvcached_ledger_close(l);
  return NULL;
}

void ask_start(asking *q, const char *path, int slot, int command, uint32_t wait_ms) {
  *q = (asking){.path = path, .slot = slot, .command = command, .wait_ms = wait_ms};
  CHECK(pthread_create(&q->thread, NULL, ask, q) == 0);
}

int next_within(user u, uint32_t ms) {
  int command;
  return kvc_ledger_next_command(u.ledger, u.slot, ms, &command) ? command : 0;
}
