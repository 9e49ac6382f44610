// The memory that the host has given out, where it tells (torch_memory.cpp): what a kernel may
// touch of it, and when it is somebody else's.
#pragma once

#include <cstddef>
#include <string>

namespace sim {

// This many bytes before and behind a piece are nobody's.
constexpr size_t kHostMargin = 64;

void host_allocated(const void* memory, size_t bytes);
void host_freed(const void* memory);

// From now on kernels may write to memory of which the host does not tell: tensors over numpy's.
void host_has_other_memory();

// Whether all of this is in one piece.
bool is_host_memory(const void* address, size_t bytes);
// Empty, or what is wrong with an access there: in a margin, or a write to memory that is no piece
// where there is no other.
std::string host_memory_problem(const void* address, size_t bytes, bool write);

// " (byte 16 of a tensor's memory of 64 bytes)", or empty where the host tells of none there.
std::string place_in_host_memory(const void* address);

// Kernels know nothing more of what was freed since the last launch.
void forget_freed_memory();

}  // namespace sim
