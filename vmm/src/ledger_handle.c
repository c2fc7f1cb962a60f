/* Handles of the ledger: opening and closing, and all that the process has. */
#include "ledger_impl.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- all open ledgers of the process ---- */

/* A forked child has to drop their descriptors, or it would keep their slots alive. */

static pthread_mutex_t all_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct kvcached_ledger *all;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;
static int fork_error;

static void before_fork(void) { (void)pthread_mutex_lock(&all_mutex); }

static void after_fork_parent(void) { (void)pthread_mutex_unlock(&all_mutex); }

static void after_fork_child(void) {
  for (struct kvcached_ledger *l = all; l; l = l->next) {
    (void)close(l->fd);
    l->fd = -1;
  }
  all = NULL;
  (void)pthread_mutex_unlock(&all_mutex);
}

static void install_fork_handlers(void) {
  fork_error = pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

int kvc_ledger_open(const char *path, kvcached_ledger_t *out) {
  *out = NULL;
  (void)pthread_once(&fork_once, install_fork_handlers);
  if (fork_error) return kvc_fail_errno(KVCACHED_E_NOMEM, fork_error, "installing the fork handlers");

  struct kvcached_ledger *l = calloc(1, sizeof(*l));
  if (!l) return kvc_fail(KVCACHED_E_NOMEM, "no memory for a ledger handle");
  int err = KVCACHED_OK;
  l->path = strdup(path);
  if (!l->path) {
    err = kvc_fail(KVCACHED_E_NOMEM, "no memory for the ledger's path");
    goto fail;
  }
  l->pid = getpid();
  int e = pthread_mutex_init(&l->mutex, NULL);
  if (e) {
    err = kvc_fail_errno(KVCACHED_E_SYSTEM, e, "making a mutex");
    goto fail;
  }
  /* The list's lock is held from before the descriptor exists: a fork in between would lose sight of it. */
  (void)pthread_mutex_lock(&all_mutex);
  err = kvc_ledger_file_open(l->path, &l->fd, &l->map);
  if (!err) {
    l->next = all;
    all = l;
  }
  (void)pthread_mutex_unlock(&all_mutex);
  if (err) {
    (void)pthread_mutex_destroy(&l->mutex);
    goto fail;
  }
  *out = l;
  return KVCACHED_OK;

fail:
  free(l->path);
  free(l);
  return err;
}

void kvc_ledger_set_owner(kvcached_ledger_t l, struct kvcached_ctx *owner) {
  (void)pthread_mutex_lock(&all_mutex);
  l->owner = owner;
  (void)pthread_mutex_unlock(&all_mutex);
}

size_t kvc_ledger_owners(int (*wanted)(const struct kvcached_ctx *ctx), struct kvcached_ctx **out, size_t n) {
  size_t found = 0;
  (void)pthread_mutex_lock(&all_mutex);
  for (struct kvcached_ledger *l = all; l && found < n; l = l->next)
    if (l->owner && wanted(l->owner)) out[found++] = l->owner;
  (void)pthread_mutex_unlock(&all_mutex);
  return found;
}

int kvcached_ledger_open(const char *path, kvcached_ledger_t *out) {
  if (!out) return kvc_fail(KVCACHED_E_INVAL, "out is NULL");
  *out = NULL;
  if (path && !*path) return kvc_fail(KVCACHED_E_INVAL, "the ledger's path is empty");
  char host[KVCACHED_PATH_MAX];
  if (!path) {
    int err = kvcached_ledger_default_path(NULL, host, sizeof(host));
    if (err) return err;
  }
  return kvc_ledger_open(path ? path : host, out);
}

void kvcached_ledger_close(kvcached_ledger_t l) {
  if (!l || l->pid != getpid()) return;
  (void)pthread_mutex_lock(&all_mutex);
  for (struct kvcached_ledger **p = &all; *p; p = &(*p)->next) {
    if (*p == l) {
      *p = l->next;
      break;
    }
  }
  (void)pthread_mutex_unlock(&all_mutex);
  /* Dropped by name: a child made by a bare clone() shares the open file, and closing it here would not end
   * the locks. */
  int dropped = 0;
  for (int i = 0; i < KVC_LEDGER_SLOTS; i++) {
    int holds = atomic_load(&l->held[i]);
    if (holds) (void)kvc_ledger_file_drop(l->fd, i, holds);
    dropped |= holds;
  }
  if (dropped) kvc_ledger_bell_ring(l);
  (void)munmap(l->map, sizeof(*l->map));
  (void)close(l->fd);
  (void)pthread_mutex_destroy(&l->mutex);
  free(l->path);
  free(l);
}

const char *kvcached_ledger_path(kvcached_ledger_t l) { return l ? l->path : NULL; }
