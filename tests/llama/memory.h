// Checks that need other runs than the schedule's. Each prints a JSON line a result and returns the exit code.
#pragma once

#include "schedule.h"

// at 256 tokens of a 64K context less than a tenth of the KV that stock allocates is mapped
int check_memory(const environment & elastic);

// under a tight limit: llama_decode returns 1, the context stays usable, a refused step leaves nothing
int check_fault(const environment & elastic);

// a decode that finds no room takes what a sequence that has gone left, at once
int check_retry(const environment & elastic);

// a shift needs no more room than the cells have
int check_shift(const environment & elastic);

// a device that is limited says that it has what the limit leaves
int check_device(const environment & elastic);

// the context of an elastic buffer begins like one of ggml-cuda
int check_head(const environment & elastic);

// the cells after those in use are made ready; decodes that need no new cells leave the library alone; a new prompt takes
// over the pages of the one before
int check_ahead(const environment & elastic);

// a page too few at the end of each step must be noticed by the schedule
int check_control(const environment & elastic);

// a JSON string
std::string json(const std::string & text);

// ------------------------------------------------------------------------------------------------- shared by the checks --

const double STEP = 2.0*2*256*256*2; // bytes of 256 cells of the llama model: K and V, two layers, 256 values, f16

void quiet(ggml_log_level level, const char * text, void *);
const arch_case & find_arch(const std::string & name);
// KV, weights and compute buffers of all devices
uint64_t mapped();
// prints the result of a check whose run did not
bool ended_well(const outcome & run, const char * what);
