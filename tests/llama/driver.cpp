// Takes every architecture through the schedule, in four cache configurations, stock and elastic, and compares.
//
//   llama-archs compare [--arch NAME]... [--part I/N]   one JSON line a case, then one with the counts
//   llama-archs memory|fault|retry|shift|device|head|ahead|control   the checks of memory.cpp and room.cpp, one JSON line a result
//
// Exit 0: all compared cases are equal, all checks hold. 1: not. 2: usage.

#include "memory.h"
#include "schedule.h"

#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include <unistd.h>

static const unsigned SECONDS = 120; // a case takes about one

static void log_errors(ggml_log_level level, const char * text, void *) {
    if (level >= GGML_LOG_LEVEL_WARN) {
        fputs(text, stderr);
    }
}

struct comparison {
    std::string status; // equal, different, skipped
    std::string why;
    std::vector<std::pair<std::string, std::string>> left_out; // step, why
    size_t values = 0;
    std::map<std::string, double> figures;
};

static comparison compare(const arch_case & which, const cache_config & config, const environment & elastic) {
    comparison            res;
    std::set<std::string> left_out;
    const auto work = [&](reporter & to) {
        llama_log_set(log_errors, nullptr);
        run_schedule(which, config, left_out, to);
    };
    outcome stock;
    while (true) {
        stock = in_child({ { "OLLAMA_KVCACHED_ENABLED", "0" } }, SECONDS, work);
        if (stock.failure.empty()) {
            break;
        }
        // what stock cannot do either is left out, and said
        static const std::set<std::string> optional = { "seq_rm", "state", "seq_cp", "shift", "whole state", "long" };
        if (!optional.count(stock.last_step) || left_out.count(stock.last_step)) {
            // and elastic must end the same way
            const outcome other = in_child(elastic, SECONDS, work);
            const bool    same  = other.last_step == stock.last_step && !other.failure.empty() && other.values == stock.values;
            res.status = same ? "skipped" : "different";
            res.why    = stock.last_step + ": " + stock.failure;
            if (!same) {
                res.why = "stock ends at " + res.why + "; elastic at " + other.last_step + ": " + other.failure;
            }
            return res;
        }
        left_out.insert(stock.last_step);
        res.left_out.emplace_back(stock.last_step, stock.failure);
    }
    const outcome other = in_child(elastic, SECONDS, work);
    res.values  = stock.values.size();
    res.figures = other.figures;
    res.status  = "different";
    if (!other.failure.empty()) {
        res.why = other.last_step + ": " + other.failure;
    } else if (!other.faults.empty()) {
        res.why = other.faults.front();
    } else if (other.values != stock.values) {
        const auto at = std::mismatch(stock.values.begin(), stock.values.end(), other.values.begin(), other.values.end());
        res.why = at.first == stock.values.end() ? "more values" : at.first->first + ": stock " + at.first->second +
                  (at.second == other.values.end() ? "" : ", elastic " + at.second->second);
    } else {
        res.status = "equal";
    }
    return res;
}

std::string json(const std::string & text) {
    std::string res = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            res += '\\';
        }
        res += static_cast<unsigned char>(c) < 32 ? ' ' : c;
    }
    return res + "\"";
}

static int compare_all(const std::vector<std::string> & names, unsigned part, unsigned parts, const environment & elastic) {
    size_t counts[3] = { 0, 0, 0 };
    const char * statuses[3] = { "equal", "different", "skipped" };
    size_t at = 0;
    for (const arch_case & which : all_archs()) {
        if (!names.empty() && std::find(names.begin(), names.end(), which.name) == names.end()) {
            continue;
        }
        if (at++ % parts != part) {
            continue;
        }
        for (const cache_config & config : CONFIGS) {
            const comparison res = compare(which, config, elastic);
            std::string left_out;
            for (const auto & [step, why] : res.left_out) {
                left_out += (left_out.empty() ? "" : ", ") + json(step) + ": " + json(why);
            }
            std::string figures;
            for (const auto & [name, value] : res.figures) {
                figures += (figures.empty() ? "" : ", ") + json(name) + ": " + std::to_string((long long) value);
            }
            printf("{\"arch\": %s, \"config\": %s, \"status\": %s, \"why\": %s, \"values\": %zu, \"left_out\": {%s}, "
                   "\"figures\": {%s}}\n",
                   json(which.name).c_str(), json(config.name).c_str(), json(res.status).c_str(), json(res.why).c_str(),
                   res.values, left_out.c_str(), figures.c_str());
            fflush(stdout);
            for (int i = 0; i < 3; ++i) {
                counts[i] += res.status == statuses[i];
            }
        }
    }
    printf("{\"equal\": %zu, \"different\": %zu, \"skipped\": %zu}\n", counts[0], counts[1], counts[2]);
    return counts[1] == 0 && counts[0] > 0 ? 0 : 1;
}

static int usage(const char * program) {
    fprintf(stderr, "usage: %s compare [--arch NAME]... [--part I/N] | memory | fault | retry | shift | device | head | ahead | control\n", program);
    return 2;
}

int main(int argc, char ** argv) {
    const std::string        what = argc > 1 ? argv[1] : "";
    std::vector<std::string> names;
    unsigned                 part = 0, parts = 1;
    for (int i = 2; i < argc; ++i) {
        if (strcmp(argv[i], "--arch") == 0 && i + 1 < argc) {
            names.push_back(argv[++i]);
        } else if (strcmp(argv[i], "--part") == 0 && i + 1 < argc && sscanf(argv[i + 1], "%u/%u", &part, &parts) == 2 &&
                   part < parts) {
            ++i;
        } else {
            return usage(argv[0]);
        }
    }
    const std::string ledger  = P_tmpdir "/kvcached-archs-" + std::to_string(getpid());
    const environment elastic = {
        { "OLLAMA_KVCACHED_ENABLED", "1" }, { "KVCACHED_LEDGER", ledger }, { "KVCACHED_PAGE_SIZE", "4096" },
    };
    int res = 2;
    if (what == "compare") {
        res = compare_all(names, part, parts, elastic);
    } else if (what == "memory") {
        res = check_memory(elastic);
    } else if (what == "fault") {
        res = check_fault(elastic);
    } else if (what == "retry") {
        res = check_retry(elastic);
    } else if (what == "shift") {
        res = check_shift(elastic);
    } else if (what == "device") {
        res = check_device(elastic);
    } else if (what == "head") {
        res = check_head(elastic);
    } else if (what == "ahead") {
        res = check_ahead(elastic);
    } else if (what == "control") {
        res = check_control(elastic);
    } else {
        return usage(argv[0]);
    }
    remove(ledger.c_str());
    return res;
}
