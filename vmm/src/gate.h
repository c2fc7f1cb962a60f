/*
 * The gate: many may be inside at once (shared), or one alone. Entering costs one atomic step while nobody
 * wants to be alone. Who wants to be alone stops newcomers for a bounded time and waits for those inside to
 * leave; threads that are inside may enter again meanwhile, or they could wait for themselves.
 */
#ifndef KVC_GATE_H
#define KVC_GATE_H

#include "error.h"

#include <pthread.h>
#include <stdatomic.h>

typedef struct kvc_gate {
  uint64_t id; /* of this gate in its process, never used again: threads remember gates by it */
  _Atomic uint32_t
      state; /* threads inside (nested entries not counted), and a bit for who wants to be or is alone */
  pthread_mutex_t mutex;
  pthread_cond_t cond;
} kvc_gate;

/* A condition whose waits are counted on the clock that nobody sets; errno. */
int kvc_cond_init(pthread_cond_t *cond);

int kvc_gate_init(kvc_gate *gate);
void kvc_gate_destroy(kvc_gate *gate);

/* Enters, shared. *first: 1 when the thread was not inside before. *inside: how many threads are now. */
int kvc_gate_enter(kvc_gate *gate, int *first, uint32_t *inside);
/* Leaves. E_INVAL when the thread is not inside. *last: 1 when it is outside now. */
int kvc_gate_leave(kvc_gate *gate, int *last, uint32_t *inside);
/* Leaves, however often the thread has entered: *depth, 0 when it is not inside. *inside: how many are now.
 */
void kvc_gate_step_out(kvc_gate *gate, uint64_t *depth, uint32_t *inside);
/* Enters again as often; waits for who is alone. */
void kvc_gate_step_in(kvc_gate *gate, uint64_t depth, uint32_t *inside);
/* How many threads are inside. */
uint32_t kvc_gate_inside(const kvc_gate *gate);
/* Whether the calling thread is inside. */
int kvc_gate_is_inside(const kvc_gate *gate);

/* To be alone: E_BUSY when others were still inside after wait_ms, at once when the calling thread is itself.
 */
int kvc_gate_lock(kvc_gate *gate, uint32_t wait_ms);
void kvc_gate_unlock(kvc_gate *gate);

#endif
