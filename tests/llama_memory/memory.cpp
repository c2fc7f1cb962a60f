// Says how many bytes libllama allocates for a model and for contexts of it, by device.
//
//   memory MODEL.gguf [--gpu] [--metadata] [--write FILE] [--type TYPE]
//
// Each line of standard input is a context: n_ctx n_seq_max unified flash_attn type_k type_v n_batch n_ubatch swa_full.
// Each line of standard output answers one: "ok CPU_MODEL CPU_CONTEXT GPU_MODEL GPU_CONTEXT", or "error MESSAGE".
// --metadata: the file holds metadata only, and libllama makes up the tensors. --write: a file of that metadata and those
// tensors, all zero, matrices of type TYPE where their rows are whole blocks of it.
// --gpu: all layers on a device that computes nothing and allocates as ggml-cuda does: tensors aligned to 128 bytes, the
// end of quantised ones padded to 512 elements.

#include "ggml-alloc.h"
#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "gguf.h"
#include "llama-ext.h"
#include "llama.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace {

// ---------------------------------------------------------------------------------------------------- a device --

const char * name_of(ggml_backend_t) { return "GPU0"; }
const char * device_name(ggml_backend_dev_t) { return "GPU0"; }
const char * type_name(ggml_backend_buffer_type_t) { return "GPU0"; }
const char * registry_name(ggml_backend_reg_t) { return "GPU"; }

void buffer_free(ggml_backend_buffer_t buffer) {
    if (buffer->context) {
        munmap(buffer->context, buffer->size ? buffer->size : 1);
    }
}
void * buffer_base(ggml_backend_buffer_t buffer) { return buffer->context; }
// nothing is computed, so nothing has to be there
void buffer_memset(ggml_backend_buffer_t, ggml_tensor *, uint8_t, size_t, size_t) {}
void buffer_set(ggml_backend_buffer_t, ggml_tensor *, const void *, size_t, size_t) {}
void buffer_get(ggml_backend_buffer_t, const ggml_tensor *, void * data, size_t, size_t size) { memset(data, 0, size); }
void buffer_clear(ggml_backend_buffer_t, uint8_t) {}

const ggml_backend_buffer_i & buffer_interface() {
    static const ggml_backend_buffer_i iface = [] {
        ggml_backend_buffer_i i = {};
        i.free_buffer   = buffer_free;
        i.get_base      = buffer_base;
        i.memset_tensor = buffer_memset;
        i.set_tensor    = buffer_set;
        i.get_tensor    = buffer_get;
        i.clear         = buffer_clear;
        return i;
    }();
    return iface;
}

ggml_backend_buffer_t type_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    void * at = mmap(nullptr, size ? size : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? nullptr : ggml_backend_buffer_init(buft, buffer_interface(), at, size);
}
size_t type_alignment(ggml_backend_buffer_type_t) { return 128; }
size_t type_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * t) {
    const size_t size = ggml_nbytes(t);
    if (ggml_is_quantized(t->type) && t->ne[0] % 512 != 0) {
        return size + ggml_row_size(t->type, 512 - t->ne[0] % 512);
    }
    return size;
}

ggml_backend_dev_t device();

ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t dev) {
    static ggml_backend_buffer_type buft = { { type_name, type_alloc, type_alignment, nullptr, type_alloc_size, nullptr },
                                             dev, nullptr };
    return &buft;
}

void backend_free(ggml_backend_t backend) { delete backend; }
ggml_status backend_compute(ggml_backend_t, ggml_cgraph *, int) { return GGML_STATUS_FAILED; }

// what a struct's last members are called differs by date: set those that have been there always, by name
template <typename I> auto set_compute(I & i, int) -> decltype(i.graph_compute = backend_compute, void()) {
    i.graph_compute = backend_compute;
}
ggml_status backend_compute_old(ggml_backend_t, ggml_cgraph *) { return GGML_STATUS_FAILED; }
template <typename I> auto set_compute(I & i, long) -> decltype(i.graph_compute = backend_compute_old, void()) {
    i.graph_compute = backend_compute_old;
}

ggml_backend_t device_init(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = { 'k', 'v', 'p', 'a', 't', 'c', 'h', 'm', 'e', 'm', 'o', 'r', 'y', 0, 0, 1 };
    ggml_backend_i iface = {};
    iface.get_name = name_of;
    iface.free     = backend_free;
    set_compute(iface, 0);
    return new ggml_backend{ &guid, iface, dev, nullptr };
}

void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = size_t(80) << 30; }
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }
void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = {};
    props->name = props->description = device_name(dev);
    props->type = device_type(dev);
    device_memory(dev, &props->memory_free, &props->memory_total);
}
// the shapes for which ggml-cuda has state-space kernels; whatever it lacks beyond these, the test's models do not have
bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    if (op->op == GGML_OP_SSM_CONV) {
        return op->src[0]->ne[1] % 128 == 0;
    }
    if (op->op == GGML_OP_SSM_SCAN) {
        const ggml_tensor * state = op->src[0];
        if (op->src[3]->ne[0] == 1) {
            return (state->ne[0] == 128 || state->ne[0] == 256) && state->ne[1] % 16 == 0;
        }
        return state->ne[0] == 16 && state->ne[1] == 1 && state->ne[2] % 128 == 0 && op->src[4]->ne[1] == 1;
    }
    return true;
}
bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) { return buft == buffer_type(dev); }

size_t registry_count(ggml_backend_reg_t) { return 1; }
ggml_backend_dev_t registry_device(ggml_backend_reg_t, size_t) { return device(); }

ggml_backend_reg_t registry() {
    static ggml_backend_reg reg = { GGML_BACKEND_API_VERSION,
                                    { registry_name, registry_count, registry_device, nullptr },
                                    nullptr };
    return &reg;
}

ggml_backend_dev_t device() {
    static ggml_backend_device dev = [] {
        ggml_backend_device_i i = {};
        i.get_name        = device_name;
        i.get_description = device_name;
        i.get_memory      = device_memory;
        i.get_type        = device_type;
        i.get_props       = device_props;
        i.init_backend    = device_init;
        i.get_buffer_type = buffer_type;
        i.supports_op     = device_supports_op;
        i.supports_buft   = device_supports_buft;
        return ggml_backend_device{ i, registry(), nullptr };
    }();
    return &dev;
}

// ------------------------------------------------------------------------------------------------------ the rest --

std::string last_error;

void keep_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        last_error = text;
        for (char & c : last_error) {
            c = c == '\n' ? ' ' : c;
        }
    }
    if (getenv("MEMORY_LOG")) {
        fputs(text, stderr);
    }
}

std::vector<const ggml_tensor *> made;

void note_tensor(ggml_tensor * tensor, void *) { made.push_back(tensor); }

// matrices that nothing but a matrix product reads
bool can_be(const ggml_tensor & tensor, ggml_type type) {
    const std::string name = tensor.name;
    return ggml_n_dims(&tensor) >= 2 && tensor.ne[0] % ggml_blck_size(type) == 0 && name.rfind("blk.", 0) == 0 &&
           (name.find(".attn_") != std::string::npos || name.find(".ffn_") != std::string::npos) &&
           name.find("norm") == std::string::npos && name.find(".weight") != std::string::npos;
}

void write_model(const gguf_context * metadata, const std::string & path, ggml_type type) {
    size_t most = 0;
    for (const ggml_tensor * t : made) {
        most = std::max(most, ggml_nbytes(t));
    }
    const std::vector<char> zeros(most);
    gguf_context * out = gguf_init_empty();
    gguf_set_kv(out, metadata);
    for (const ggml_tensor * t : made) {
        const std::string name = t->name;
        if (gguf_find_tensor(out, t->name) >= 0 || (name.size() > 5 && name.compare(name.size() - 5, 5, "scale") == 0)) {
            // made up twice where a file would have it once (the output matrix, frequencies a layer), or a scale, which is
            // only looked for beside a matrix that is loaded, so not where that one is skipped
            continue;
        }
        ggml_tensor copy = *t;
        copy.buffer = nullptr;
        copy.data   = const_cast<char *>(zeros.data());
        gguf_add_tensor(out, &copy);
        if (can_be(copy, type)) {
            gguf_set_tensor_type(out, copy.name, type);
            gguf_set_tensor_data(out, copy.name, zeros.data());
        }
    }
    if (!gguf_write_to_file(out, path.c_str(), false)) {
        fprintf(stderr, "cannot write %s\n", path.c_str());
        exit(2);
    }
    gguf_free(out);
}

ggml_type type_called(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * known = ggml_type_name(ggml_type(i));
        if (known && name == known) {
            return ggml_type(i);
        }
    }
    fprintf(stderr, "no type is called %s\n", name.c_str());
    exit(2);
}

} // namespace

int main(int argc, char ** argv) {
    std::string path, out, type = "f32";
    bool gpu = false, metadata = false;
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        if (word == "--gpu") {
            gpu = true;
        } else if (word == "--metadata") {
            metadata = true;
        } else if (word == "--write" && i + 1 < argc) {
            out = argv[++i];
        } else if (word == "--type" && i + 1 < argc) {
            type = argv[++i];
        } else {
            path = word;
        }
    }
    if (path.empty()) {
        fprintf(stderr, "usage: %s MODEL.gguf [--gpu] [--metadata] [--write FILE] [--type TYPE] < contexts\n", argv[0]);
        return 2;
    }
    llama_log_set(keep_errors, nullptr);
    if (gpu) {
        ggml_backend_register(registry());
    }
    llama_backend_init();

    llama_model_params params = llama_model_default_params();
    ggml_backend_dev_t none[] = { nullptr };
    params.devices         = gpu ? nullptr : none;
    params.n_gpu_layers    = gpu ? -1 : 0;
    params.load_mode       = LLAMA_LOAD_MODE_NONE;
    params.use_extra_bufts = false;
    params.load_mtp        = metadata; // makes up layers for drafting too, which a later load skips

    llama_model * model = nullptr;
    if (metadata) {
        ggml_context * tensors = nullptr;
        gguf_context * gguf    = gguf_init_from_file(path.c_str(), { /* no_alloc = */ true, &tensors });
        model = gguf ? llama_model_init_from_user(gguf, note_tensor, nullptr, params) : nullptr;
        if (model && !out.empty()) {
            write_model(gguf, out, type_called(type));
        }
    } else {
        model = llama_model_load_from_file(path.c_str(), params);
    }
    if (!model) {
        printf("error not loaded: %s\n", last_error.c_str());
        return 1;
    }

    std::string line;
    while (std::getline(std::cin, line)) {
        std::istringstream words(line);
        llama_context_params want = llama_context_default_params();
        int unified = 0, flash_attn = 0, swa_full = 0;
        std::string k, v;
        words >> want.n_ctx >> want.n_seq_max >> unified >> flash_attn >> k >> v >> want.n_batch >> want.n_ubatch >> swa_full;
        if (!words) {
            fprintf(stderr, "not a context: %s\n", line.c_str());
            return 2;
        }
        want.kv_unified      = unified;
        want.flash_attn_type = flash_attn ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
        want.type_k          = type_called(k);
        want.type_v          = type_called(v);
        want.swa_full        = swa_full;
        want.n_threads       = 1;
        want.n_threads_batch = 1;

        last_error.clear();
        llama_context * context = llama_init_from_model(model, want);
        if (!context) {
            printf("error %s\n", last_error.c_str());
            fflush(stdout);
            continue;
        }
        size_t sums[2][2] = {};
        for (const auto & [buft, data] : llama_get_memory_breakdown(context)) {
            const int there = gpu && buft == buffer_type(device());
            sums[there][0] += data.model;
            sums[there][1] += data.context;
        }
        printf("ok %zu %zu %zu %zu\n", sums[0][0], sums[0][1], sums[1][0], sums[1][1]);
        fflush(stdout);
        llama_free(context);
    }
    llama_model_free(model);
    return 0;
}
