// The models: what the tree's own architecture test makes, one tiny model with random weights for each architecture.
#pragma once

#include "llama-cpp.h"

#include <cstdint>
#include <string>
#include <vector>

struct arch_case {
    std::string name;        // "llama", "llama-moe"
    int         arch   = 0;  // llm_arch
    bool        moe    = false;
    bool        encode = false; // upstream's test encodes before it decodes
};

// in upstream's order
std::vector<arch_case> all_archs();

// Throws std::runtime_error where the architecture does not load.
llama_model_ptr make_model(const arch_case & which);

// the same for each call with the same arguments
std::vector<llama_token> make_tokens(uint32_t n, uint32_t n_vocab, uint32_t seed);
