/* A small test harness: CHECK stops the program at the first thing that does not hold and says where. */
#ifndef CHECK_H
#define CHECK_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include <stdio.h>
#include <stdlib.h>

#include "kvcached.h"

#define CHECK(cond)                                                                             \
  do {                                                                                          \
    if (!(cond)) {                                                                              \
      fprintf(stderr, "%s:%d: CHECK failed: %s\n  last error: %s\n", __FILE__, __LINE__, #cond, \
              kvcached_last_error());                                                           \
      exit(1);                                                                                  \
    }                                                                                           \
  } while (0)

/* Two whole numbers that must be equal; both are shown. */
#define CHECK_EQ(a, b)                                                                                     \
  do {                                                                                                     \
    long long a_ = (long long)(a), b_ = (long long)(b);                                                    \
    if (a_ != b_) {                                                                                        \
      fprintf(stderr, "%s:%d: %s is %lld, %s is %lld\n  last error: %s\n", __FILE__, __LINE__, #a, a_, #b, \
              b_, kvcached_last_error());                                                                  \
      exit(1);                                                                                             \
    }                                                                                                      \
  } while (0)

/* A library call and the code it must return. */
#define CHECK_IS(call, code)                                                                          \
  do {                                                                                                \
    int got_ = (call);                                                                                \
    if (got_ != (code)) {                                                                             \
      fprintf(stderr, "%s:%d: %s returned %s, not %s\n  last error: %s\n", __FILE__, __LINE__, #call, \
              kvcached_err_name(got_), kvcached_err_name(code), kvcached_last_error());               \
      exit(1);                                                                                        \
    }                                                                                                 \
  } while (0)
#define CHECK_OK(call) CHECK_IS(call, KVCACHED_OK)

/* The detail of the last error must hold a text. */
#define CHECK_DETAIL(text) CHECK(strstr(kvcached_last_error(), text) != NULL)

#define RUN(test)             \
  do {                        \
    test();                   \
    printf("ok %s\n", #test); \
    fflush(stdout);           \
  } while (0)

#define SKIP(test, reason)                 \
  do {                                     \
    printf("skip %s: %s\n", test, reason); \
    fflush(stdout);                        \
  } while (0)

#endif
