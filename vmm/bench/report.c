#include "report.h"
#include "bench.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct summary {
  size_t n; /* 0: not measured */
  double median, min, max;
} summary;

typedef struct row {
  char key[96], label[96], unit[16];
  const char *section; /* owned by the report */
  summary library, raw;
  int bounded; /* 0: no; 1: the ratio; 2: the library's median */
  bound_kind kind;
  double bound;
} row;

typedef struct fact {
  char key[48], value[256];
} fact;

struct report {
  row *rows;
  size_t n_rows, rows_capacity;
  fact facts[32];
  size_t n_facts;
  char *sections[32];
  size_t n_sections;
};

static void *grow(void *p, size_t *capacity, size_t size) {
  *capacity = *capacity ? *capacity * 2 : 64;
  p = realloc(p, *capacity * size);
  if (!p) bench_fail("no memory for the figures");
  return p;
}

void samples_add(samples *s, double value) {
  if (s->n == s->capacity) s->v = grow(s->v, &s->capacity, sizeof(*s->v));
  s->v[s->n++] = value;
}

void samples_free(samples *s) {
  free(s->v);
  *s = (samples){0};
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static summary summarise(const samples *s) {
  summary r = {0};
  if (!s || s->n == 0) return r;
  double *v = malloc(s->n * sizeof(*v));
  if (!v) bench_fail("no memory for the figures");
  memcpy(v, s->v, s->n * sizeof(*v));
  qsort(v, s->n, sizeof(*v), by_value);
  r.n = s->n;
  r.min = v[0];
  r.max = v[s->n - 1];
  r.median = (v[(s->n - 1) / 2] + v[s->n / 2]) / 2;
  free(v);
  return r;
}

double samples_median(const samples *s) { return summarise(s).median; }

report *report_new(void) {
  report *rep = calloc(1, sizeof(*rep));
  if (!rep) bench_fail("no memory for the figures");
  return rep;
}

void report_free(report *rep) {
  for (size_t i = 0; i < rep->n_sections; i++) free(rep->sections[i]);
  free(rep->rows);
  free(rep);
}

void report_fact(report *rep, const char *key, const char *fmt, ...) {
  if (rep->n_facts == sizeof(rep->facts) / sizeof(rep->facts[0])) bench_fail("too many facts");
  fact *f = &rep->facts[rep->n_facts++];
  (void)snprintf(f->key, sizeof(f->key), "%s", key);
  va_list ap;
  va_start(ap, fmt);
  (void)vsnprintf(f->value, sizeof(f->value), fmt, ap);
  va_end(ap);
}

void report_section(report *rep, const char *title) {
  if (rep->n_sections == sizeof(rep->sections) / sizeof(rep->sections[0])) bench_fail("too many sections");
  char *copy = malloc(strlen(title) + 1);
  if (!copy) bench_fail("no memory for the figures");
  memcpy(copy, title, strlen(title) + 1);
  rep->sections[rep->n_sections++] = copy;
}

void report_row(report *rep, report_row_id id, const samples *library, const samples *raw) {
  if (rep->n_rows == rep->rows_capacity) rep->rows = grow(rep->rows, &rep->rows_capacity, sizeof(*rep->rows));
  row *r = &rep->rows[rep->n_rows++];
  *r = (row){.section = rep->n_sections ? rep->sections[rep->n_sections - 1] : ""};
  (void)snprintf(r->key, sizeof(r->key), "%s", id.key);
  (void)snprintf(r->label, sizeof(r->label), "%s", id.label);
  (void)snprintf(r->unit, sizeof(r->unit), "%s", id.unit);
  r->library = summarise(library);
  r->raw = summarise(raw);
}

void report_value(report *rep, report_row_id id, double value) {
  samples s = {.v = &value, .n = 1, .capacity = 1};
  report_row(rep, id, &s, NULL);
}

/* 0: there are not two sides. */
static double ratio(const row *r) {
  return r->library.n && r->raw.n && r->raw.median > 0 ? r->library.median / r->raw.median : 0;
}

static void bound(report *rep, int what, bound_kind kind, double value) {
  row *r = &rep->rows[rep->n_rows - 1];
  r->bounded = what;
  r->kind = kind;
  r->bound = value;
}

void report_bound_ratio(report *rep, bound_kind kind, double value) { bound(rep, 1, kind, value); }

void report_bound_value(report *rep, bound_kind kind, double value) { bound(rep, 2, kind, value); }

static int holds(const row *r) {
  if (r->bounded == 1 && ratio(r) <= 0) return 0; /* nothing measured on one side proves nothing */
  double value = r->bounded == 1 ? ratio(r) : r->library.median;
  return r->library.n > 0 && (r->kind == AT_MOST ? value <= r->bound : value >= r->bound);
}

size_t report_failures(const report *rep, size_t *bounds) {
  size_t failures = 0;
  *bounds = 0;
  for (size_t i = 0; i < rep->n_rows; i++) {
    if (!rep->rows[i].bounded) continue;
    ++*bounds;
    failures += !holds(&rep->rows[i]);
  }
  return failures;
}

/* ---- table ---- */

static void print_number(double v) {
  double size = v < 0 ? -v : v;
  printf(" %10.*f", size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : 3, v);
}

static void print_summary(const summary *s) {
  if (s->n == 0) {
    printf(" %10s %10s %10s", "-", "", "");
    return;
  }
  print_number(s->median);
  if (s->n == 1) {
    printf(" %10s %10s", "", "");
    return;
  }
  print_number(s->min);
  print_number(s->max);
}

void report_table(const report *rep) {
  for (size_t i = 0; i < rep->n_facts; i++) printf("%-16s %s\n", rep->facts[i].key, rep->facts[i].value);
  const char *section = NULL;
  for (size_t i = 0; i < rep->n_rows; i++) {
    const row *r = &rep->rows[i];
    if (r->section != section) {
      section = r->section;
      printf("\n%-48s %-6s %10s %10s %10s %10s %10s %10s %7s  %s\n", section, "unit", "library", "min", "max",
             "raw", "min", "max", "ratio", "bound");
    }
    printf("  %-46s %-6s", r->label, r->unit);
    print_summary(&r->library);
    print_summary(&r->raw);
    if (ratio(r) > 0)
      printf(" %7.3f", ratio(r));
    else
      printf(" %7s", "");
    if (r->bounded)
      printf("  %s %s%g", holds(r) ? "ok" : "FAIL", r->kind == AT_MOST ? "<= " : ">= ", r->bound);
    printf("\n");
  }
}

/* ---- JSON ---- */

static void json_string(FILE *f, const char *s) {
  (void)fputc('"', f);
  for (; *s; s++) {
    unsigned char c = (unsigned char)*s;
    if (c == '"' || c == '\\')
      (void)fprintf(f, "\\%c", c);
    else if (c < 0x20)
      (void)fprintf(f, "\\u%04x", c);
    else
      (void)fputc(c, f);
  }
  (void)fputc('"', f);
}

static void json_summary(FILE *f, const char *name, const summary *s) {
  if (s->n == 0) {
    (void)fprintf(f, ", \"%s\": null", name);
    return;
  }
  (void)fprintf(f, ", \"%s\": {\"median\": %.9g, \"min\": %.9g, \"max\": %.9g, \"n\": %zu}", name, s->median,
                s->min, s->max, s->n);
}

int report_json(const report *rep, FILE *f) {
  size_t bounds, failures = report_failures(rep, &bounds);
  (void)fprintf(f, "{\"schema\": \"kvcached-bench/1\",\n \"facts\": {");
  for (size_t i = 0; i < rep->n_facts; i++) {
    (void)fprintf(f, "%s\n  ", i ? "," : "");
    json_string(f, rep->facts[i].key);
    (void)fprintf(f, ": ");
    json_string(f, rep->facts[i].value);
  }
  (void)fprintf(f, "},\n \"figures\": [");
  for (size_t i = 0; i < rep->n_rows; i++) {
    const row *r = &rep->rows[i];
    (void)fprintf(f, "%s\n  {\"name\": ", i ? "," : "");
    json_string(f, r->key);
    (void)fprintf(f, ", \"unit\": ");
    json_string(f, r->unit);
    (void)fprintf(f, ", \"section\": ");
    json_string(f, r->section);
    (void)fprintf(f, ", \"label\": ");
    json_string(f, r->label);
    json_summary(f, "library", &r->library);
    json_summary(f, "raw", &r->raw);
    if (ratio(r) > 0)
      (void)fprintf(f, ", \"ratio\": %.6g", ratio(r));
    else
      (void)fprintf(f, ", \"ratio\": null");
    if (r->bounded)
      (void)fprintf(f, ", \"bound\": {\"of\": \"%s\", \"%s\": %g, \"holds\": %s}",
                    r->bounded == 1 ? "ratio" : "library", r->kind == AT_MOST ? "at_most" : "at_least",
                    r->bound, holds(r) ? "true" : "false");
    (void)fprintf(f, "}");
  }
  (void)fprintf(f, "],\n \"bounds\": %zu, \"bounds_failed\": %zu}\n", bounds, failures);
  int broken = ferror(f);
  if (fclose(f) != 0 || broken) return -1;
  return 0;
}
