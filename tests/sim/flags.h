// Flags and counters in global memory, by which blocks tell each other what they have done.
#pragma once

#include <cstdint>

#include "machine.h"

namespace sim {

uint32_t load_flag(const uint32_t* flag, const Source& source);
void store_flag(uint32_t* flag, uint32_t value, const Source& source);
uint32_t add_to_counter(uint32_t* counter, uint32_t value, const Source& source);

// What passed through them ends with the launch.
void forget_flags();

}  // namespace sim
