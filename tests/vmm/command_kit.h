/* For the tests of commands: threads that ask, and how they are answered. */
#ifndef COMMAND_KIT_H
#define COMMAND_KIT_H

#include "ledger_kit.h"

#include <pthread.h>

/* Answers a command that was taken: freed is 1000 + number, in units; a sleep is refused as busy. */
void answer_one(user u, int command, unsigned number);

/* The next command for a user, waited for that long; 0: there was none. */
int next_within(user u, uint32_t ms);

/* A thread that sends one command. What came of it is there when the thread was joined. */
typedef struct asking {
  const char *path;
  int slot, command, err;
  uint32_t wait_ms;
  uint64_t freed;
  char detail[600];
  pthread_t thread;
} asking;
void ask_start(asking *q, const char *path, int slot, int command, uint32_t wait_ms);

#endif
