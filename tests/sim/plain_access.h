// Ordinary loads and stores of the kernels, where they are compiled so that they can be seen.
#pragma once

#include <string>

namespace sim {

struct Thread;

extern bool watching;  // whether they are looked at: sim_watch_plain_accesses

// Ends the launch with this message, in front of which stand the thread and the place. g++ takes
// the calls that come here for ones that throw nothing: the fiber stops for good instead.
[[gnu::cold]] void stop(Thread& thread, const std::string& place, const std::string& problem);

}  // namespace sim
