#include "automaton/token_automaton.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>

namespace dgemma {
namespace {

constexpr int32_t kNever = std::numeric_limits<int32_t>::max();

std::length_error too_many(const char* what, int64_t limit) {
  return std::length_error(std::string(what) + " " + std::to_string(limit));
}

// The effects of byte strings on all states at once, each kept once: the transition monoid of the
// byte automaton, as far as the vocabulary reaches into it.
class Effects {
 public:
  Effects(const ByteAutomaton& bytes, int32_t most)
      : bytes_(bytes), states_(static_cast<size_t>(bytes.states)), most_(most) {
    std::vector<uint16_t> dead(states_, static_cast<uint16_t>(states_ - 1)), same(states_);
    for (size_t q = 0; q < states_; ++q) same[q] = static_cast<uint16_t>(q);
    number(std::move(dead));
    number(std::move(same));
  }

  static constexpr int32_t kDead = 0, kSame = 1;

  int32_t after(int32_t effect, uint8_t byte) {
    const size_t c = bytes_.byte_class[byte];
    int32_t& known = next_[static_cast<size_t>(effect) * 256 + c];
    if (known < 0) {
      const uint16_t* const step = bytes_.next.data() + c * states_;
      const std::vector<uint16_t>& before = effects_[static_cast<size_t>(effect)];
      std::vector<uint16_t> vector(states_);
      for (size_t q = 0; q < states_; ++q) vector[q] = step[before[q]];
      const int32_t found = number(std::move(vector));
      // number() may have moved what `known` refers to.
      next_[static_cast<size_t>(effect) * 256 + c] = found;
      return found;
    }
    return known;
  }

  const std::vector<uint16_t>& operator[](int32_t effect) const {
    return effects_[static_cast<size_t>(effect)];
  }
  int32_t count() const { return static_cast<int32_t>(effects_.size()); }

 private:
  int32_t number(std::vector<uint16_t> vector) {
    const uint64_t hash = hash_of(vector);
    const auto [begin, end] = numbers_.equal_range(hash);
    for (auto it = begin; it != end; ++it)
      if (effects_[static_cast<size_t>(it->second)] == vector) return it->second;
    if (count() >= most_) throw too_many("classes", most_);
    effects_.push_back(std::move(vector));
    next_.resize(effects_.size() * 256, -1);
    numbers_.emplace(hash, count() - 1);
    return count() - 1;
  }

  // Four chains beside each other: in one, every product would wait for the one before it.
  static uint64_t hash_of(const std::vector<uint16_t>& vector) {
    constexpr uint64_t kFactor = 0xff51afd7ed558ccdu;
    uint64_t chain[4] = {1, 2, 3, 4};
    size_t i = 0;
    for (; i + 16 <= vector.size(); i += 16) {
      uint64_t words[4];
      std::memcpy(words, vector.data() + i, sizeof words);
      for (int lane = 0; lane < 4; ++lane) {
        chain[lane] = (chain[lane] ^ words[lane]) * kFactor;
        chain[lane] ^= chain[lane] >> 32;
      }
    }
    uint64_t hash = 0;
    for (; i < vector.size(); ++i) hash = (hash ^ vector[i]) * kFactor;
    for (const uint64_t one : chain) hash = (hash ^ one) * kFactor;
    return hash ^ hash >> 29;
  }

  const ByteAutomaton& bytes_;
  size_t states_;
  int32_t most_;
  std::vector<std::vector<uint16_t>> effects_;
  std::vector<int32_t> next_;  // [effects, 256 byte classes at most], -1: not looked at yet
  std::unordered_multimap<uint64_t, int32_t> numbers_;
};

// The effect of every string. Neighbours share a prefix, whose effects are still at hand.
std::vector<int32_t> walk(const TokenStrings& strings, Effects* effects) {
  const size_t count = strings.offset.size() - 1;
  std::vector<int32_t> found(count), at_prefix = {Effects::kSame};
  const uint8_t* previous = nullptr;
  size_t previous_length = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint8_t* const text = strings.bytes.data() + strings.offset[i];
    const auto length = static_cast<size_t>(strings.offset[i + 1] - strings.offset[i]);
    size_t same = 0;
    while (same < length && same < previous_length && text[same] == previous[same]) ++same;
    at_prefix.resize(same + 1);
    for (size_t k = same; k < length; ++k)
      at_prefix.push_back(at_prefix.back() == Effects::kDead
                              ? Effects::kDead
                              : effects->after(at_prefix.back(), text[k]));
    found[i] = at_prefix.back();
    previous = text;
    previous_length = length;
  }
  return found;
}

// Where the classes that tokens have lead from each state: a row for each state, as every question
// is about a state's.
class Table {
 public:
  Table(const std::vector<const uint16_t*>& effects, size_t states)
      : nowhere(states - 1), classes_(effects.size()), target_(states * effects.size()) {
    constexpr size_t kBlock = 32;  // states whose rows stay in the cache while they are filled
    for (size_t first = 0; first < states; first += kBlock)
      for (size_t k = 0; k < classes_; ++k)
        for (size_t q = first; q < std::min(states, first + kBlock); ++q)
          target_[q * classes_ + k] = effects[k][q];
  }

  std::span<const uint16_t> operator[](size_t state) const {
    return {target_.data() + state * classes_, classes_};
  }
  const size_t nowhere;

 private:
  size_t classes_;
  std::vector<uint16_t> target_;
};

std::vector<uint8_t> reached_states(const Table& table, int32_t start) {
  std::vector<uint8_t> reached(table.nowhere + 1, 0);
  reached[static_cast<size_t>(start)] = 1;
  std::vector<size_t> open = {static_cast<size_t>(start)};
  while (!open.empty()) {
    const size_t q = open.back();
    open.pop_back();
    for (const uint16_t target : table[q])
      if (reached[target] == 0) {
        reached[target] = 1;
        open.push_back(target);
      }
  }
  reached[table.nowhere] = 0;
  return reached;
}

// Breadth first from the accepting states, backwards; each round looks at the states that are left.
std::vector<int32_t> distances(const Table& table, const ByteAutomaton& bytes,
                               const std::vector<uint8_t>& reached) {
  const size_t states = table.nowhere + 1;
  std::vector<std::vector<uint16_t>> sources(states);
  for (size_t q = 0; q < table.nowhere; ++q) {
    if (reached[q] == 0) continue;
    uint16_t last = static_cast<uint16_t>(table.nowhere);
    for (const uint16_t target : table[q]) {
      if (target == last || target == table.nowhere) continue;
      last = target;
      auto& of = sources[last];
      if (of.empty() || of.back() != q) of.push_back(static_cast<uint16_t>(q));
    }
  }
  std::vector<int32_t> found(states, kNever);
  std::vector<size_t> open;
  for (size_t q = 0; q < table.nowhere; ++q)
    if (reached[q] != 0 && bytes.accepting[q] != 0) {
      found[q] = 0;
      open.push_back(q);
    }
  for (size_t i = 0; i < open.size(); ++i)
    for (const uint16_t q : sources[open[i]])
      if (found[q] == kNever) {
        found[q] = found[open[i]] + 1;
        open.push_back(q);
      }
  return found;
}

// Sets of classes, each once.
class Sets {
 public:
  explicit Sets(TokenAutomaton* made) : made_(*made) { made_.set_begin = {0}; }

  int32_t number(const std::vector<int32_t>& classes) {
    const std::string key(reinterpret_cast<const char*>(classes.data()),
                          classes.size() * sizeof(int32_t));
    const auto [known, is_new] =
        numbers_.emplace(key, static_cast<int32_t>(made_.set_begin.size()) - 1);
    if (is_new) {
      made_.set_class.insert(made_.set_class.end(), classes.begin(), classes.end());
      made_.set_begin.push_back(static_cast<int32_t>(made_.set_class.size()));
    }
    return known->second;
  }

 private:
  TokenAutomaton& made_;
  std::unordered_map<std::string, int32_t> numbers_;
};

void add_arcs_by_target(TokenAutomaton* made) {
  const size_t arcs = made->out_target.size(), states = static_cast<size_t>(made->states);
  made->in_begin.assign(states + 1, 0);
  for (const int32_t target : made->out_target) ++made->in_begin[static_cast<size_t>(target) + 1];
  for (size_t q = 0; q < states; ++q) made->in_begin[q + 1] += made->in_begin[q];
  made->in_source.resize(arcs);
  made->in_set.resize(arcs);
  std::vector<int32_t> at(made->in_begin.begin(), made->in_begin.end() - 1);
  for (size_t q = 0; q < states; ++q)
    for (auto i = static_cast<size_t>(made->out_begin[q]);
         i < static_cast<size_t>(made->out_begin[q + 1]); ++i) {
      const auto place = static_cast<size_t>(at[static_cast<size_t>(made->out_target[i])]++);
      made->in_source[place] = static_cast<int32_t>(q);
      made->in_set[place] = made->out_set[i];
    }
}

}  // namespace

TokenAutomaton token_automaton(const ByteAutomaton& bytes, const TokenStrings& strings,
                               const TokenLimits& limits) {
  TokenAutomaton made;
  if (bytes.states > limits.states + 1) throw too_many("states", limits.states);
  if (bytes.start == bytes.states - 1) return made;  // nothing is accepted
  // Prefixes have effects too, of which no token is left at the end.
  Effects effects(bytes, 4 * limits.classes);
  made.class_of_string = walk(strings, &effects);
  made.vectors = effects.count();
  std::vector<int32_t> class_of(static_cast<size_t>(effects.count()), -1);
  class_of[Effects::kDead] = 0;
  std::vector<const uint16_t*> used = {effects[Effects::kDead].data()};
  for (int32_t& effect : made.class_of_string) {
    int32_t& known = class_of[static_cast<size_t>(effect)];
    if (known < 0) {
      known = static_cast<int32_t>(used.size());
      used.push_back(effects[effect].data());
    }
    effect = known;
  }
  made.end_class = static_cast<int32_t>(used.size());
  made.tail_class = made.end_class + 1;
  made.classes = made.tail_class + 1;
  if (made.classes > limits.classes) throw too_many("classes", limits.classes);
  const Table table(used, static_cast<size_t>(bytes.states));
  const std::vector<uint8_t> reached = reached_states(table, bytes.start);
  const std::vector<int32_t> distance = distances(table, bytes, reached);
  std::vector<int32_t> number(distance.size(), -1);
  for (size_t q = 0; q < table.nowhere; ++q)
    if (distance[q] != kNever) {
      number[q] = made.states++;
      made.distance.push_back(distance[q]);
    }
  made.start = number[static_cast<size_t>(bytes.start)];
  if (made.start < 0) {
    made.states = 0;
    return made;  // no tokens spell what is accepted
  }
  const int32_t end = made.states++;
  made.distance.push_back(0);
  made.out_begin = {0};
  Sets sets(&made);
  std::vector<std::vector<int32_t>> classes_to(distance.size());
  std::vector<size_t> targets;
  for (size_t q = 0; q < table.nowhere; ++q) {
    if (number[q] < 0) continue;
    targets.clear();
    for (size_t k = 1; k < used.size(); ++k) {
      const size_t target = table[q][k];
      if (number[target] < 0) continue;
      if (classes_to[target].empty()) targets.push_back(target);
      classes_to[target].push_back(static_cast<int32_t>(k));
    }
    for (const size_t target : targets) {
      made.out_target.push_back(number[target]);
      made.out_set.push_back(sets.number(classes_to[target]));
      classes_to[target].clear();
    }
    if (bytes.accepting[q] != 0) {
      made.out_target.push_back(end);
      made.out_set.push_back(sets.number({made.end_class}));
    }
    made.out_begin.push_back(static_cast<int32_t>(made.out_target.size()));
    if (made.out_target.size() > static_cast<size_t>(limits.arcs))
      throw too_many("arcs", limits.arcs);
  }
  made.out_target.push_back(end);
  made.out_set.push_back(sets.number({made.tail_class}));
  made.out_begin.push_back(static_cast<int32_t>(made.out_target.size()));
  add_arcs_by_target(&made);
  return made;
}

}  // namespace dgemma
