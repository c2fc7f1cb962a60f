/* Errors inside the library: one call sets the thread's detail and yields the code, so that a failing line
   reads `return kvc_fail(KVCACHED_E_INVAL, "...", ...)`. */
#ifndef KVC_ERROR_H
#define KVC_ERROR_H

/* Every source includes this first, directly or through its own header. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "../include/kvcached.h"

/* Sets kvcached_last_error() to the formatted text and returns err. */
int kvc_fail(int err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* The same with ": <errno's sentence>" at its end; errnum is an errno value. */
int kvc_fail_errno(int err, int errnum, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* E_FORKED; owner is the pid of the process that opened the handle. */
int kvc_fail_forked(long owner);

#endif
