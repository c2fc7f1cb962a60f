#include "memory.h"

#include "llama-ext.h"
#include "llama-kvcached.h"

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include <unistd.h>

static const double PAGE = 4096; // of KV, in bytes; what driver.cpp sets

void quiet(ggml_log_level level, const char * text, void *) {
    if (level >= GGML_LOG_LEVEL_WARN) {
        fputs(text, stderr);
    }
}

const arch_case & find_arch(const std::string & name) {
    static const std::vector<arch_case> all = all_archs();
    for (const arch_case & one : all) {
        if (one.name == name) {
            return one;
        }
    }
    throw std::runtime_error("upstream's test has no architecture " + name);
}

// KV in use: mapped for the cells, not kept for reuse or made ready
static uint64_t kv_used() {
    // pages on their way to be ready are mapped and not yet idle: asked until that has an end
    uint64_t res = 0, last = 1;
    for (int i = 0; i < 1000 && res != last; ++i) {
        last = res;
        res  = 0;
        for (const auto & device : llama_kvcached::figures()) {
            res += device.mapped[0] - device.idle; // weights and compute buffers have no idle pages
        }
        usleep(2000);
    }
    return res;
}

uint64_t mapped() {
    uint64_t res = 0;
    for (const auto & device : llama_kvcached::figures()) {
        res += device.mapped[0] + device.mapped[1] + device.mapped[2];
    }
    return res;
}

bool ended_well(const outcome & run, const char * what) {
    if (run.failure.empty() && run.faults.empty()) {
        return true;
    }
    printf("{\"check\": %s, \"ok\": false, \"why\": %s}\n", json(what).c_str(),
           json(run.failure.empty() ? run.faults.front() : run.last_step + ": " + run.failure).c_str());
    return false;
}

// ------------------------------------------------------------------------------------------------------- memory --

int check_memory(const environment & elastic) {
    static const struct { const char * kind, * arch; } kinds[] = {
        { "full", "llama" }, { "sliding window", "gemma3" }, { "hybrid", "jamba" }, { "hybrid", "granitehybrid" },
        { "mla", "deepseek2-moe" }, { "mla", "mistral4-moe" },
    };
    bool all = true;
    for (const auto & [kind, arch] : kinds) {
        const auto work = [&arch = arch](reporter & to) {
            llama_log_set(quiet, nullptr);
            llama_model_ptr   model = make_model(find_arch(arch));
            llama_context_ptr ctx   = make_context(*model, CONFIGS[0], 65536, 1);
            session s(*model, *ctx);
            for (int i = 0; i < 4; ++i) {
                s.grow(64, { 0 });
            }
            uint64_t context = 0, kv = 0;
            for (const auto & [_, bytes] : llama_get_memory_breakdown(ctx.get())) {
                context += bytes.context;
            }
            for (const auto & device : llama_kvcached::figures()) {
                kv += device.mapped[0];
            }
            to.figure("context", double(context)); // as llama.cpp reports it
            to.figure("kv", double(kv));           // as the library counts it
        };
        const outcome stock = in_child({ { "OLLAMA_KVCACHED_ENABLED", "0" } }, 120, work);
        const outcome ours  = in_child(elastic, 120, work);
        if (!ended_well(stock, arch) || !ended_well(ours, arch)) {
            all = false;
            continue;
        }
        const double full = stock.figures.at("context"), part = ours.figures.at("kv"), said = ours.figures.at("context");
        // recurrent state ends within a page
        const bool   ok   = part > 0 && part < 0.1*full && said <= part && said > part - PAGE;
        printf("{\"check\": %s, \"arch\": %s, \"ok\": %s, \"stock\": %.0f, \"mapped\": %.0f, \"reported\": %.0f, "
               "\"percent\": %.2f}\n",
               json(kind).c_str(), json(arch).c_str(), ok ? "true" : "false", full, part, said, 100*part/full);
        all = all && ok;
    }
    return all ? 0 : 1;
}

// -------------------------------------------------------------------------------------------------------- fault --

// a sequence grows until there is no room; then it goes, and the others go on
static void run_fault(const cache_config & config, reporter & to) {
    llama_log_set(quiet, nullptr);
    to.begin("load");
    llama_model_ptr   model = make_model(find_arch("llama"));
    llama_context_ptr ctx   = make_context(*model, config, 8192, 4);
    session s(*model, *ctx);

    to.begin("grow");
    to.value("one", s.grow(40, { 0 }));
    to.value("two", s.grow(40, { 1 }));
    to.figure("at the start", double(mapped()));

    const bool limited = llama_kvcached::n_live.load() != 0 && getenv("KVCACHED_LIMIT");
    const auto tokens  = make_tokens(64, s.n_vocab(), 7);
    if (limited) {
        int rc = 0, steps = 0;
        uint64_t before = 0;
        for (; rc == 0 && steps < 128; ++steps) {
            before = kv_used();
            s.decode(tokens, { 2 }, rc);
        }
        to.figure("steps", steps);
        if (rc != 1) {
            to.fault("llama_decode gave " + std::to_string(rc) + " where there was no room");
        }
        if (llama_kvcached::no_room().empty()) {
            to.fault("no_room() says nothing");
        }
        if (kv_used() != before) {
            to.fault("a refused step left " + std::to_string((long long) (kv_used() - before)) + " bytes");
        }
        // refused again the same way
        s.decode(tokens, { 2 }, rc);
        if (rc != 1 || kv_used() != before) {
            to.fault("the second refusal is not as the first");
        }
        to.begin("restore and copy");
        std::vector<uint8_t> state(llama_state_seq_get_size(ctx.get(), 2));
        state.resize(llama_state_seq_get_data(ctx.get(), state.data(), state.size(), 2));
        if (state.empty() || llama_state_seq_set_data(ctx.get(), state.data(), state.size(), 3) != 0 || kv_used() != before) {
            to.fault("a state for which there was no room was restored, or left something");
        }
        if (!config.unified) { // else a copy takes nothing
            llama_memory_seq_cp(s.mem, 2, 3, -1, -1);
            s.pos[3] = s.pos[2];
            s.decode({ tokens[0] }, { 3 }, rc);
            if (rc != 1 || kv_used() != before) {
                to.fault("a copy between streams for which there was no room was made, or left something");
            }
            llama_memory_seq_rm(s.mem, 3, -1, -1);
        }
        llama_memory_seq_rm(s.mem, 2, -1, -1);
        s.pos[2] = s.pos[3] = 0;
    }
    to.begin("after"); // pages that the third sequence left go to the fourth
    to.value("one", s.grow(5, { 0 }));
    to.value("two", s.grow(1, { 0, 1 }));
    for (int i = 0; i < 6; ++i) {
        to.value("four", s.grow(64, { 3 }));
    }
    to.value("all", s.grow(1, { 0, 1, 3 }));
    if (limited) {
        to.begin("empty");
        llama_memory_clear(s.mem, false);
        llama_kvcached::idle(ctx.get());
        for (const auto & device : llama_kvcached::figures()) {
            if (device.mapped[0] != 0) {
                to.fault(std::to_string(device.mapped[0]) + " bytes of KV are mapped for no cell");
            }
        }
        ctx.reset();
        model.reset();
        if (mapped() != 0) {
            to.fault(std::to_string(mapped()) + " bytes are mapped after the end");
        }
    }
}

int check_fault(const environment & elastic) {
    bool all = true;
    for (const cache_config & config : CONFIGS) {
        const auto work = [&config](reporter & to) { run_fault(config, to); };
        const outcome stock = in_child({ { "OLLAMA_KVCACHED_ENABLED", "0" } }, 120, work);
        const outcome free  = in_child(elastic, 120, work);
        if (!ended_well(stock, config.name) || !ended_well(free, config.name)) {
            all = false;
            continue;
        }
        // room for the start and a little more than two steps; without flash attention V of the third sequence is mapped in full
        const double room = 2.3*STEP + (config.flash ? 0 : 2048/256*STEP/2);
        environment tight = elastic;
        tight.emplace_back("KVCACHED_LIMIT", std::to_string((long long) (free.figures.at("at the start") + room)));
        const outcome ours = in_child(tight, 120, work);
        if (!ended_well(ours, config.name)) {
            all = false;
            continue;
        }
        const bool ok = ours.values == stock.values && free.values == stock.values;
        printf("{\"check\": \"no room\", \"config\": %s, \"ok\": %s, \"steps\": %.0f}\n", json(config.name).c_str(),
               ok ? "true" : "false", ours.figures.at("steps"));
        all = all && ok;
    }
    return all ? 0 : 1;
}

// -------------------------------------------------------------------------------------------------------- ahead --

static llama_kvcached::device_figures device() {
    const auto all = llama_kvcached::figures();
    if (all.size() != 1) {
        throw std::runtime_error(std::to_string(all.size()) + " devices where one is expected");
    }
    return all.front();
}

int check_ahead(const environment & elastic) {
    const auto work = [](reporter & to) {
        llama_log_set(quiet, nullptr);
        llama_model_ptr   model = make_model(find_arch("llama"));
        llama_context_ptr ctx   = make_context(*model, CONFIGS[0], 4096, 4);
        session s(*model, *ctx);

        // a helper thread or each decode maps a part, so both get time
        const auto wait_ready = [&](const char * when) {
            to.begin(when);
            for (int i = 0; i < 40 && device().ready < STEP; ++i) {
                s.grow(1, { 0 });
                usleep(10000);
            }
            if (const auto now = device(); now.ready != STEP) {
                to.fault(std::string(when) + ": " + std::to_string(now.ready) + " bytes are ready, not one step");
            }
        };
        s.grow(40, { 0 });
        wait_ready("the first step");

        to.begin("nothing grows");
        const auto before = device();
        for (int i = 0; i < 100; ++i) {
            s.grow(1, { 0 });
        }
        const auto after = device();
        if (after.ensures != before.ensures || after.releases != before.releases || after.mapped[0] != before.mapped[0]) {
            to.fault("decodes within a step changed what is mapped");
        }

        to.begin("the step is taken");
        while (s.pos[0] < 256) {
            s.grow(1, { 0 });
        }
        const uint64_t used = kv_used();
        s.grow(1, { 0 });
        wait_ready("the second step");
        to.figure("taken", double(kv_used() - used));
        if (kv_used() - used != uint64_t(STEP)) {
            to.fault("the second step used " + std::to_string(kv_used() - used) + " bytes");
        }

        to.begin("a new prompt");
        const auto full = device();
        llama_memory_seq_rm(s.mem, 0, -1, -1);
        s.pos[0] = 0;
        s.grow(64, { 0 });
        if (const auto now = device(); now.ensures != full.ensures || now.releases != full.releases) {
            to.fault("a new prompt does not take over the pages of the one before");
        }
        for (int i = 0; i < 40; ++i) {
            s.grow(1, { 0 });
        }
        if (kv_used() != uint64_t(STEP)) {
            to.fault("pages without cells are still in use after many decodes");
        }
    };
    const outcome run = in_child(elastic, 120, work);
    const bool    ok  = ended_well(run, "look-ahead");
    if (ok) {
        printf("{\"check\": \"look-ahead\", \"ok\": true, \"step\": %.0f}\n", run.figures.at("taken"));
    }
    return ok ? 0 : 1;
}

// ------------------------------------------------------------------------------------------------------- control --

int check_control(const environment & elastic) {
    // without flash attention: that CPU kernel does not look at masked cells, the other reads them all
    const cache_config & config = CONFIGS[2];
    const auto work = [&config](reporter & to) {
        llama_log_set(quiet, nullptr);
        run_schedule(find_arch("llama"), config, {}, to);
    };
    environment too_few = elastic;
    too_few.emplace_back("KVCACHED_TEST_UNDERCOMMIT_PAGES", "1");
    const outcome whole = in_child(elastic, 120, work);
    const outcome ours  = in_child(too_few, 120, work);
    const bool    ok    = whole.failure.empty() && ours.signal == SIGSEGV; // the page that is not there
    printf("{\"check\": \"a page too few\", \"ok\": %s, \"why\": %s}\n", ok ? "true" : "false",
           json(whole.failure.empty() ? ours.last_step + ": " + ours.failure : "the control itself: " + whole.failure).c_str());
    return ok ? 0 : 1;
}
