#include "automaton/byte_automaton.h"

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <unordered_map>

#include "automaton/minimize.h"
#include "automaton/nondeterministic.h"

namespace dgemma {
namespace {

// Sets of states that are looked at on the way, summed over the deterministic states. A pattern
// such as (a|b)*a(a|b){20} would need a million states; this ends it within seconds, on every
// machine at the same place.
constexpr int64_t kMostWork = 400'000'000;

// Sets of states as strings of bytes, so that a hash map of the standard library takes them.
using States = std::vector<int32_t>;
std::string_view bytes_of(const States& states) {
  return {reinterpret_cast<const char*>(states.data()), states.size() * sizeof(int32_t)};
}

class Determiniser {
 public:
  explicit Determiniser(NondeterministicAutomaton given)
      : given_(std::move(given)), closures_(given_.edges.size()), seen_(given_.edges.size(), -1) {}

  ByteAutomaton run() {
    find_byte_classes();
    const int32_t classes = made_.byte_classes;
    number(closure(given_.start));
    std::vector<std::vector<int32_t>> rows;  // [state][byte class], -1: nowhere
    std::vector<States> reached(static_cast<size_t>(classes));
    for (size_t q = 0; q < sets_.size(); ++q) {
      for (const int32_t state : *sets_[q])
        for (const ByteEdge& edge : given_.edges[static_cast<size_t>(state)])
          for (int32_t c = made_.byte_class[edge.first]; c <= made_.byte_class[edge.last]; ++c)
            reached[static_cast<size_t>(c)].push_back(edge.to);
      auto& row = rows.emplace_back(static_cast<size_t>(classes), -1);
      int32_t last =
          -1;  // the class before: in the middle of a string most lead to the same states
      for (int32_t c = 0; c < classes; ++c) {
        const States& targets = reached[static_cast<size_t>(c)];
        if (targets.empty()) continue;
        const bool same = last >= 0 && targets == reached[static_cast<size_t>(last)];
        row[static_cast<size_t>(c)] =
            same ? row[static_cast<size_t>(last)] : number(closure_of(targets));
        last = c;
      }
      for (States& targets : reached) targets.clear();
    }
    write(rows);
    return std::move(made_);
  }

 private:
  // Two bytes are of one class where every transition has both or neither.
  void find_byte_classes() {
    std::array<bool, 257> begins = {};
    begins[0] = true;
    for (const auto& edges : given_.edges)
      for (const ByteEdge& edge : edges) begins[edge.first] = begins[edge.last + size_t{1}] = true;
    made_.byte_class.resize(256);
    int32_t found = -1;
    for (size_t b = 0; b < 256; ++b)
      made_.byte_class[b] = static_cast<uint8_t>(found += begins[b] ? 1 : 0);
    made_.byte_classes = found + 1;
  }

  // The states that a state leads to without a byte, of those that a byte leads on from or that
  // accept; in order.
  const States& closure(int32_t from) {
    States& found = closures_[static_cast<size_t>(from)];
    if (!found.empty()) return found;
    ++stamp_;
    States open = {from};
    seen_[static_cast<size_t>(from)] = stamp_;
    while (!open.empty()) {
      const int32_t state = open.back();
      open.pop_back();
      if (state == given_.accept || !given_.edges[static_cast<size_t>(state)].empty())
        found.push_back(state);
      for (const int32_t to : given_.silent[static_cast<size_t>(state)])
        if (seen_[static_cast<size_t>(to)] != stamp_) {
          seen_[static_cast<size_t>(to)] = stamp_;
          open.push_back(to);
        }
    }
    std::sort(found.begin(), found.end());
    work_ += static_cast<int64_t>(found.size());
    return found;
  }

  States closure_of(const States& states) {
    if (states.size() == 1) return closure(states[0]);
    States all;
    for (const int32_t state : states) {
      const States& one = closure(state);
      all.insert(all.end(), one.begin(), one.end());
    }
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    return all;
  }

  int32_t number(const States& states) {
    work_ += static_cast<int64_t>(states.size());
    if (work_ > kMostWork) throw std::length_error("the pattern takes too long");
    const auto known = numbers_.find(bytes_of(states));
    if (known != numbers_.end()) return known->second;
    if (sets_.size() >= static_cast<size_t>(kMostByteStates))
      throw std::length_error("the pattern has too many states");
    const auto id = static_cast<int32_t>(sets_.size());
    sets_.push_back(std::make_unique<States>(states));
    numbers_.emplace(bytes_of(*sets_.back()), id);
    return id;
  }

  void write(const std::vector<std::vector<int32_t>>& rows) {
    const auto states = static_cast<int32_t>(rows.size()) + 1;
    const int32_t nowhere = states - 1;
    made_.states = states;
    made_.next.assign(static_cast<size_t>(made_.byte_classes) * static_cast<size_t>(states),
                      static_cast<uint16_t>(nowhere));
    made_.accepting.assign(static_cast<size_t>(states), 0);
    for (size_t q = 0; q < rows.size(); ++q) {
      const States& set = *sets_[q];
      made_.accepting[q] = std::binary_search(set.begin(), set.end(), given_.accept) ? 1 : 0;
      for (size_t c = 0; c < rows[q].size(); ++c)
        if (rows[q][c] >= 0)
          made_.next[c * static_cast<size_t>(states) + q] = static_cast<uint16_t>(rows[q][c]);
    }
  }

  NondeterministicAutomaton given_;
  ByteAutomaton made_;
  std::vector<States> closures_;
  std::vector<int32_t> seen_;
  int32_t stamp_ = 0;
  std::vector<std::unique_ptr<States>> sets_;
  std::unordered_map<std::string_view, int32_t> numbers_;
  int64_t work_ = 0;
};

}  // namespace

ByteAutomaton byte_automaton(std::span<const int32_t> pattern) {
  return minimized(Determiniser(nondeterministic(pattern)).run());
}

}  // namespace dgemma
