// Each case runs in a process of its own: upstream aborts on what it cannot do, and the switch is read once a process.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

using environment = std::vector<std::pair<std::string, std::string>>;

// what a child reports while it runs; every line is written at once, so a crash loses nothing
class reporter {
  public:
    explicit reporter(int fd) : fd(fd) {}
    void begin(const std::string & step);                               // what follows is part of this step
    void value(const std::string & name, const std::string & value);    // must be equal, elastic and not
    void figure(const std::string & name, double value);                // for checks of one run
    void fault(const std::string & what);                               // something that must not be, whatever stock does

  private:
    int fd;
    void line(const char * kind, const std::string & a, const std::string & b);
};

struct outcome {
    std::vector<std::pair<std::string, std::string>> values; // in order
    std::map<std::string, double>                    figures;
    std::vector<std::string>                         faults;
    std::string last_step; // begun last
    std::string failure;   // why it did not end well: an exception's text, or the signal and what was said last; "" = it did
    int         signal = 0;
};

outcome in_child(const environment & env, unsigned seconds, const std::function<void(reporter &)> & work);
