#include "schedule.h"

#include "llama-kvcached.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

const cache_config CONFIGS[4] = {
    { "unified+fa", true,  true,  false },
    { "split+fa",   false, true,  false },
    { "split-fa",   false, false, false },
    { "split+q8_0", false, true,  true  },
};

uint64_t fnv(const void * data, size_t size, uint64_t start) {
    uint64_t sum = start;
    for (size_t i = 0; i < size; ++i) {
        sum = (sum ^ static_cast<const unsigned char *>(data)[i])*1099511628211ull;
    }
    return sum;
}

std::string hex(uint64_t value) {
    char text[20];
    snprintf(text, sizeof(text), "%016llx", (unsigned long long) value);
    return text;
}

llama_context_ptr make_context(llama_model & model, const cache_config & config, uint32_t n_ctx, uint32_t n_seq) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = n_ctx;
    params.n_batch         = std::max(64u, n_seq);
    params.n_ubatch        = params.n_batch;
    params.n_seq_max       = n_seq;
    params.n_threads       = 1;
    params.n_threads_batch = 1;
    params.kv_unified      = config.unified;
    params.flash_attn_type = config.flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.swa_full        = false;
    if (config.quantised) {
        params.type_k = params.type_v = GGML_TYPE_Q8_0;
    }
    llama_context_ptr ctx(llama_init_from_model(&model, params));
    if (!ctx) {
        throw std::runtime_error("no context in this configuration");
    }
    return ctx;
}

// ------------------------------------------------------------------------------------------------------- session --

uint32_t session::n_vocab() const {
    return uint32_t(llama_vocab_n_tokens(llama_model_get_vocab(&model)));
}

uint64_t session::decode(const std::vector<llama_token> & tokens, const std::vector<llama_seq_id> & seqs, int & rc) {
    llama_batch batch = llama_batch_init(int32_t(tokens.size()*seqs.size()), 0, 1);
    for (size_t i = 0; i < tokens.size(); ++i) {
        for (const llama_seq_id seq : seqs) {
            const int at = batch.n_tokens++;
            batch.token[at]     = tokens[i];
            batch.pos[at]       = pos[seq] + llama_pos(i);
            batch.n_seq_id[at]  = 1;
            batch.seq_id[at][0] = seq;
            batch.logits[at]    = 1;
        }
    }
    rc = llama_decode(&ctx, batch);
    uint64_t sum = fnv("", 0);
    if (rc == 0) {
        for (int i = 0; i < batch.n_tokens; ++i) {
            const float * logits = llama_get_logits_ith(&ctx, i);
            if (!logits) {
                throw std::runtime_error("no logits");
            }
            sum = fnv(logits, n_vocab()*sizeof(float), sum);
        }
        for (const llama_seq_id seq : seqs) {
            pos[seq] += llama_pos(tokens.size());
        }
    }
    llama_batch_free(batch);
    return sum;
}

std::string session::grow(uint32_t n, const std::vector<llama_seq_id> & seqs) {
    int rc = 0;
    const uint64_t sum = decode(make_tokens(n, n_vocab(), ++calls), seqs, rc);
    if (rc != 0) {
        throw std::runtime_error("llama_decode gave " + std::to_string(rc));
    }
    return hex(sum);
}

// ------------------------------------------------------------------------------------------------ between steps --

namespace {

struct totals {
    uint64_t kind[3] = { 0, 0, 0 };
    uint64_t mapped = 0, asleep = 0, wakes = 0;
    totals() {
        for (const auto & device : llama_kvcached::figures()) {
            for (int i = 0; i < 3; ++i) {
                kind[i] += device.mapped[i];
                mapped  += device.mapped[i];
            }
            asleep += device.asleep;
            wakes  += device.wakes;
        }
    }
};

class disturber {
  public:
    disturber(reporter & to, llama_context & ctx) : to(to), ctx(ctx), weights(llama_model_size(llama_get_model(&ctx))) {
        const char * on = getenv("OLLAMA_KVCACHED_ENABLED");
        elastic = on && strcmp(on, "1") == 0;
    }

    // the next step finds everything asleep, and what no cell used given up in its sleep
    void sleep() {
        if (!elastic) {
            return;
        }
        const totals before;
        size_t freed = 0;
        const std::string why = llama_kvcached::sleep_all(1000, freed);
        const totals after;
        if (!why.empty()) {
            to.fault("sleep: " + why);
        } else if (!llama_kvcached::asleep() || after.mapped != 0) {
            to.fault("after sleep " + std::to_string(after.mapped) + " bytes are mapped");
        } else if (before.kind[1] < weights) {
            to.fault("of " + std::to_string(weights) + " bytes of weights " + std::to_string(before.kind[1]) + " were elastic");
        } else if (after.asleep < before.kind[1]) {
            to.fault("only " + std::to_string(after.asleep) + " of " + std::to_string(before.kind[1]) + " weight bytes sleep");
        }
        to.figure("weights slept", double(before.kind[1]));
        to.figure("slept", double(after.asleep));
        llama_kvcached::idle(&ctx);
        const totals later;
        if (!llama_kvcached::asleep() || later.mapped != 0 || later.wakes != after.wakes || later.asleep < before.kind[1]) {
            to.fault("giving back what no cell uses woke something");
        }
    }

    void wake() {
        const std::string why = elastic ? llama_kvcached::wake_all() : "";
        if (!why.empty() || (elastic && llama_kvcached::asleep())) {
            to.fault("wake: " + why);
        }
    }

    void trim() {
        if (!elastic) {
            return;
        }
        llama_kvcached::idle(&ctx);
        size_t freed = 0;
        const std::string why = llama_kvcached::trim_all(freed);
        if (!why.empty()) {
            to.fault("trim: " + why);
        }
        to.figure("trims", ++trims);
    }

  private:
    reporter      & to;
    llama_context & ctx;
    uint64_t        weights; // bytes
    bool            elastic = false;
    double          trims   = 0;
};

} // namespace

// ---------------------------------------------------------------------------------------------------- the schedule --

static std::string save(llama_context & ctx, llama_seq_id seq, std::vector<uint8_t> & state) {
    state.resize(llama_state_seq_get_size(&ctx, seq));
    state.resize(llama_state_seq_get_data(&ctx, state.data(), state.size(), seq));
    return std::to_string(state.size()) + " bytes " + hex(fnv(state.data(), state.size()));
}

static void encode(session & s, reporter & to) {
    const std::vector<llama_token> tokens = make_tokens(32, s.n_vocab(), 99);
    llama_batch batch = llama_batch_init(int32_t(tokens.size()), 0, 1);
    for (size_t i = 0; i < tokens.size(); ++i) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = llama_pos(i);
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = 1;
    }
    batch.n_tokens = int32_t(tokens.size());
    const int rc = llama_encode(&s.ctx, batch);
    llama_batch_free(batch);
    if (rc != 0) {
        throw std::runtime_error("llama_encode gave " + std::to_string(rc));
    }
    to.value("encode", "done"); // what it gave is in every decode after it
}

void run_schedule(const arch_case & which, const cache_config & config, const std::set<std::string> & left_out, reporter & to) {
    to.begin("load");
    llama_model_ptr   model = make_model(which);
    llama_context_ptr ctx   = make_context(*model, config, 2048, 4);
    session   s(*model, *ctx);
    disturber between(to, *ctx);

    const auto wanted = [&](const char * step) {
        if (left_out.count(step)) {
            return false;
        }
        to.begin(step);
        return true;
    };

    between.sleep();
    if (which.encode) {
        to.begin("encode");
        encode(s, to);
    }

    to.begin("prompts");
    const uint32_t lengths[4] = { 40, 23, 57, 9 };
    for (llama_seq_id seq = 0; seq < 4; ++seq) {
        to.value("prompt", s.grow(lengths[seq], { seq }));
        if (seq == 1) {
            between.trim();
        }
    }
    between.sleep();

    to.begin("joint");
    for (int i = 0; i < 8; ++i) {
        to.value("joint", s.grow(1, { 0, 1, 2, 3 }));
    }
    between.sleep();
    between.wake();
    to.value("joint", s.grow(3, { 0, 1, 2, 3 }));

    if (!s.mem) {
        to.value("memory", "the architecture has none: its steps are left out");
        between.sleep();
        to.value("again", s.grow(5, { 2 }));
        return;
    }

    if (wanted("seq_rm")) {
        const bool tail = llama_memory_seq_rm(s.mem, 0, 30, -1);
        const bool all  = llama_memory_seq_rm(s.mem, 1, -1, -1);
        to.value("seq_rm", std::string(tail ? "tail, " : "no tail, ") + (all ? "all" : "not all"));
        s.pos[0] = tail ? 30 : s.pos[0];
        s.pos[1] = all  ? 0  : s.pos[1];
        between.trim();
        to.value("seq_rm", s.grow(7, { 0 }));
        to.value("seq_rm", s.grow(33, { 1 }));
        between.sleep();
        to.value("seq_rm", s.grow(1, { 0, 1 }));
    }
    if (wanted("state")) {
        std::vector<uint8_t> state, again;
        between.sleep(); // saved while everything sleeps
        to.value("state", save(*ctx, 2, state));
        if (save(*ctx, 2, again); again != state) {
            to.fault("a state saved asleep is not the one saved awake");
        }
        const bool all = llama_memory_seq_rm(s.mem, 1, -1, -1);
        between.sleep(); // and restored so
        const size_t n = llama_state_seq_set_data(ctx.get(), state.data(), state.size(), 1);
        to.value("state", std::string(all ? "" : "not ") + "removed, " + std::to_string(n) + " bytes restored");
        if (n != 0) {
            s.pos[1] = s.pos[2];
            to.value("state", s.grow(4, { 1 }));
            to.value("state", s.grow(2, { 1, 2 }));
        }
    }
    if (wanted("seq_cp")) {
        llama_memory_seq_rm(s.mem, 3, -1, -1);
        llama_memory_seq_cp(s.mem, 2, 3, -1, -1);
        s.pos[3] = s.pos[2];
        between.sleep(); // with the copy still to be done
        to.value("seq_cp", s.grow(3, { 3 }));
        to.value("seq_cp", s.grow(1, { 2, 3 }));
    }
    if (wanted("shift") && llama_memory_can_shift(s.mem)) {
        const bool gone = llama_memory_seq_rm(s.mem, 2, 4, 12);
        to.value("shift", gone ? "removed" : "not removed");
        if (gone) {
            llama_memory_seq_add(s.mem, 2, 12, -1, -8);
            s.pos[2] -= 8;
            between.sleep(); // with the shift still to be done
            to.value("shift", s.grow(5, { 2 }));
            to.value("shift", s.grow(1, { 0, 1, 2, 3 }));
        }
    }
    if (wanted("whole state")) {
        between.sleep();
        std::vector<uint8_t> state(llama_state_get_size(ctx.get()));
        state.resize(llama_state_get_data(ctx.get(), state.data(), state.size()));
        to.value("whole state", std::to_string(state.size()) + " bytes " + hex(fnv(state.data(), state.size())));
        llama_memory_clear(s.mem, true);
        between.trim();
        between.sleep();
        to.value("whole state", std::to_string(llama_state_set_data(ctx.get(), state.data(), state.size())) + " bytes restored");
        for (llama_seq_id seq = 0; seq < 4; ++seq) {
            s.pos[seq] = llama_memory_seq_pos_max(s.mem, seq) + 1; // with split streams upstream restores the last alone
        }
        to.value("whole state", s.grow(2, { 3 }));
        to.value("whole state", s.grow(1, { 0, 1, 2, 3 }));
    }
    if (wanted("long")) { // past the first 256 cells of a stream, and past the context the models were made for
        llama_memory_clear(s.mem, false);
        std::fill(s.pos, s.pos + 4, 0);
        for (int i = 0; i < 6; ++i) {
            to.value("long", s.grow(57, { 0 }));
            to.value("long", s.grow(61, { 3 }));
            if (i == 2) {
                between.sleep();
            }
            if (i == 4) {
                between.trim();
            }
        }
        to.value("long", s.grow(1, { 0, 1, 3 }));
        llama_memory_seq_rm(s.mem, 3, -1, -1);
        s.pos[3] = 0;
        between.trim();
        between.sleep();
        to.value("long", s.grow(2, { 0, 3 }));
    }
    to.begin("end");
}
