/* Makes calls of the backend fail on purpose. */
#ifndef FAULT_H
#define FAULT_H

typedef enum fault_kind { FAULT_RESERVE, FAULT_MAP, FAULT_UNMAP, FAULT_ZERO, FAULT_KINDS } fault_kind;

/* From now on the nth call (1 = the next) of a kind fails with err, once; nth 0: none does. */
void fault_set(fault_kind kind, unsigned nth, int err);
void fault_clear(void);

/* Calls of a kind since the program began, failed ones included. */
unsigned fault_calls(fault_kind kind);

#endif
