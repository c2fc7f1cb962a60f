/* Figures, as a table for people and as JSON. */
#ifndef REPORT_H
#define REPORT_H

#include <stddef.h>
#include <stdio.h>
#include <stdint.h>

/* Measurements of one thing. Zero it before use; report_row empties it. */
typedef struct samples {
  double *v;
  size_t n, capacity;
} samples;
void samples_add(samples *s, double value);
double samples_median(const samples *s); /* 0 when there are none */
void samples_free(samples *s);

typedef struct report report;
report *report_new(void);
void report_free(report *rep);

/* Facts about the run ("device", "NVIDIA H200"), in the order given. */
void report_fact(report *rep, const char *key, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

void report_section(report *rep, const char *title);

/* A row: what was measured of the library, and of raw calls beside it (NULL: nothing to compare with). key:
   for programs, ends in the unit (lower case, digits and '_'); label: for people; unit: "us", "ms", "GB/s",
   "calls" ... The ratio library / raw is of the medians. Samples are copied. */
typedef struct report_row_id {
  const char *key, *label, *unit;
} report_row_id;
void report_row(report *rep, report_row_id id, const samples *library, const samples *raw);
void report_value(report *rep, report_row_id id, double value);

typedef enum bound_kind { AT_MOST, AT_LEAST } bound_kind;
/* Bounds for the row added last: of its ratio, or of the library's median. */
void report_bound_ratio(report *rep, bound_kind kind, double bound);
void report_bound_value(report *rep, bound_kind kind, double bound);

/* How many bounds do not hold, and how many there are. */
size_t report_failures(const report *rep, size_t *bounds);

void report_table(const report *rep);
/* Closes the file. 0, or -1 with errno. */
int report_json(const report *rep, FILE *f);

#endif
