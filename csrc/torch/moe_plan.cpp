// The plan of a pass of moe_ffn in words, for tests and for people who look at routing.
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "grouped_gemm/cpu/plan.h"
#include "torch/python.h"

namespace dgemma {
namespace {

std::string moe_ffn_plan(const std::vector<std::vector<int32_t>>& expert_ids, int64_t experts) {
  const size_t top_k = expert_ids.empty() ? 1 : expert_ids[0].size();
  std::vector<int32_t> ids;
  for (const auto& row : expert_ids) {
    if (row.size() != top_k)
      throw std::invalid_argument("expert_ids: got rows of different lengths, wants equal ones");
    ids.insert(ids.end(), row.begin(), row.end());
  }
  const auto pairs = static_cast<int64_t>(ids.size());
  const int64_t bad = find_bad_expert_id(ids.data(), pairs, experts);
  if (bad >= 0)
    throw std::invalid_argument("expert_ids: got " + std::to_string(ids[bad]) + ", wants -1 to " +
                                std::to_string(experts - 1));
  std::vector<int32_t> storage(static_cast<size_t>(moe_plan_size(pairs, experts)));
  std::ostringstream text;
  print(make_moe_plan(ids.data(), pairs, experts, storage.data()), static_cast<int64_t>(top_k),
        text);
  return text.str();
}

PyObject* moe_ffn_plan_in_python(PyObject* /*module*/, PyObject* arguments, PyObject* keywords) {
  return python::guard([&] {
    static const char* const names[] = {"expert_ids", "experts", nullptr};
    PyObject* rows = nullptr;
    long long experts = 0;
    python::parse(arguments, keywords, "OL:moe_ffn_plan", names, &rows, &experts);
    std::vector<std::vector<int32_t>> expert_ids;
    python::for_each(rows, [&](PyObject* row) {
      auto& ids = expert_ids.emplace_back();
      python::for_each(row, [&](PyObject* id) { ids.push_back(python::to_int32(id)); });
    });
    return moe_ffn_plan(expert_ids, experts);
  });
}

}  // namespace

void bind_moe_plan(PyObject* module) {
  static PyMethodDef methods[] = {
      python::method("moe_ffn_plan", moe_ffn_plan_in_python,
                     "The plan of one pass of moe_ffn: a line for each expert that is hit, with "
                     "its token/slot pairs."),
      {}};
  python::check(PyModule_AddFunctions(module, methods));
}

}  // namespace dgemma
