// How much workspace an operator needs for sizes that are asked for by name.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace dgemma {

// `sizes`: extents and numbers of the operator's description, and 1 for a tensor that is given
// where it may be left out. `cuda`: for tensors on a GPU. 0 where the place has no kernel, or does
// not take these sizes. Throws std::invalid_argument for an unknown operator or name.
int64_t workspace_bytes(const std::string& name, bool bfloat16, bool cuda,
                        const std::map<std::string, int64_t>& sizes);

}  // namespace dgemma
