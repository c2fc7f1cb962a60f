// Checks of when room is asked for and given up; and of what ggml-cuda sees of a buffer.
#include "memory.h"

#include "llama-kvcached.h"
#include "llama-model.h"

#include "ggml/src/ggml-backend-impl.h"

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

// with one stream a shift maps nothing that is not mapped already
int check_shift(const environment & elastic) {
    const auto work = [](reporter & to) {
        llama_log_set(quiet, nullptr);
        llama_model_ptr   model = make_model(find_arch("llama"));
        llama_context_ptr ctx   = make_context(*model, CONFIGS[0], 65536, 4);
        session s(*model, *ctx);
        to.begin("grow");
        for (int i = 0; i < 5; ++i) {
            s.grow(60, { 0 });
        }
        to.figure("before", double(mapped()));
        to.begin("shift");
        llama_memory_seq_rm(s.mem, 0, 0, 100);
        llama_memory_seq_add(s.mem, 0, 100, -1, -100);
        s.pos[0] -= 100;
        to.value("shifted", s.grow(20, { 0 })); // throws where it is refused
        to.figure("after", double(mapped()));
    };
    const outcome stock = in_child({ { "OLLAMA_KVCACHED_ENABLED", "0" } }, 120, work);
    const outcome free  = in_child(elastic, 120, work);
    bool ok = ended_well(stock, "shift") && ended_well(free, "shift");
    if (ok) {
        // the compute buffer grows for the shift's own graph, and one step of cells may be made ready
        environment tight = elastic;
        tight.emplace_back("KVCACHED_LIMIT", std::to_string((long long) (free.figures.at("after") + STEP)));
        const outcome ours = in_child(tight, 120, work);
        ok = ended_well(ours, "shift");
        if (ok) {
            ok = ours.values == stock.values && free.values == stock.values;
            // every cell of every K mapped would be many steps more
            for (const outcome * run : { &free, &ours }) {
                ok = ok && run->figures.at("after") <= run->figures.at("before") + 2*STEP;
            }
            printf("{\"check\": \"shift\", \"ok\": %s, \"before\": %.0f, \"after\": %.0f}\n", ok ? "true" : "false",
                   ours.figures.at("before"), ours.figures.at("after"));
        }
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
