// The only file that sees the tree's test; its main() gets another name, and is not called.
#define main upstream_main
#include "test-llama-archs.cpp"
#undef main

#include "archs.h"

static const size_t SEED = 20260813;

// what upstream's loops leave out before they ask arch_supported()
static bool in_upstreams_loop(llm_arch arch) {
    return arch != LLM_ARCH_UNKNOWN && arch != LLM_ARCH_GEMMA4 && arch != LLM_ARCH_GEMMA4_ASSISTANT &&
           arch != LLM_ARCH_EAGLE3 && arch != LLM_ARCH_DFLASH;
}

std::vector<arch_case> all_archs() {
    std::vector<arch_case> res;
    for (const llm_arch & arch : llm_arch_all()) {
        if (!in_upstreams_loop(arch) || !arch_supported(arch)) {
            continue;
        }
        for (const bool moe : { false, true }) {
            if (moe ? !moe_implemented(arch) : moe_mandatory(arch)) {
                continue;
            }
            arch_case one;
            one.name   = std::string(llm_arch_name(arch)) + (moe ? "-moe" : "");
            one.arch   = arch;
            one.moe    = moe;
            one.encode = arch == LLM_ARCH_T5 || arch == LLM_ARCH_DREAM || arch == LLM_ARCH_LLADA || arch == LLM_ARCH_LLADA_MOE ||
                         arch == LLM_ARCH_RND1;
            res.push_back(one);
        }
    }
    return res;
}

static bool go_on(float, void *) {
    return true;
}

llama_model_ptr make_model(const arch_case & which) {
    gguf_context_ptr description = get_gguf_ctx(llm_arch(which.arch), which.moe);
    ggml_backend_dev_t none[] = { nullptr };
    llama_model_params params = llama_model_default_params();
    params.progress_callback = go_on; // else dots
    params.devices           = none;  // the CPU alone
    size_t seed = SEED;
    llama_model_ptr model(llama_model_init_from_user(description.get(), set_tensor_data, &seed, params));
    if (!model) {
        throw std::runtime_error("the model does not load");
    }
    return model;
}

std::vector<llama_token> make_tokens(uint32_t n, uint32_t n_vocab, uint32_t seed) {
    return get_tokens(n, n_vocab, seed);
}
