// The arguments of this family's CUDA kernels, and the declarations of their launches. All pointers
// are to the device's memory.
#pragma once

#include <cstdint>

#include "automaton/cuda/plan_chain.h"
#include "automaton/scaled.h"
#include "denoise/cuda/kernels.h"
#include "dgemma/automaton.h"

namespace dgemma {

// What a block of class_statistics keeps of a class, in the least shared memory that a GPU has.
constexpr int32_t kBytesOfClass = 24;
constexpr int32_t kMostClassesOnGpu = 4096;

// Said to the compiler, which for 12.0 otherwise keeps so few registers that as many blocks as a
// multiprocessor takes find room, and spills.
constexpr int32_t kLeastBlocks = 1;

struct Automata {
  const int32_t* arena;
  const int64_t* descriptor;
};

// Of a set of classes at a position: its greatest z, and where it is.
struct BestOfSet {
  float largest;
  int32_t token;  // -1 where no token is allowed
};

// A sum of numbers of any magnitude in 64-bit integers, which has no order: in units of
// 2^(top - fraction bits), with top the exponent of the largest.
struct alignas(16) Weight {
  unsigned long long sum;
  int32_t top;
};

// What constrain makes of a request.
enum Outcome : int32_t {
  kNoCanvas = 0,     // none is accepted
  kNotFinite = 1,    // an entropy is not finite, so the request ends with the update
  kConditioned = 2,  // draft, draw and key are made
};

struct Chain {
  dgemma_constrain op;
  Scaled *class_mass, *set_mass, *backward, *forward;
  BestOfSet* best;
  int32_t* first_arc;
  double* score;
  Weight* weights;
  int32_t* outcome;
};

inline Chain make_chain(const dgemma_constrain& op, const ChainPlan& plan) {
  char* const base = static_cast<char*>(op.workspace);
  return {.op = op,
          .class_mass = reinterpret_cast<Scaled*>(base + plan.class_mass),
          .set_mass = reinterpret_cast<Scaled*>(base + plan.set_mass),
          .backward = reinterpret_cast<Scaled*>(base + plan.backward),
          .forward = reinterpret_cast<Scaled*>(base + plan.forward),
          .best = reinterpret_cast<BestOfSet*>(base + plan.best),
          .first_arc = reinterpret_cast<int32_t*>(base + plan.first_arc),
          .score = reinterpret_cast<double*>(base + plan.score),
          .weights = reinterpret_cast<Weight*>(base + plan.weights),
          .outcome = reinterpret_cast<int32_t*>(base + plan.outcome)};
}

// Each enqueues one kernel on `stream`, a cudaStream_t, and returns null or the error's text.

const char* launch_class_statistics(const dgemma_class_statistics& op, void* stream);
// The masses of a position's classes and sets, and the best token of each set.
const char* launch_masses(const Chain& chain, void* stream);
// The passes backward with the draw, forward, and for the draft.
const char* launch_passes(const ChainPlan& plan, const Chain& chain, void* stream);
// The acceptance key of a position.
const char* launch_key(const ChainPlan& plan, const Chain& chain, void* stream);
const char* launch_sample_class(const dgemma_sample_class& op, void* stream);

}  // namespace dgemma
