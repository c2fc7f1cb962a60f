// Checks of when room is asked for and given up; and of what ggml-cuda sees of a buffer.
#include "memory.h"

#include "kvcached-internal.h"
#include "llama-kvcached.h"
#include "llama-model.h"

#include "ggml/src/ggml-backend-impl.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>

// -------------------------------------------------------------------------------------------------------- retry --

// a sequence has gone but its pages are kept for a new one: a decode that needs their room takes it, at once
int check_retry(const environment & elastic) {
    const auto work = [](reporter & to) {
        llama_log_set(quiet, nullptr);
        llama_model_ptr   model = make_model(find_arch("llama"));
        llama_context_ptr ctx   = make_context(*model, CONFIGS[1], 8192, 4);
        session s(*model, *ctx);
        to.begin("grow");
        for (int i = 0; i < 8; ++i) {
            s.grow(64, { 0 });
            s.grow(64, { 1 });
        }
        to.figure("full", double(mapped()));
        to.begin("the other's room");
        llama_memory_seq_rm(s.mem, 1, -1, -1);
        for (int i = 0; i < 8; ++i) {
            to.value("one", s.grow(64, { 0 })); // throws where it is refused
        }
        if (llama_kvcached::relieved()) {
            to.fault("what was released is told twice");
        }
    };
    const outcome free = in_child(elastic, 120, work);
    bool ok = ended_well(free, "retry");
    if (ok) {
        environment tight = elastic;
        tight.emplace_back("KVCACHED_LIMIT", std::to_string((long long) free.figures.at("full")));
        const outcome ours = in_child(tight, 120, work);
        ok = ended_well(ours, "retry");
        if (ok) {
            ok = ours.values == free.values;
            printf("{\"check\": \"retry\", \"ok\": %s}\n", ok ? "true" : "false");
        }
    }
    return ok ? 0 : 1;
}

// -------------------------------------------------------------------------------------------------------- shift --

// One sequence is shifted beside n - 1 others, which go on; it goes where that is refused.
static void run_shift(const cache_config & config, uint32_t n_ctx, uint32_t n, reporter & to) {
    llama_log_set(quiet, nullptr);
    llama_model_ptr   model = make_model(find_arch("llama"));
    llama_context_ptr ctx   = make_context(*model, config, n_ctx, std::max(n, 4u));
    session s(*model, *ctx);
    to.begin("grow");
    for (int i = 0; i < 5; ++i) {
        s.grow(60, { 0 });
    }
    std::vector<llama_seq_id> on;
    for (uint32_t seq = 0; seq < n; ++seq) {
        if (seq > 0) {
            to.value("other", s.grow(seq == 1 ? 40 : 1, { llama_seq_id(seq) }));
        }
        if ((seq > 0 || n == 1) && seq < 32) {
            on.push_back(llama_seq_id(seq));
        }
    }
    to.figure("before", double(mapped()));
    to.begin("shift");
    llama_memory_seq_rm(s.mem, 0, 0, 100);
    llama_memory_seq_add(s.mem, 0, 100, -1, -100);
    s.pos[0] -= 100;
    int rc = 0;
    const uint64_t sum = s.decode(make_tokens(20, s.n_vocab(), 7), { 0 }, rc);
    to.figure("refused", rc);
    if (rc == 0) {
        to.value("shifted", hex(sum));
    } else {
        llama_memory_seq_rm(s.mem, 0, -1, -1);
    }
    to.figure("after", double(mapped()));
    to.value("go on", s.grow(1, on));
}

// A shift maps nothing that is not mapped already: it is done under a limit that leaves room for nothing else. With more streams
// than a graph holds operations for, all of K is mapped for it; without room it is refused, and the others' values are stock's.
int check_shift(const environment & elastic) {
    struct {
        const char *         name;
        const cache_config & config;
        uint32_t             n_ctx, n;
        bool                 whole;
    } const cases[] = {
        { "one stream", CONFIGS[0], 65536, 1, false },
        { "streams", CONFIGS[1], 65536, 3, false },
        { "streams, no flash attention", CONFIGS[2], 65536, 3, false },
        { "streams, quantised", CONFIGS[3], 65536, 3, false },
        { "many streams", CONFIGS[1], 250*1024, 250, true },
    };
    bool all = true;
    for (const auto & one : cases) {
        const auto    work  = [&one](reporter & to) { run_shift(one.config, one.n_ctx, one.n, to); };
        const outcome stock = in_child({ { "OLLAMA_KVCACHED_ENABLED", "0" } }, 120, work);
        const outcome free  = in_child(elastic, 120, work);
        bool ok = ended_well(stock, one.name) && ended_well(free, one.name);
        if (ok) {
            // the compute buffer grows for the shift's own graph, and one step of cells may be made ready
            environment  tight = elastic;
            const double limit = free.figures.at(one.whole ? "before" : "after") + STEP;
            tight.emplace_back("KVCACHED_LIMIT", std::to_string((long long) limit));
            const outcome ours = in_child(tight, 120, work);
            ok = ended_well(ours, one.name);
            if (ok) {
                auto expected = stock.values;
                if (one.whole) {
                    expected.erase(std::remove_if(expected.begin(), expected.end(), [](const auto & v) { return v.first == "shifted"; }),
                                   expected.end());
                }
                const double more = free.figures.at("after") - free.figures.at("before");
                ok = free.values == stock.values && ours.values == expected && free.figures.at("refused") == 0 &&
                     ours.figures.at("refused") == (one.whole ? 1 : 0) && !expected.empty() &&
                     (one.whole ? more > 8*STEP : more <= 2*STEP); // every cell of every K would be many steps
            }
            printf("{\"check\": \"shift\", \"case\": %s, \"ok\": %s, \"before\": %.0f, \"after\": %.0f}\n", json(one.name).c_str(),
                   ok ? "true" : "false", free.figures.at("before"), free.figures.at("after"));
        }
        all = all && ok;
    }
    return all ? 0 : 1;
}

// ------------------------------------------------------------------------------------------------------- device --

// What a limited device says of its memory: what the limit leaves, less what is mapped; to whoever opens its contexts, its own.
int check_device(const environment & elastic) {
    const size_t limit = size_t(256) << 20;
    const auto work = [](reporter & to) {
        llama_log_set(quiet, nullptr);
        ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        const auto ask = [&](const char * free_name, const char * total_name) {
            size_t free = 0, total = 0;
            ggml_backend_dev_memory(dev, &free, &total);
            ggml_backend_dev_props props;
            ggml_backend_dev_get_props(dev, &props);
            if (props.memory_free != free || props.memory_total != total) {
                to.fault("properties say otherwise than the memory"); // looked at where both are the limit's
            }
            to.figure(free_name, double(free));
            to.figure(total_name, double(total));
        };
        llama_kvcached::limit_device(dev);
        llama_kvcached::limit_device(dev); // once is enough
        ask("free", "total");
        {
            llama_model_ptr   model = make_model(find_arch("llama"));
            llama_context_ptr ctx   = make_context(*model, CONFIGS[1], 8192, 4);
            session s(*model, *ctx);
            s.grow(64, { 0 });
            to.figure("mapped", double(mapped()));
            ask("free with a model", "total with a model");
        }
        ask("free after it", "total after it");
    };
    environment limited = elastic;
    limited.emplace_back("KVCACHED_LIMIT", std::to_string(limit));
    const outcome ours = in_child(limited, 120, work);
    const outcome free = in_child(elastic, 120, work);
    bool ok = ended_well(ours, "device") && ended_well(free, "device");
    if (ok) {
        const auto & f = ours.figures;
        ok = ours.faults.empty() && f.at("free") == double(limit) && f.at("total") == double(limit) && f.at("mapped") > 0 &&
             f.at("free with a model") == double(limit) - f.at("mapped") && f.at("free after it") == double(limit) &&
             free.figures.at("total") > double(limit) && free.figures.at("free") > double(limit);
        printf("{\"check\": \"device\", \"ok\": %s, \"free\": %.0f, \"free with a model\": %.0f}\n", ok ? "true" : "false",
               f.at("free"), f.at("free with a model"));
    }
    return ok ? 0 : 1;
}

// --------------------------------------------------------------------------------------------------------- head --

// ggml-cuda reads the number of the device and the address where its own buffers have them
int check_head(const environment & elastic) {
    const auto work = [](reporter & to) {
        llama_log_set(quiet, nullptr);
        llama_model_ptr model = make_model(find_arch("llama"));
        struct {
            int    device;
            void * dev_ptr;
        } head;
        double seen = 0;
        for (const auto & [name, tensor] : model->tensors_by_name) {
            ggml_backend_buffer_t buffer = tensor->buffer;
            memcpy(&head, buffer->context, sizeof(head));
            if (head.device != 0 || head.dev_ptr != ggml_backend_buffer_get_base(buffer)) {
                to.fault(name + " is in a buffer that begins otherwise");
            }
            ++seen;
        }
        to.figure("tensors", seen);
    };
    const outcome run = in_child(elastic, 120, work);
    const bool    ok  = ended_well(run, "head") && run.figures.at("tensors") > 0;
    if (ok) {
        printf("{\"check\": \"head\", \"ok\": true, \"tensors\": %.0f}\n", run.figures.at("tensors"));
    }
    return ok ? 0 : 1;
}
