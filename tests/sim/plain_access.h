// Ordinary loads and stores of the kernels, where they are compiled so that they can be seen.
#pragma once

namespace sim {

extern bool watching;  // whether they are looked at: sim_watch_plain_accesses

}  // namespace sim
