#include "automaton/minimize.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace dgemma {
namespace {

// States in blocks: a block is a range of `order`, whose first `marked` members are to be split
// off.
class Partition {
 public:
  explicit Partition(size_t states) : order_(states), place_(states), block_(states, 0) {
    std::iota(order_.begin(), order_.end(), 0);
    std::iota(place_.begin(), place_.end(), 0);
    blocks_.push_back({0, states, 0});
  }

  size_t blocks() const { return blocks_.size(); }
  size_t block_of(size_t state) const { return block_[state]; }
  size_t size(size_t block) const { return blocks_[block].end - blocks_[block].begin; }
  std::vector<size_t> members(size_t block) const {
    const Block& b = blocks_[block];
    return {order_.begin() + static_cast<ptrdiff_t>(b.begin),
            order_.begin() + static_cast<ptrdiff_t>(b.end)};
  }

  // Returns whether it is the first of its block.
  bool mark(size_t state) {
    Block& b = blocks_[block_[state]];
    const size_t first = b.begin + b.marked;
    if (place_[state] < first) return false;
    const size_t other = order_[first];
    std::swap(order_[first], order_[place_[state]]);
    std::swap(place_[other], place_[state]);
    return b.marked++ == 0;
  }

  // Splits off the marked members; returns the new block, or the block itself where all are marked.
  size_t split(size_t block) {
    Block& b = blocks_[block];
    const size_t marked = std::exchange(b.marked, 0);
    if (marked == b.end - b.begin) return block;
    const Block made = {b.begin, b.begin + marked, 0};
    b.begin += marked;
    for (size_t i = made.begin; i < made.end; ++i) block_[order_[i]] = blocks_.size();
    blocks_.push_back(made);
    return blocks_.size() - 1;
  }

 private:
  struct Block {
    size_t begin, end, marked;
  };
  std::vector<size_t> order_, place_, block_;
  std::vector<Block> blocks_;
};

struct Sources {
  std::vector<size_t> begin, state;  // of each target: the states that lead to it
};

Sources sources_of(const uint16_t* next, size_t states) {
  Sources found;
  found.begin.assign(states + 1, 0);
  for (size_t q = 0; q < states; ++q) ++found.begin[next[q] + size_t{1}];
  std::partial_sum(found.begin.begin(), found.begin.end(), found.begin.begin());
  found.state.resize(states);
  std::vector<size_t> at(found.begin.begin(), found.begin.end() - 1);
  for (size_t q = 0; q < states; ++q) found.state[at[next[q]]++] = q;
  return found;
}

void refine(const ByteAutomaton& given, Partition* partition) {
  const auto states = static_cast<size_t>(given.states);
  const auto classes = static_cast<size_t>(given.byte_classes);
  std::vector<Sources> sources;
  for (size_t c = 0; c < classes; ++c)
    sources.push_back(sources_of(given.next.data() + c * states, states));
  std::vector<size_t> open = {0};
  if (partition->blocks() > 1)
    open = {partition->size(0) < partition->size(1) ? size_t{0} : size_t{1}};
  std::vector<bool> is_open(states + 1, false);
  is_open[open[0]] = true;
  std::vector<size_t> touched;
  while (!open.empty()) {
    const size_t splitter = open.back();
    open.pop_back();
    is_open[splitter] = false;
    const std::vector<size_t> targets = partition->members(splitter);
    for (size_t c = 0; c < classes; ++c) {
      touched.clear();
      for (const size_t target : targets)
        for (size_t i = sources[c].begin[target]; i < sources[c].begin[target + 1]; ++i)
          if (partition->mark(sources[c].state[i]))
            touched.push_back(partition->block_of(sources[c].state[i]));
      for (const size_t block : touched) {
        const size_t made = partition->split(block);
        if (made == block) continue;
        const bool both = is_open[block];
        const size_t chosen = both || partition->size(made) < partition->size(block) ? made : block;
        is_open[chosen] = true;
        open.push_back(chosen);
      }
    }
  }
}

}  // namespace

ByteAutomaton minimized(const ByteAutomaton& given) {
  const auto states = static_cast<size_t>(given.states);
  const auto classes = static_cast<size_t>(given.byte_classes);
  Partition partition(states);
  for (size_t q = 0; q < states; ++q)
    if (given.accepting[q] != 0) partition.mark(q);
  if (std::find(given.accepting.begin(), given.accepting.end(), 1) != given.accepting.end())
    partition.split(0);
  refine(given, &partition);

  // The last state accepts nothing, so its block is the dead one.
  const size_t dead = partition.block_of(states - 1);
  std::vector<int32_t> number(partition.blocks(), -1);
  std::vector<size_t> kept;  // a member of each block that the start reaches
  const auto visit = [&](size_t state) {
    const size_t block = partition.block_of(state);
    if (block == dead || number[block] >= 0) return;
    number[block] = static_cast<int32_t>(kept.size());
    kept.push_back(state);
  };
  visit(static_cast<size_t>(given.start));
  for (size_t i = 0; i < kept.size(); ++i)
    for (size_t c = 0; c < classes; ++c) visit(given.next[c * states + kept[i]]);

  ByteAutomaton made;
  made.states = static_cast<int32_t>(kept.size()) + 1;
  number[dead] = made.states - 1;
  made.start = number[partition.block_of(static_cast<size_t>(given.start))];
  made.byte_classes = given.byte_classes;
  made.byte_class = given.byte_class;
  made.next.assign(classes * static_cast<size_t>(made.states),
                   static_cast<uint16_t>(made.states - 1));
  made.accepting.assign(static_cast<size_t>(made.states), 0);
  for (size_t i = 0; i < kept.size(); ++i) {
    made.accepting[i] = given.accepting[kept[i]];
    for (size_t c = 0; c < classes; ++c)
      made.next[c * static_cast<size_t>(made.states) + i] =
          static_cast<uint16_t>(number[partition.block_of(given.next[c * states + kept[i]])]);
  }
  return made;
}

}  // namespace dgemma
