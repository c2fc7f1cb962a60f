// What a case goes through, and the four cache configurations.
#pragma once

#include "archs.h"
#include "child.h"

#include <set>

struct cache_config {
    const char * name;
    bool         unified;
    bool         flash;
    bool         quantised; // K and V as q8_0
};

extern const cache_config CONFIGS[4];

llama_context_ptr make_context(llama_model & model, const cache_config & config, uint32_t n_ctx, uint32_t n_seq);

// Runs the schedule and reports a value for each step; left_out: steps to go past.
void run_schedule(const arch_case & which, const cache_config & config, const std::set<std::string> & left_out, reporter & to);

// -------------------------------------------------------------------------------------------- shared by all programs --

class session {
  public:
    session(llama_model & model, llama_context & ctx) : model(model), ctx(ctx), mem(llama_get_memory(&ctx)) {}

    // decodes the tokens `seqs` times over, a sequence each, at its next positions; the sum of all logits' bytes
    // rc: llama_decode's result; on failure the positions stay as they were
    uint64_t decode(const std::vector<llama_token> & tokens, const std::vector<llama_seq_id> & seqs, int & rc);
    // the same, with tokens made up; throws when llama_decode fails
    std::string grow(uint32_t n, const std::vector<llama_seq_id> & seqs);

    uint32_t n_vocab() const;

    llama_model   & model;
    llama_context & ctx;
    llama_memory_t  mem; // NULL: the architecture has none
    llama_pos       pos[256] = {};

  private:
    uint32_t calls = 0;
};

// the bytes as a short text
uint64_t    fnv(const void * data, size_t size, uint64_t start = 14695981039346656037ull);
std::string hex(uint64_t value);
