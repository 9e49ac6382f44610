// The plan of constrain in CUDA, callable from Python.
#include <cstdio>
#include <sstream>

#include "automaton/cuda/plan_chain.h"
#include "entry.h"

// Sizes alone are looked at. `text` has room for `bytes`.
SIM_ENTRY chain_plan(const dgemma_constrain* op, char* text, size_t bytes) {
  std::ostringstream stream;
  print(dgemma::make_chain_plan(*op), stream);
  std::snprintf(text, bytes, "%s", stream.str().c_str());
  return nullptr;
}
