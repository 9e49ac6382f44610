#pragma once

#include <cstddef>

#include "dgemma/automaton.h"

namespace dgemma {

// The memory of one request's chain.
size_t chain_bytes(const dgemma_constrain& op);

// Conditions one request's canvas. Everything is summed in one order, so it has the same bits alone
// and in a batch.
void constrain_request(const dgemma_constrain& op, int64_t request, char* workspace);

}  // namespace dgemma
