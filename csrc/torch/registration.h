// Registers described operators with torch: the schemas, and a kernel for every place that has one.
// The kernel is one function for all operators, which reads the description.
#pragma once

#include <string>
#include <vector>

#include "torch/backend.h"

namespace dgemma {

// Every operator of this build, for Python and for questions about workspace.
std::vector<const Operator*>& operators();

// The schema as torch parses it; `out`: of the form that writes into given tensors.
std::string schema(const Operator& op, bool out);

// Checks, makes what is not given, calls. The stack holds the arguments in the schema's order, and
// then the results.
template <typename Place>
void call(const Operator& op, bool given, StableIValue* stack) {
  const Entry& entry = op.*Place::kEntry;
  Operands operands(op, Place::kDevice);
  operands.take(stack, given);
  operands.check();
  operands.make_outputs();
  operands.provide_workspace(entry.workspace != nullptr ? entry.workspace(operands.operation())
                                                        : 0);
  Place(op.name, operands.first()).run(entry, operands.operation());
  if (!given) operands.give_back(stack);
}

template <typename Described, typename Place, bool given>
void kernel(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  call<Place>(Described::kOperator, given, stack);
}

template <typename... Described, typename Library>
void define(Library& library) {
  static_assert((Described::kOperator.fits() && ...));
  for (const Operator* op : {&Described::kOperator...}) {
    operators().push_back(op);
    library.def(schema(*op, false).c_str());
    if (op->form == Form::kNewAndOut) library.def(schema(*op, true).c_str());
  }
}

template <typename Described, typename Place, typename Library>
void implement_one(Library& library) {
  constexpr const Operator& op = Described::kOperator;
  if ((op.*Place::kEntry).run == nullptr) return;
  library.impl(op.name, &kernel<Described, Place, false>);
  if (op.form == Form::kNewAndOut)
    library.impl((std::string(op.name) + ".out").c_str(), &kernel<Described, Place, true>);
}

template <typename Place, typename... Described, typename Library>
void implement(Library& library) {
  (implement_one<Described, Place>(library), ...);
}

// A family's operators: the classes that describe them. It stands at the end of the family's file.
#define DGEMMA_DEFINE(...) \
  STABLE_TORCH_LIBRARY_FRAGMENT(dgemma, library) { dgemma::define<__VA_ARGS__>(library); }
#define DGEMMA_IMPLEMENT(key, Place, ...)                   \
  STABLE_TORCH_LIBRARY_IMPL(dgemma, key, library) {         \
    dgemma::implement<dgemma::Place, __VA_ARGS__>(library); \
  }
#if defined(DGEMMA_SIM)
#define DGEMMA_OPERATORS(...) DGEMMA_DEFINE(__VA_ARGS__) DGEMMA_IMPLEMENT(CPU, OnCuda, __VA_ARGS__)
#elif defined(DGEMMA_WITH_CUDA)
#define DGEMMA_OPERATORS(...)               \
  DGEMMA_DEFINE(__VA_ARGS__)                \
  DGEMMA_IMPLEMENT(CPU, OnCpu, __VA_ARGS__) \
  DGEMMA_IMPLEMENT(CUDA, OnCuda, __VA_ARGS__)
#else
#define DGEMMA_OPERATORS(...) DGEMMA_DEFINE(__VA_ARGS__) DGEMMA_IMPLEMENT(CPU, OnCpu, __VA_ARGS__)
#endif

}  // namespace dgemma
