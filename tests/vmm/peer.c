/*
 * A second process for the tests of the ledger: opens one context and does what its standard input says.
 *
 *   peer LEDGER GROUP LIMIT SLOT     GROUP "-": none given
 *
 * Its first line is "open" or the error's name. Then one reply a command, "ok" or the error's name:
 *
 *   ensure N       the first N pages of its region
 *   release N      the same
 *   put N          release, then trim
 *   churn          maps and unmaps without end, until killed; no reply
 *   race PATH N    see race(); "won 1", "won 0" or "over"
 *   fork           makes a child without exec that only waits for the input to close
 */
#include "support.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGES 4096

static kvcached_ctx_t ctx;
static kvcached_region_t region;
static size_t page;

static const char *name_of(int err) { return err ? kvcached_err_name(err) : "ok"; }

static const char *put(size_t pages) {
  int err = kvcached_release(region, 0, pages * page);
  return name_of(err ? err : kvcached_trim(ctx, 0, NULL));
}

static void churn(void) {
  uint32_t seed = (uint32_t)getpid();
  for (;;) {
    size_t first = next_random(&seed) % (PAGES / 2), n = 1 + next_random(&seed) % (PAGES / 2);
    (void)kvcached_ensure(region, first * page, n * page);
    (void)kvcached_release(region, first * page, n * page);
    if (next_random(&seed) % 2) (void)kvcached_trim(ctx, 0, NULL);
  }
}

/* Takes and gives back for `rounds`; the file holds a number that every peer raises only while it holds the
   bytes, so that it can never pass the limit unless the library lets it. Says how often it won. */
static void race(const char *path, unsigned rounds, uint64_t limit) {
  int fd = open(path, O_RDWR | O_CLOEXEC);
  CHECK(fd >= 0);
  _Atomic uint64_t *held = mmap(NULL, sizeof(*held), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  CHECK(held != MAP_FAILED);
  close(fd);
  uint32_t seed = (uint32_t)getpid() * 2654435761u | 1;
  unsigned won = 0;
  /* When a peer first wins is up to the scheduler; that it wins once the others have ended is not. */
  for (unsigned i = 0; i < rounds || (won == 0 && i < 200 * rounds); i++) {
    uint64_t bytes = (1 + next_random(&seed) % 16) * page;
    if (kvcached_ensure(region, 0, bytes) == KVCACHED_OK) {
      won++;
      if (atomic_fetch_add(held, bytes) + bytes > limit) {
        printf("over\n");
        exit(1);
      }
      atomic_fetch_sub(held, bytes);
    }
    CHECK_OK(kvcached_release(region, 0, PAGES * page));
    CHECK_OK(kvcached_trim(ctx, 0, NULL));
  }
  munmap((void *)held, sizeof(*held));
  printf("won %d\n", won > 0);
}

int main(int argc, char **argv) {
  CHECK(argc == 5);
  setvbuf(stdout, NULL, _IOLBF, 0);
  kvcached_options_t o;
  kvcached_options_init(&o);
  o.ledger_path = argv[1];
  o.group = strcmp(argv[2], "-") ? argv[2] : NULL;
  o.limit = strtoull(argv[3], NULL, 10);
  o.slot = atoi(argv[4]);
  o.name = "peer";
  int err = kvcached_open(&o, &ctx);
  if (err) {
    printf("%s\n", kvcached_err_name(err));
    return 0;
  }
  CHECK_OK(kvcached_reserve(ctx, PAGES * kvcached_page_size(ctx), &region));
  page = kvcached_page_size(ctx);
  printf("open\n");

  char line[400], path[300];
  while (fgets(line, sizeof(line), stdin)) {
    size_t n;
    unsigned rounds;
    if (sscanf(line, "ensure %zu", &n) == 1) {
      printf("%s\n", name_of(kvcached_ensure(region, 0, n * page)));
    } else if (sscanf(line, "release %zu", &n) == 1) {
      printf("%s\n", name_of(kvcached_release(region, 0, n * page)));
    } else if (sscanf(line, "put %zu", &n) == 1) {
      printf("%s\n", put(n));
    } else if (strcmp(line, "churn\n") == 0) {
      churn();
    } else if (sscanf(line, "race %299s %u", path, &rounds) == 2) {
      race(path, rounds, o.limit);
    } else if (strcmp(line, "fork\n") == 0) {
      pid_t pid = fork();
      CHECK(pid >= 0);
      if (pid == 0) {
        char c;
        printf("ok\n"); /* said by the child: only then has its fork() ended */
        while (read(0, &c, 1) > 0) {
        }
        _exit(0);
      }
    } else {
      printf("unknown command\n");
    }
  }
  kvcached_shutdown(ctx);
  return 0;
}
