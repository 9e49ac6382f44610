// The launch plan of constrain: all that depends on the sizes of a call alone. Pure host code.
//
// A request's sums are made in an order that its own automaton gives, so neither the plan nor the
// batch changes a bit of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>

#include "dgemma/automaton.h"

namespace dgemma {

// Of a block that has one position of a canvas.
constexpr int32_t kPositionThreads = 256;
// A pass over the canvas has a thread for a state where there are no more than these.
constexpr int32_t kMostPassThreads = 512;
// Of the shared memory of a block, for what does not grow with the automaton.
constexpr int32_t kKeyScratch = 512;

struct ChainPlan {
  int32_t pass_threads;
  // Bytes of shared memory, 0 where it does not suffice and tables in the workspace are read: the
  // states of two positions, and the weights of a position's sets and classes.
  uint32_t states_bytes;
  uint32_t weights_bytes;
  // Where each part of the workspace begins.
  size_t class_mass;  // Scaled [batch, length, classes]
  size_t set_mass;    // Scaled [batch, length, sets]
  size_t best;        // BestOfSet [batch, length, sets]
  size_t backward;    // Scaled [batch, length + 1, states]: the mass that leads on to an end
  size_t forward;     // Scaled [batch, length, states]: the mass that leads there
  size_t first_arc;   // int32 [batch, length, states]: of the best way from there
  size_t score;       // double [batch, 2, states], where the states are not in shared memory
  size_t weights;     // Weight [batch, length, sets + classes], where they are not
  size_t outcome;     // int32 [batch]
  size_t workspace_bytes;
};

ChainPlan make_chain_plan(const dgemma_constrain& op);
void print(const ChainPlan& plan, std::ostream& out);

}  // namespace dgemma
