// The passes over (position, state): backward, forward with the entropies, the draw, the draft.
#include "automaton/cpu/chain.h"

#include <cmath>
#include <utility>

#include "automaton/automaton.h"
#include "automaton/scaled.h"
#include "cpu/entry.h"
#include "device/philox.h"

namespace dgemma {
namespace {

struct Best {
  float largest;
  int32_t token;
};

struct Workspace {
  Scaled* class_mass;  // [length, classes]
  Scaled* set_mass;    // [length, sets]
  Scaled* backward;    // [length + 1, states]: the mass of what leads from there to an end
  Scaled* forward;     // [states]: the mass of what leads there
  ScaledSum* next;     // [states]: the same a token later
  ScaledSum* set_weight;
  ScaledSum* class_weight;
  double* score;  // [2, states]: of the best way from there
  int32_t* step;  // [length, states]: its first arc, -1 where there is none
  Best* best;     // [length, sets]
};

size_t carve(const dgemma_constrain& op, char* base, Workspace* work) {
  Carver carver = {base};
  work->class_mass = carver.take<Scaled>(op.length * op.most_classes);
  work->set_mass = carver.take<Scaled>(op.length * op.most_sets);
  work->backward = carver.take<Scaled>((op.length + 1) * op.most_states);
  work->forward = carver.take<Scaled>(op.most_states);
  work->next = carver.take<ScaledSum>(op.most_states);
  work->set_weight = carver.take<ScaledSum>(op.most_sets);
  work->class_weight = carver.take<ScaledSum>(op.most_classes);
  work->score = carver.take<double>(2 * op.most_states);
  work->step = carver.take<int32_t>(op.length * op.most_states);
  work->best = carver.take<Best>(op.length * op.most_sets);
  return carver.used;
}

// One request's part of the op.
class Chain {
 public:
  Chain(const dgemma_constrain& op, int64_t request, char* base)
      : op_(op),
        request_(request),
        first_(request * op.length),
        a_(automaton_of(op.arena, op.descriptor, request)) {
    carve(op, base, &work_);
  }

  void run() {
    op_.matches[request_] = 1;
    if (!entropies_are_finite()) return;
    find_masses();
    pass_backward();
    const Scaled all = work_.backward[op_.state[request_]];
    op_.matches[request_] = all.mantissa > 0.0 ? 1 : 0;
    if (all.mantissa == 0.0) return;
    draw();
    pass_forward(all);
    write_draft();
  }

 private:
  bool ends(int64_t state) const {
    return a_.distance[state] <= op_.tokens_left[request_] && a_.passes(op_.length, state);
  }
  // A state in which the canvas may not be after i tokens has no arcs there.
  int32_t out_end(int64_t i, int64_t q) const { return a_.out_begin[a_.passes(i, q) ? q + 1 : q]; }
  int64_t statistic(int64_t i, int64_t k) const { return (first_ + i) * op_.most_classes + k; }
  bool pinned(int64_t i) const { return op_.pinned != nullptr && op_.pinned[first_ + i] != 0; }

  bool entropies_are_finite() const {
    for (int64_t i = 0; i < op_.length; ++i)
      if (!pinned(i) && !std::isfinite(op_.entropy[first_ + i])) return false;
    return true;
  }

  void find_masses() {
    for (int64_t i = 0; i < op_.length; ++i) {
      Scaled* const classes = work_.class_mass + i * a_.classes;
      for (int64_t k = 0; k < a_.classes; ++k) {
        const int64_t at = statistic(i, k);
        classes[k] = op_.class_argmax[at] < 0
                         ? Scaled()
                         : scaled_exponential(op_.class_mass[at], op_.class_max[at]);
      }
      for (int64_t j = 0; j < a_.sets; ++j) {
        ScaledSum sum;
        Best best = {-INFINITY, -1};
        for (int32_t x = a_.set_begin[j]; x < a_.set_begin[j + 1]; ++x) {
          const int32_t k = a_.set_class[x];
          sum.add(classes[k].mantissa, classes[k].exponent);
          const float z = op_.class_max[statistic(i, k)];
          const int32_t token = op_.class_argmax[statistic(i, k)];
          if (token >= 0 && (z > best.largest || (z == best.largest && token < best.token)))
            best = {z, token};
        }
        work_.set_mass[i * a_.sets + j] = sum.value();
        work_.best[i * a_.sets + j] = best;
      }
    }
  }

  // From every state the mass of the ways to an end, and the best of them: its score is the
  // greatest sum of logits.
  void pass_backward() {
    Scaled* after = work_.backward + op_.length * a_.states;
    double* score_after = work_.score;
    double* score = work_.score + a_.states;
    for (int64_t q = 0; q < a_.states; ++q) {
      after[q] = ends(q) ? Scaled{1.0, 0} : Scaled();
      score_after[q] = ends(q) ? 0.0 : -INFINITY;
    }
    for (int64_t i = op_.length - 1; i >= 0; --i) {
      const Scaled* const sets = work_.set_mass + i * a_.sets;
      const Best* const best = work_.best + i * a_.sets;
      Scaled* const here = work_.backward + i * a_.states;
      for (int64_t q = 0; q < a_.states; ++q) {
        ScaledSum sum;
        double greatest = -INFINITY;
        int32_t chosen = -1;
        for (int32_t x = a_.out_begin[q]; x < out_end(i, q); ++x) {
          const int32_t target = a_.out_target[x], j = a_.out_set[x];
          sum.add_product(after[target], sets[j]);
          const double way = best[j].largest + score_after[target];
          const bool ties = chosen >= 0 && way == greatest;
          if (way > greatest || (ties && best[j].token < best[a_.out_set[chosen]].token)) {
            greatest = way;
            chosen = x;
          }
        }
        here[q] = sum.value();
        score[q] = greatest;
        work_.step[i * a_.states + q] = chosen;
      }
      after = here;
      std::swap(score, score_after);
    }
  }

  // Whether a state has less than 2^-118 of the accepted canvases. All such states, at most 2^20,
  // are less than what the rounding of a sum loses, 2^-53 of it.
  static bool is_rare(const Scaled& from_start, const Scaled& to_end, const Scaled& all) {
    return int64_t{from_start.exponent} + to_end.exponent - all.exponent < -120;
  }

  // To every state the mass of the ways from the start, and by it the entropies. Ways that lead to
  // no end are left out, and those through rare states.
  void pass_forward(const Scaled& all) {
    Scaled* const here = work_.forward;
    for (int64_t q = 0; q < a_.states; ++q) here[q] = Scaled();
    here[op_.state[request_]] = {1.0, 0};
    const double remaining = op_.max_steps[request_] - op_.step[request_] + 1;
    const double share = remaining / op_.max_steps[request_];
    for (int64_t i = 0; i < op_.length; ++i) {
      const Scaled* const sets = work_.set_mass + i * a_.sets;
      const Scaled* const after = work_.backward + (i + 1) * a_.states;
      for (int64_t j = 0; j < a_.sets; ++j) work_.set_weight[j] = {};
      for (int64_t q = 0; q < a_.states; ++q) work_.next[q] = {};
      const Scaled* const to_end = work_.backward + i * a_.states;
      for (int64_t q = 0; q < a_.states; ++q) {
        if (here[q].mantissa == 0.0 || is_rare(here[q], to_end[q], all)) continue;
        for (int32_t x = a_.out_begin[q]; x < a_.out_begin[q + 1]; ++x) {
          const int32_t target = a_.out_target[x], j = a_.out_set[x];
          if (after[target].mantissa == 0.0) continue;
          work_.set_weight[j].add_product(here[q], after[target]);
          work_.next[target].add_product(here[q], sets[j]);
        }
      }
      if (!pinned(i)) {
        float& entropy = op_.entropy[first_ + i];
        const double own = entropy, given = entropy_given_acceptance(i, all, own);
        entropy = static_cast<float>(std::fmax(given, share * own));
      }
      for (int64_t q = 0; q < a_.states; ++q) here[q] = work_.next[q].value();
    }
  }

  // Given acceptance a token's probability is its own times a weight of its class. With P the
  // probability of a class and h the entropy inside it, H = sum of P (h - log P).
  double entropy_given_acceptance(int64_t i, const Scaled& all, double own) {
    for (int64_t k = 0; k < a_.classes; ++k) work_.class_weight[k] = {};
    for (int64_t j = 0; j < a_.sets; ++j)
      for (int32_t x = a_.set_begin[j]; x < a_.set_begin[j + 1]; ++x)
        work_.class_weight[a_.set_class[x]].add(work_.set_weight[j].total,
                                                work_.set_weight[j].exponent);
    const Scaled* const masses = work_.class_mass + i * a_.classes;
    double entropy = 0.0;
    bool alike = true;
    const ScaledSum* any = nullptr;
    for (int64_t k = 0; k < a_.classes; ++k) {
      if (masses[k].mantissa == 0.0) continue;
      const ScaledSum& weight = work_.class_weight[k];
      if (any == nullptr) any = &weight;
      alike = alike && weight.total == any->total && weight.exponent == any->exponent;
      const Scaled w = weight.value();
      const double probability = share_of(masses[k], w, all);
      if (!(probability > 0.0)) continue;
      const int64_t at = statistic(i, k);
      const double inside =
          std::log(op_.class_mass[at]) - op_.class_shifted[at] / op_.class_mass[at];
      entropy += probability * (inside - std::log(probability));
    }
    return alike ? own : std::fmax(entropy, 0.0);
  }

  // The probability of a class and a target, against the mass of all from a state.
  static double candidate(const Scaled& mass, const Scaled& after, const Scaled& all) {
    return mass.mantissa * after.mantissa *
           power_of_two(int64_t{mass.exponent} + after.exponent - all.exponent);
  }

  void draw() {
    int64_t q = op_.state[request_];
    for (int64_t i = 0; i < op_.length; ++i) {
      const Scaled* const after = work_.backward + (i + 1) * a_.states;
      const Scaled* const masses = work_.class_mass + i * a_.classes;
      const Scaled all = work_.backward[i * a_.states + q];
      const auto each = [&](const auto& use) {
        for (int32_t x = a_.out_begin[q]; x < a_.out_begin[q + 1]; ++x) {
          const int32_t target = a_.out_target[x], j = a_.out_set[x];
          if (after[target].mantissa == 0.0) continue;
          for (int32_t y = a_.set_begin[j]; y < a_.set_begin[j + 1]; ++y) {
            const int32_t k = a_.set_class[y];
            const double p = candidate(masses[k], after[target], all);
            if (p > 0.0 && !use(p, k, target)) return;
          }
        }
      };
      double total = 0.0;
      int64_t count = 0;
      each([&](double p, int32_t, int32_t) {
        total += p;
        ++count;
        return true;
      });
      const double uniform = op_.uniforms != nullptr
                                 ? op_.uniforms[first_ + i]
                                 : draw_uniform(op_.seed[request_], op_.canvas_index[request_],
                                                op_.step[request_], i, DGEMMA_PURPOSE_SAMPLE);
      const double wanted = uniform * total;
      double before = 0.0, mass = 0.0;
      int32_t chosen = 0, next = 0;
      each([&](double p, int32_t k, int32_t target) {
        before += mass;
        mass = p;
        chosen = k;
        next = target;
        return before + p <= wanted;
      });
      op_.chosen_class[first_ + i] = chosen;
      // One class alone leaves the uniform as it is.
      const double left = count == 1 ? uniform : (wanted - before) / mass;
      constexpr double kMost = 1.0 - 0x1p-53;
      op_.remainder[first_ + i] = left < 0.0 ? 0.0 : left > kMost ? kMost : left;
      q = next;
    }
  }

  void write_draft() {
    int64_t q = op_.state[request_];
    for (int64_t i = 0; i < op_.length; ++i) {
      const int32_t arc = work_.step[i * a_.states + q];
      op_.argmax[first_ + i] = work_.best[i * a_.sets + a_.out_set[arc]].token;
      q = a_.out_target[arc];
    }
  }

  const dgemma_constrain& op_;
  int64_t request_;
  int64_t first_;  // its position 0 in the arrays [batch, length]
  Automaton a_;
  Workspace work_ = {};
};

}  // namespace

size_t chain_bytes(const dgemma_constrain& op) {
  Workspace work;
  return carve(op, nullptr, &work);
}

void constrain_request(const dgemma_constrain& op, int64_t request, char* workspace) {
  Chain(op, request, workspace).run();
}

}  // namespace dgemma
