#include "child.h"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>

#include <poll.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static std::string one_line(std::string text) {
    std::replace_if(text.begin(), text.end(), [](char c) { return c == '\n' || c == '\t'; }, ' ');
    return text;
}

void reporter::line(const char * kind, const std::string & a, const std::string & b) {
    const std::string text = std::string(kind) + "\t" + one_line(a) + "\t" + one_line(b) + "\n";
    for (size_t at = 0; at < text.size(); ) {
        const ssize_t n = write(fd, text.data() + at, text.size() - at);
        if (n < 0 && errno != EINTR) {
            _exit(3);
        }
        at += n > 0 ? size_t(n) : 0;
    }
}

void reporter::begin(const std::string & step)                            { line("begin", step, ""); }
void reporter::value(const std::string & name, const std::string & value) { line("value", name, value); }
void reporter::figure(const std::string & name, double value)             { line("figure", name, std::to_string(value)); }
void reporter::fault(const std::string & what)                            { line("fault", what, ""); }

[[noreturn]] static void be_child(const environment & env, unsigned seconds, int report, int errors,
                                  const std::function<void(reporter &)> & work) {
    const struct rlimit no_core = { 0, 0 };
    setrlimit(RLIMIT_CORE, &no_core);
    dup2(errors, STDERR_FILENO);
    dup2(errors, STDOUT_FILENO);
    setenv("GGML_NO_BACKTRACE", "1", 1); // it would start a debugger
    for (const auto & [name, value] : env) {
        setenv(name.c_str(), value.c_str(), 1);
    }
    alarm(seconds);
    reporter to(report);
    try {
        work(to);
    } catch (const std::exception & err) {
        fprintf(stderr, "\nended by: %s\n", err.what());
        fflush(stderr);
        _exit(2);
    }
    fflush(nullptr);
    _exit(0);
}

// what the child said that explains its end
static std::string last_words(const std::string & text) {
    std::string last;
    size_t from = 0;
    while (from < text.size()) {
        const size_t end = std::min(text.find('\n', from), text.size());
        std::string  row = text.substr(from, end - from);
        from = end + 1;
        row.erase(std::remove_if(row.begin(), row.end(), [](unsigned char c) { return c < 32; }), row.end());
        if (row.find("GGML_ASSERT") != std::string::npos || row.find("ended by: ") == 0) {
            return row.substr(row.rfind('/') == std::string::npos ? 0 : row.rfind('/') + 1);
        }
        if (!row.empty()) {
            last = row;
        }
    }
    return last;
}

static void take_lines(outcome & res, const std::string & text) {
    size_t from = 0;
    for (size_t end; (end = text.find('\n', from)) != std::string::npos; from = end + 1) {
        const std::string row  = text.substr(from, end - from);
        const size_t      one  = row.find('\t');
        const size_t      two  = row.find('\t', one + 1);
        const std::string kind = row.substr(0, one), a = row.substr(one + 1, two - one - 1), b = row.substr(two + 1);
        if (kind == "begin") {
            res.last_step = a;
        } else if (kind == "value") {
            res.values.emplace_back(a, b);
        } else if (kind == "figure") {
            res.figures[a] = atof(b.c_str());
        } else {
            res.faults.push_back(a);
        }
    }
}

outcome in_child(const environment & env, unsigned seconds, const std::function<void(reporter &)> & work) {
    int report[2], errors[2];
    if (pipe(report) != 0 || pipe(errors) != 0) {
        throw std::runtime_error(std::string("pipe: ") + strerror(errno));
    }
    fflush(nullptr);
    const pid_t pid = fork();
    if (pid < 0) {
        throw std::runtime_error(std::string("fork: ") + strerror(errno));
    }
    if (pid == 0) {
        close(report[0]);
        close(errors[0]);
        be_child(env, seconds, report[1], errors[1], work);
    }
    close(report[1]);
    close(errors[1]);

    std::string   texts[2];
    struct pollfd fds[2] = { { report[0], POLLIN, 0 }, { errors[0], POLLIN, 0 } };
    for (int open = 2; open > 0; ) {
        if (poll(fds, 2, -1) < 0 && errno != EINTR) {
            throw std::runtime_error(std::string("poll: ") + strerror(errno));
        }
        for (int i = 0; i < 2; ++i) {
            if (fds[i].fd < 0 || fds[i].revents == 0) {
                continue;
            }
            char          buffer[65536];
            const ssize_t n = read(fds[i].fd, buffer, sizeof(buffer));
            if (n > 0) {
                texts[i].append(buffer, size_t(n));
            } else if (n == 0 || errno != EINTR) {
                close(fds[i].fd);
                fds[i].fd = -1;
                --open;
            }
        }
    }
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }

    outcome res;
    take_lines(res, texts[0]);
    if (WIFSIGNALED(status)) {
        res.signal  = WTERMSIG(status);
        res.failure = res.signal == SIGALRM ? "not done after " + std::to_string(seconds) + " s"
                                            : std::string(strsignal(res.signal)) + ": " + last_words(texts[1]);
    } else if (WEXITSTATUS(status) != 0) {
        res.failure = last_words(texts[1]);
    }
    return res;
}
