// A touch of memory that is not there, by a thread or by a copy, ends the launch like any other
// error.
#pragma once

namespace sim {

// Runs this with the machine, whose error it sets where such a touch ends it.
void run_guarded(void (*run)());

}  // namespace sim
