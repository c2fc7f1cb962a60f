/*
 * The test harness: tests register themselves, the runner (runner.c) finds them.
 *
 *   TEST(region, states) { ... CHECK_OK(kvcached_ensure(r, 0, page)); ... }
 *
 * is the test "region.states". It runs on the backend under test, which KVCACHED_BACKEND names (host, host-2m
 * or cuda; default host) and support.h opens. TEST_HOST is for facts of host memory or of the library that
 * have nothing to do with a device: it runs whatever is chosen, on host memory with small pages. TEST_CUDA
 * runs only where cuda is chosen.
 *
 * A check that does not hold says where and why and ends the process; the runner then goes on with the next
 * test in a fresh one.
 */
#ifndef CHECK_H
#define CHECK_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvcached.h"

typedef enum test_where { ON_BACKEND, ON_HOST, ON_CUDA } test_where;

typedef struct test_case {
  const char *suite, *name;
  test_where where;
  void (*run)(void);
  struct test_case *next;
} test_case;

void test_register(test_case *test);

#define TEST_ON(where, suite, name)                                                               \
  static void test_##name(void);                                                                  \
  static test_case case_##name = {#suite, #name, where, test_##name, NULL};                       \
  __attribute__((constructor)) static void register_##name(void) { test_register(&case_##name); } \
  static void test_##name(void)
#define TEST(suite, name) TEST_ON(ON_BACKEND, suite, name)
#define TEST_HOST(suite, name) TEST_ON(ON_HOST, suite, name)
#define TEST_CUDA(suite, name) TEST_ON(ON_CUDA, suite, name)

/* Ends the test in whose body it stands, for what this machine cannot do at all. With KVCACHED_BACKEND=cuda
   the runner counts a skip as a failure. */
#define SKIP(reason)   \
  do {                 \
    test_skip(reason); \
    return;            \
  } while (0)
void test_skip(const char *reason);

/* What a random test is doing, told with a failure: its seed, its step. */
void test_note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* Says what failed and ends the process. */
_Noreturn void check_failed(const char *file, int line, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

#define CHECK(cond)                                                           \
  do {                                                                        \
    if (!(cond)) check_failed(__FILE__, __LINE__, "CHECK failed: %s", #cond); \
  } while (0)

/* Two whole numbers that must be equal; both are shown. */
#define CHECK_EQ(a, b)                                                                        \
  do {                                                                                        \
    long long a_ = (long long)(a), b_ = (long long)(b);                                       \
    if (a_ != b_) check_failed(__FILE__, __LINE__, "%s is %lld, %s is %lld", #a, a_, #b, b_); \
  } while (0)

/* a <= b, both shown; as unsigned numbers. */
#define CHECK_LE(a, b)                                                                           \
  do {                                                                                           \
    unsigned long long a_ = (unsigned long long)(a), b_ = (unsigned long long)(b);               \
    if (a_ > b_) check_failed(__FILE__, __LINE__, "%s is %llu, above %s, %llu", #a, a_, #b, b_); \
  } while (0)

/* Two texts that must be equal. */
#define CHECK_TEXT(a, b)                                                                               \
  do {                                                                                                 \
    const char *a_ = (a), *b_ = (b);                                                                   \
    if (strcmp(a_, b_) != 0) check_failed(__FILE__, __LINE__, "%s is \"%s\", not \"%s\"", #a, a_, b_); \
  } while (0)

/* A library call and the code it must return. */
#define CHECK_IS(call, code)                                                                     \
  do {                                                                                           \
    int got_ = (call), want_ = (code);                                                           \
    if (got_ != want_)                                                                           \
      check_failed(__FILE__, __LINE__, "%s returned %s, not %s", #call, kvcached_err_name(got_), \
                   kvcached_err_name(want_));                                                    \
  } while (0)
#define CHECK_OK(call) CHECK_IS(call, KVCACHED_OK)

/* The detail of the last error must hold a text. */
#define CHECK_DETAIL(text)                                                          \
  do {                                                                              \
    if (!strstr(kvcached_last_error(), text))                                       \
      check_failed(__FILE__, __LINE__, "the last error does not say \"%s\"", text); \
  } while (0)

#endif
