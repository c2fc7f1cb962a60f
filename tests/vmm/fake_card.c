/*
 * The memory of the fake driver's cards: how much of it is taken, by this process and, where FAKE_CUDA_STATE
 * names a file, by others.
 *
 * Each process has a slot in the file, held by a record lock that ends with it, so that what a killed process
 * had is free again as on a real card. No lock is held while memory is taken: a stopped process must not stop
 * the others. A taker announces in its own slot, adds all live slots up, then commits or withdraws.
 */
#include "fake_cuda.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { CARD_SLOTS = 128, CARD_UNIT = 4096 };

/* In units: announced in the upper half, committed in the lower, so that one step moves between them. */
typedef struct card_slot {
  _Atomic uint64_t units[FAKE_DEVICES];
} card_slot;

static card_slot card_private[1];
static card_slot *card_slots = card_private;
static int card_n = 1, card_mine, card_fd = -1;
static uint64_t card_total; /* bytes of each card */

static int card_lock(int slot, int command, struct flock *lock) {
  *lock = (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = slot, .l_len = 1};
  return fcntl(card_fd, command, lock);
}

/* 0, or -1 when the file cannot be used. */
int fake_card_open(const char *path, uint64_t total) {
  card_total = total;
  if (!path) return 0;
  card_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  size_t size = CARD_SLOTS * sizeof(card_slot);
  if (card_fd < 0 || ftruncate(card_fd, (off_t)size) != 0) return -1;
  void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, card_fd, 0);
  if (p == MAP_FAILED) return -1;
  for (int i = 0; i < CARD_SLOTS; i++) {
    struct flock lock;
    if (card_lock(i, F_SETLK, &lock) != 0) continue;
    card_slots = p;
    card_n = CARD_SLOTS;
    card_mine = i;
    for (int k = 0; k < FAKE_DEVICES; k++) atomic_store(&card_slots[i].units[k], 0);
    return 0;
  }
  return -1;
}

static void card_sum(int device, uint64_t *committed, uint64_t *announced) {
  *committed = *announced = 0;
  for (int i = 0; i < card_n; i++) {
    uint64_t units = atomic_load(&card_slots[i].units[device]);
    struct flock lock;
    if (units == 0 || (i != card_mine && (card_lock(i, F_GETLK, &lock) != 0 || lock.l_type == F_UNLCK)))
      continue;
    *committed += (units & UINT32_MAX) * CARD_UNIT;
    *announced += (units >> 32) * CARD_UNIT;
  }
}

/* 1: the bytes are this process's now. Others' announcements are waited for a little, for they may be
   withdrawn, but not for long: who announced may be stopped. */
int fake_card_take(int device, uint64_t bytes) {
  uint64_t n = bytes / CARD_UNIT, committed, announced;
  _Atomic uint64_t *mine = &card_slots[card_mine].units[device];
  for (int tries = 0; tries < 200; tries++) {
    atomic_fetch_add(mine, n << 32);
    card_sum(device, &committed, &announced);
    if (committed + announced <= card_total) {
      atomic_fetch_sub(mine, (n << 32) - n);
      return 1;
    }
    atomic_fetch_sub(mine, n << 32);
    if (committed + bytes > card_total) return 0;
    struct timespec t = {0, 20000 + (getpid() * 7919 + tries * 104729) % 80000};
    (void)nanosleep(&t, NULL);
  }
  return 0;
}

void fake_card_give(int device, uint64_t bytes) {
  atomic_fetch_sub(&card_slots[card_mine].units[device], bytes / CARD_UNIT);
}

uint64_t fake_card_taken(int device) {
  return (atomic_load(&card_slots[card_mine].units[device]) & UINT32_MAX) * CARD_UNIT;
}

void fake_card_info(int device, size_t *free_bytes, size_t *total) {
  uint64_t committed, announced;
  card_sum(device, &committed, &announced);
  *free_bytes = committed < card_total ? card_total - committed : 0;
  *total = card_total;
}
