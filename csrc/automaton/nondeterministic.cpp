#include "automaton/nondeterministic.h"

#include <algorithm>
#include <array>
#include <stdexcept>

#include "automaton/byte_automaton.h"

namespace dgemma {
namespace {

// A repeated pattern is written out: {1000} of {1000} would be a million copies.
constexpr size_t kMostStates = 2'000'000;
constexpr int kMostDepth = 2'000;

struct ByteRange {
  uint8_t first, last;
};

// The UTF-8 of a code point.
struct Encoded {
  std::array<uint8_t, 4> bytes;
  int length;
};

Encoded encode(int32_t c) {
  const auto tail = [&](int shift) { return static_cast<uint8_t>(0x80 | (c >> shift & 0x3f)); };
  if (c < 0x80) return {{static_cast<uint8_t>(c)}, 1};
  if (c < 0x800) return {{static_cast<uint8_t>(0xc0 | c >> 6), tail(0)}, 2};
  if (c < 0x10000) return {{static_cast<uint8_t>(0xe0 | c >> 12), tail(6), tail(0)}, 3};
  return {{static_cast<uint8_t>(0xf0 | c >> 18), tail(12), tail(6), tail(0)}, 4};
}

class Builder {
 public:
  explicit Builder(std::span<const int32_t> pattern) : pattern_(pattern) {}

  NondeterministicAutomaton build() {
    made_.start = add_state();
    size_t at = 0;
    made_.accept = emit(at, made_.start, 0);
    if (at != pattern_.size()) throw std::invalid_argument("the pattern goes on after its end");
    return std::move(made_);
  }

 private:
  int32_t add_state() {
    if (made_.edges.size() >= kMostStates)
      throw std::length_error("the pattern, with its repetitions written out, is too long");
    made_.edges.emplace_back();
    made_.silent.emplace_back();
    return static_cast<int32_t>(made_.edges.size()) - 1;
  }

  void edge(int32_t from, ByteRange bytes, int32_t to) {
    made_.edges[static_cast<size_t>(from)].push_back({bytes.first, bytes.last, to});
  }
  void silent(int32_t from, int32_t to) { made_.silent[static_cast<size_t>(from)].push_back(to); }

  int32_t word(size_t& at) const {
    if (at >= pattern_.size()) throw std::invalid_argument("the pattern ends too early");
    return pattern_[at++];
  }
  int32_t count(size_t& at) const {
    const int32_t n = word(at);
    if (n < 0) throw std::invalid_argument("the pattern has a negative count");
    return n;
  }
  uint8_t byte(size_t& at) const {
    const int32_t value = word(at);
    if (value < 0 || value > 255) throw std::invalid_argument("the pattern has a byte above 255");
    return static_cast<uint8_t>(value);
  }

  // Passes a node without writing it.
  void skip(size_t& at) {
    const size_t edges = made_.edges.size();
    static_cast<void>(emit(at, add_state(), 0));
    made_.edges.resize(edges);
    made_.silent.resize(edges);
  }

  // Writes the node at `at` from a state on, moves `at` past it and returns the state after it. It
  // adds transitions to `from` and never into it.
  int32_t emit(size_t& at, int32_t from, int depth) {
    if (depth > kMostDepth) throw std::length_error("the pattern is nested too deeply");
    switch (static_cast<Node>(word(at))) {
      case Node::kCharacters:
        return emit_characters(at, from);
      case Node::kBytes: {
        for (int32_t n = count(at); n > 0; --n) {
          const uint8_t value = byte(at);
          const int32_t to = add_state();
          edge(from, {value, value}, to);
          from = to;
        }
        return from;
      }
      case Node::kConcat: {
        for (int32_t n = count(at); n > 0; --n) from = emit(at, from, depth + 1);
        return from;
      }
      case Node::kUnion: {
        const int32_t to = add_state();
        for (int32_t n = count(at); n > 0; --n) {
          const int32_t first = add_state();
          silent(from, first);
          silent(emit(at, first, depth + 1), to);
        }
        return to;
      }
      case Node::kRepeat: {
        const int32_t least = count(at), most = word(at);
        return emit_list(at, from, least, most, 0, false, depth);
      }
      case Node::kList: {
        const int32_t least = count(at), most = word(at);
        const size_t separator = at;
        skip(at);
        return emit_list(at, from, least, most, separator, true, depth);
      }
      case Node::kFields:
        return emit_fields(at, from, depth);
    }
    throw std::invalid_argument("the pattern has an unknown node");
  }

  // Least to most items, with the separator between them where there is one.
  int32_t emit_list(size_t& at, int32_t from, int32_t least, int32_t most, size_t separator,
                    bool separated, int depth) {
    const size_t item = at;
    const int32_t out = add_state();
    if (least == 0) silent(from, out);
    if (most == 0) {
      skip(at);
      return out;
    }
    const auto between = [&](int32_t state) {
      size_t again = separator;
      return separated ? emit(again, state, depth + 1) : state;
    };
    const int32_t written = most < 0 ? std::max(least, 1) : most;
    for (int32_t i = 1; i <= written; ++i) {
      at = item;
      const int32_t first = add_state();
      silent(i == 1 ? from : between(from), first);
      from = emit(at, first, depth + 1);
      if (i >= least) silent(from, out);
      if (i == written && most < 0) silent(between(from), first);
    }
    return out;
  }

  // Of each item two states lead on: where none came before it, and where one did.
  int32_t emit_fields(size_t& at, int32_t from, int depth) {
    int32_t n = count(at);
    const size_t separator = at;
    skip(at);
    int32_t none = from, some = -1;
    for (; n > 0; --n) {
      const bool required = word(at) != 0;
      const int32_t first = add_state();
      if (none >= 0) silent(none, first);
      if (some >= 0) {
        size_t again = separator;
        silent(emit(again, some, depth + 1), first);
      }
      const int32_t after = add_state();
      silent(emit(at, first, depth + 1), after);
      if (required) none = -1;
      if (!required && some >= 0) silent(some, after);
      some = after;
    }
    const int32_t out = add_state();
    if (none >= 0) silent(none, out);
    if (some >= 0) silent(some, out);
    return out;
  }

  int32_t emit_characters(size_t& at, int32_t from) {
    tail_ = {};
    const int32_t out = add_state();
    for (int32_t n = count(at); n > 0; --n) {
      const int32_t first = word(at), last = word(at);
      if (first < 0 || last > 0x10ffff || first > last)
        throw std::invalid_argument("the pattern has an empty range of characters");
      add_range(from, out, first, last);
    }
    return out;
  }

  // Splits a range until all its characters share their lengths and their bytes but for full
  // ranges.
  void add_range(int32_t from, int32_t out, int32_t first, int32_t last) {
    constexpr int32_t kEnds[] = {0x7f, 0x7ff, 0xd7ff, 0xdfff, 0xffff};
    for (const int32_t end : kEnds)
      if (first <= end && last > end) {
        add_range(from, out, first, end);
        add_range(from, out, end + 1, last);
        return;
      }
    if (first >= 0xd800 && last <= 0xdfff) return;  // surrogates have no UTF-8
    for (int32_t mask = 0x3f; mask <= 0x3ffff; mask = mask << 6 | 0x3f) {
      if (last < 0x80 || (first & ~mask) == (last & ~mask)) continue;
      const int32_t middle = (first & mask) != 0     ? first | mask
                             : (last & mask) != mask ? (last & ~mask) - 1
                                                     : last;
      if (middle == last) continue;
      add_range(from, out, first, middle);
      add_range(from, out, middle + 1, last);
      return;
    }
    const Encoded low = encode(first), high = encode(last);
    for (int i = 0; i + 1 < low.length; ++i) {
      const auto at = static_cast<size_t>(i);
      const bool rest_is_full = is_full(low, high, i + 1);
      const int32_t to = rest_is_full ? tail(out, low.length - 1 - i) : add_state();
      edge(from, {low.bytes[at], high.bytes[at]}, to);
      if (rest_is_full) return;
      from = to;
    }
    const auto end = static_cast<size_t>(low.length) - 1;
    edge(from, {low.bytes[end], high.bytes[end]}, out);
  }

  static bool is_full(const Encoded& low, const Encoded& high, int from) {
    for (auto i = static_cast<size_t>(from); i < static_cast<size_t>(low.length); ++i)
      if (low.bytes[i] != 0x80 || high.bytes[i] != 0xbf) return false;
    return true;
  }

  // The state before `left` bytes that may be any continuation; shared by a node's characters.
  int32_t tail(int32_t out, int left) {
    if (left == 0) return out;
    const auto at = static_cast<size_t>(left);
    if (tail_[at] == 0) {
      const int32_t after = tail(out, left - 1);
      tail_[at] = add_state();
      edge(tail_[at], {0x80, 0xbf}, after);
    }
    return tail_[at];
  }

  std::span<const int32_t> pattern_;
  NondeterministicAutomaton made_;
  std::array<int32_t, 4> tail_ = {};
};

}  // namespace

NondeterministicAutomaton nondeterministic(std::span<const int32_t> pattern) {
  return Builder(pattern).build();
}

}  // namespace dgemma
