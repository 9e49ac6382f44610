// The rows of what stands between a layer's products. Compiled once per instruction set; see
// cpu/vector.h for what that forbids, and cpu/rows.h for why the sets agree bit for bit.
//
// Every product and sum is rounded to T where transformers' modeling_diffusion_gemma.py stores it;
// inside a norm all is fp32.
#pragma once

#include "cpu/rows.h"
#include "layer/cpu/kernels.h"

namespace dgemma {
namespace {

template <typename T>
inline const T* row_of(const void* tensor, int64_t row, int64_t width) {
  return static_cast<const T*>(tensor) + row * width;
}
template <typename T>
inline T* row_of(void* tensor, int64_t row, int64_t width) {
  return static_cast<T*>(tensor) + row * width;
}

// x * factor * weight, rounded once.
template <typename T, typename Span>
inline Floats normed(Span span, const T* x, float factor, const T* weight) {
  return rounded_to<T>(span.load(x) * factor * span.load(weight));
}

// to = norm(x), with a weight or without.
template <typename T>
inline void write_norm(const T* x, const T* weight, float factor, int64_t width, T* to) {
  for_each_vector(width, [&](int64_t i, auto span) {
    const Floats v = span.load(x + i) * factor;
    span.store(to + i, weight != nullptr ? v * span.load(weight + i) : v);
  });
}

template <typename T>
void rms_norm_rows(const dgemma_rms_norm& op, int64_t first, int64_t end) {
  const int64_t width = op.hidden_size;
  for (int64_t row = first; row < end; ++row) {
    const T* x = row_of<T>(op.input, row, width);
    write_norm(x, static_cast<const T*>(op.weight), norm_factor(x, width, op.epsilon), width,
               row_of<T>(op.output, row, width));
  }
}

template <typename T>
void token_embedding_rows(const dgemma_token_embedding& op, int64_t first, int64_t end) {
  const int64_t width = op.hidden_size;
  const float scale = to_float(round_to<T>(op.scale));
  for (int64_t row = first; row < end; ++row) {
    const T* embedding = row_of<T>(op.embedding, op.ids[row], width);
    const T* added = op.conditioning == nullptr ? nullptr : row_of<T>(op.conditioning, row, width);
    T* to = row_of<T>(op.output, row, width);
    for_each_vector(width, [&](int64_t i, auto span) {
      Floats v = span.load(embedding + i) * scale;
      if (added != nullptr) v = rounded_to<T>(v) + span.load(added + i);
      span.store(to + i, v);
    });
    if (op.normalise != 0)
      write_norm<T>(to, nullptr, norm_factor<T>(to, width, op.epsilon), width, to);
  }
}

// One query or key: normalised, then each pair (i, i + half) turned by its angle.
template <typename T>
inline void turn_head(const T* x, const T* weight, const T* cosine, const T* sine, int64_t half,
                      float epsilon, T* to) {
  const float factor = norm_factor(x, 2 * half, epsilon);
  for_each_vector(half, [&](int64_t i, auto span) {
    const int64_t j = i + half;
    const Floats a = normed(span, x + i, factor, weight + i);
    const Floats b = normed(span, x + j, factor, weight + j);
    const Floats a_cosine = rounded_to<T>(a * span.load(cosine + i));
    const Floats b_sine = rounded_to<T>(-b * span.load(sine + i));
    const Floats b_cosine = rounded_to<T>(b * span.load(cosine + j));
    const Floats a_sine = rounded_to<T>(a * span.load(sine + j));
    span.store(to + i, a_cosine + b_sine);
    span.store(to + j, b_cosine + a_sine);
  });
}

template <typename T>
void normalise_heads_rows(const dgemma_normalise_heads& op, int64_t first, int64_t end) {
  const int64_t width = op.head_dim;
  const T* query_norm = static_cast<const T*>(op.query_norm);
  const T* key_norm = static_cast<const T*>(op.key_norm);
  for (int64_t token = first; token < end; ++token) {
    const T* cosine = row_of<T>(op.cosine, token, width);
    const T* sine = row_of<T>(op.sine, token, width);
    for (int64_t head = 0; head < op.query_heads; ++head) {
      const int64_t row = token * op.query_heads + head;
      turn_head(row_of<T>(op.raw_query, row, width), query_norm, cosine, sine, width / 2,
                op.epsilon, row_of<T>(op.query, row, width));
    }
    for (int64_t head = 0; head < op.key_heads; ++head) {
      const int64_t row = token * op.key_heads + head;
      const T* raw_key = row_of<T>(op.raw_key, row, width);
      const T* raw_value = op.raw_value != nullptr ? row_of<T>(op.raw_value, row, width) : raw_key;
      write_norm<T>(raw_value, nullptr, norm_factor(raw_value, width, op.epsilon), width,
                    row_of<T>(op.value, row, width));
      turn_head(raw_key, key_norm, cosine, sine, width / 2, op.epsilon,
                row_of<T>(op.key, row, width));
    }
  }
}

template <typename T>
void attention_residual_rows(const dgemma_attention_residual& op, int64_t first, int64_t end) {
  const int64_t width = op.hidden_size;
  const T* attended_norm = static_cast<const T*>(op.attended_norm);
  for (int64_t row = first; row < end; ++row) {
    const T* hidden = row_of<T>(op.hidden, row, width);
    const T* attended = row_of<T>(op.attended, row, width);
    T* residual = row_of<T>(op.residual, row, width);
    const float factor = norm_factor(attended, width, op.epsilon);
    for_each_vector(width, [&](int64_t i, auto span) {
      span.store(residual + i,
                 span.load(hidden + i) + normed(span, attended + i, factor, attended_norm + i));
    });
    const float residual_factor = norm_factor<T>(residual, width, op.epsilon);
    write_norm<T>(residual, static_cast<const T*>(op.dense_norm), residual_factor, width,
                  row_of<T>(op.dense_input, row, width));
    write_norm<T>(residual, static_cast<const T*>(op.sparse_norm), residual_factor, width,
                  row_of<T>(op.sparse_input, row, width));
  }
}

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), in torch's order of operations.
inline Floats gelu_tanh(Floats x) {
  const Floats inner = 0.79788456080286536f * (x + 0.044715f * (x * x * x));
  return 0.5f * x * (1.0f + tanh(inner));
}

template <typename T>
void gelu_product_values(const dgemma_gelu_product& op, int64_t first, int64_t end) {
  const T* gate = static_cast<const T*>(op.gate) + first;
  const T* up = static_cast<const T*>(op.up) + first;
  T* to = static_cast<T*>(op.output) + first;
  for_each_vector(end - first, [&](int64_t i, auto span) {
    span.store(to + i, rounded_to<T>(gelu_tanh(span.load(gate + i))) * span.load(up + i));
  });
}

template <typename T>
void layer_output_rows(const dgemma_layer_output& op, int64_t first, int64_t end) {
  const int64_t width = op.hidden_size;
  const T* dense_norm = static_cast<const T*>(op.dense_norm);
  const T* sparse_norm = static_cast<const T*>(op.sparse_norm);
  const T* norm = static_cast<const T*>(op.norm);
  for (int64_t row = first; row < end; ++row) {
    const T* residual = row_of<T>(op.residual, row, width);
    const T* dense = row_of<T>(op.dense, row, width);
    const T* sparse = row_of<T>(op.sparse, row, width);
    T* to = row_of<T>(op.output, row, width);
    const float dense_factor = norm_factor(dense, width, op.epsilon);
    const float sparse_factor = norm_factor(sparse, width, op.epsilon);
    // The sum of the two stands in the output until its norm is known.
    for_each_vector(width, [&](int64_t i, auto span) {
      span.store(to + i, normed(span, dense + i, dense_factor, dense_norm + i) +
                             normed(span, sparse + i, sparse_factor, sparse_norm + i));
    });
    const float factor = norm_factor<T>(to, width, op.epsilon);
    for_each_vector(width, [&](int64_t i, auto span) {
      const T* combined = to + i;
      const Floats sum = span.load(residual + i) + normed(span, combined, factor, norm + i);
      span.store(to + i, rounded_to<T>(sum) * op.scalar);
    });
    if (op.next_norm != nullptr)
      write_norm<T>(to, static_cast<const T*>(op.next_norm), norm_factor<T>(to, width, op.epsilon),
                    width, row_of<T>(op.next_input, row, width));
  }
}

}  // namespace
}  // namespace dgemma
