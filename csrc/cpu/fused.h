// What a decoder layer does around its attention, in one pass each: norms, rotation, gated activations. Part of
// kernels.cpp. Results are rounded to the dtype of the rows where the modules of transformers round theirs.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace sparsemm::cpu {
namespace {

// A value rounded to what T holds.
template <class T>
inline Vec<Compute<T>> rounded(Vec<Compute<T>> v) {
  if constexpr (sizeof(T) < 4) {
    T narrow[kLanes];
    store_as(narrow, v);
    return load(narrow);
  }
  return v;
}
template <>
inline Vec<float> rounded<BFloat16>(Vec<float> v) {
  const VecU32 bits = rounded_bits(v) & 0xffff0000u;
  return load_raw<Vec<float>>(&bits);
}
template <class T>
inline float rounded(float x) {
  T narrow;
  from_compute(x, &narrow);
  return to_compute(narrow);
}

// 1 / sqrt(mean of squares + eps) of `size` values that `at` gives, in float32 as the modules compute it.
inline float inverse_root(double squares, int64_t size, double eps) {
  return 1.0f / std::sqrt(static_cast<float>(squares / static_cast<double>(size)) + static_cast<float>(eps));
}

template <class T>
float inverse_rms(const T* x, int64_t size, double eps) {
  Vec<float> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      const Vec<float> v = load(x + i + j * kLanes);
      sums[j] += v * v;
    }
  }
  for (; i + kLanes <= size; i += kLanes) {
    const Vec<float> v = load(x + i);
    sums[0] += v * v;
  }
  double squares = sum_lanes<float>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < size; ++i) squares += to_compute(x[i]) * to_compute(x[i]);
  return inverse_root(squares, size, eps);
}
template <>
inline float inverse_rms<double>(const double* x, int64_t size, double eps) {
  double squares = 0;
  for (int64_t i = 0; i < size; ++i) squares += static_cast<double>(static_cast<float>(x[i]) * static_cast<float>(x[i]));
  return inverse_root(squares, size, eps);
}

// out = x * factor, rounded, times weight; with unit_offset times 1 + weight, rounded once. `out` may be `x`.
template <class T>
void scale_row(const T* x, float factor, const T* weight, bool unit_offset, int64_t size, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec<float> y = load(x + i) * factor, w = load(weight + i);
    store_as(out + i, unit_offset ? y * (w + 1.0f) : w * rounded<T>(y));
  }
  for (; i < size; ++i) {
    const float y = to_compute(x[i]) * factor, w = to_compute(weight[i]);
    from_compute(unit_offset ? y * (w + 1.0f) : w * rounded<T>(y), out + i);
  }
}
template <>
inline void scale_row<double>(const double* x, float factor, const double* weight, bool unit_offset, int64_t size,
                              double* out) {
  for (int64_t i = 0; i < size; ++i) {
    const float y = static_cast<float>(x[i]) * factor;
    out[i] = unit_offset ? y * (static_cast<float>(weight[i]) + 1.0f) : weight[i] * static_cast<double>(y);
  }
}

template <class T>
void add_row(const T* x, const T* residual, int64_t size, T* sum) {
  using C = Compute<T>;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store_as(sum + i, load(x + i) + load(residual + i));
  for (; i < size; ++i) from_compute(static_cast<C>(to_compute(x[i]) + to_compute(residual[i])), sum + i);
}

template <class T>
void norm_rows_typed(const NormArgs& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.size;
    if (a.residual) {
      T* sum = static_cast<T*>(a.sum) + row * a.size;
      add_row(x, static_cast<const T*>(a.residual) + row * a.size, a.size, sum);
      x = sum;
    }
    scale_row(x, inverse_rms(x, a.size, a.eps), weight, a.unit_offset, a.size, static_cast<T*>(a.out) + row * a.size);
  }
}

// Rotates the first `width` of head_dim values; `out` may be `x`. Products and sums are rounded one by one.
template <class T>
void rotate_row(const RopeArgs& a, const T* x, const T* cos, const T* sin, T* out) {
  using C = Compute<T>;
  const int64_t half = a.width / 2;
  const auto turn = [](C own, C c, C other, C s, T* target) {
    T products[2];
    from_compute(own * c, products);
    from_compute(other * s, products + 1);
    from_compute(to_compute(products[0]) + to_compute(products[1]), target);
  };
  int64_t i = 0;
  if constexpr (sizeof(T) < 8) {
    for (; !a.interleaved && i + kLanes <= half; i += kLanes) {
      const Vec<float> low = load(x + i), high = load(x + half + i);
      store_as(out + i, rounded<T>(low * load(cos + i)) + rounded<T>(-high * load(sin + i)));
      store_as(out + half + i, rounded<T>(high * load(cos + half + i)) + rounded<T>(low * load(sin + half + i)));
    }
  }
  for (; i < half; ++i) {
    const int64_t first = a.interleaved ? 2 * i : i, second = a.interleaved ? 2 * i + 1 : half + i;
    const int64_t at = a.interleaved ? i : second;  // of the second one's factors
    const C low = to_compute(x[first]), high = to_compute(x[second]);
    turn(low, to_compute(cos[i]), -high, to_compute(sin[i]), out + first);
    turn(high, to_compute(cos[at]), low, to_compute(sin[at]), out + second);
  }
  if (out != x) std::memcpy(out + a.width, x + a.width, (a.head_dim - a.width) * sizeof(T));
}

// One row of query or key into `out`: normalised where there is a weight, then rotated.
template <class T>
void rope_row(const RopeArgs& a, const T* x, const T* weight, int64_t b, int64_t i, T* out) {
  const int64_t factors = b * a.cos_stride_b + i * a.cos_stride_n, others = b * a.sin_stride_b + i * a.sin_stride_n;
  if (weight) {
    scale_row(x, inverse_rms(x, a.head_dim, a.eps), weight, a.unit_offset, a.head_dim, out);
    x = out;
  }
  rotate_row(a, x, static_cast<const T*>(a.cos) + factors, static_cast<const T*>(a.sin) + others, out);
}

template <class T>
void rope_heads_typed(const RopeArgs& a, int64_t begin, int64_t end) {
  const int64_t heads = a.num_query_heads + a.num_kv_heads;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / heads, head = item % heads;
    if (head < a.num_query_heads) {
      const T* query = static_cast<const T*>(a.query) + b * a.query_stride[0] + head * a.query_stride[1];
      T* out = static_cast<T*>(a.out) + (b * a.num_query_heads + head) * a.columns * a.head_dim;
      for (int64_t i = 0; i < a.columns; ++i) {
        rope_row(a, query + i * a.query_stride[2], static_cast<const T*>(a.query_weight), b, i, out + i * a.head_dim);
      }
      continue;
    }
    const int64_t h = head - a.num_query_heads, r = b * a.num_kv_heads + h;
    const auto stored = [&](int64_t i) { return !a.mask || a.mask[b * a.mask_stride_b + i * a.mask_stride_n]; };
    int64_t total = 0, slot = int64_t{a.offsets[r]} + a.lens[r];
    for (int64_t i = 0; i < a.columns; ++i) total += stored(i);
    if (slot + total > a.offsets[r + 1]) {
      *a.overflow = 1;
      continue;
    }
    a.lens[r] += static_cast<int32_t>(total);
    const T* key = static_cast<const T*>(a.key) + b * a.key_stride[0] + h * a.key_stride[1];
    const T* value = static_cast<const T*>(a.value) + b * a.value_stride[0] + h * a.value_stride[1];
    for (int64_t i = 0; i < a.columns; ++i) {
      if (!stored(i)) continue;
      rope_row(a, key + i * a.key_stride[2], static_cast<const T*>(a.key_weight), b, i,
               static_cast<T*>(a.key_buffer) + slot * a.head_dim);
      std::memcpy(static_cast<T*>(a.value_buffer) + slot * a.head_dim, value + i * a.value_stride[2],
                  a.head_dim * sizeof(T));
      ++slot;
    }
  }
}

// 1 / (1 + e^-x).
template <class C>
inline Vec<C> sigmoid(Vec<C> x) {
  const auto negative = x < C(0);
  const Vec<C> e = exp_nonpositive(negative ? x : -x);
  return (negative ? e : splat(C(1))) / (e + C(1));
}

constexpr double kGeluFactor = 1.5957691216057308;  // 2 sqrt(2 / pi): 1 + tanh(y) = 2 sigmoid(2 y)
constexpr double kGeluCubic = 0.044715;

template <class T>
void gated_block(Activation activation, const T* gate, const T* up, T* out) {
  using C = Compute<T>;
  const Vec<C> x = load(gate);
  const Vec<C> y = activation == Activation::kSilu
                       ? x
                       : (x + x * x * x * static_cast<C>(kGeluCubic)) * static_cast<C>(kGeluFactor);
  store_as(out, rounded<T>(x * sigmoid<C>(y)) * load(up));
}

template <class T>
void gated_row(Activation activation, const T* gate, const T* up, int64_t size, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) gated_block(activation, gate + i, up + i, out + i);
  if (i == size) return;
  T rest[3][kLanes] = {};
  std::memcpy(rest[0], gate + i, (size - i) * sizeof(T));
  std::memcpy(rest[1], up + i, (size - i) * sizeof(T));
  gated_block(activation, rest[0], rest[1], rest[2]);
  std::memcpy(out + i, rest[2], (size - i) * sizeof(T));
}

template <class T>
void gated_elements_typed(const GatedArgs& a, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t row = begin / a.size, first = begin % a.size;
    const int64_t count = a.size - first < end - begin ? a.size - first : end - begin;
    gated_row(a.activation, static_cast<const T*>(a.gate) + row * a.gate_stride + first,
              static_cast<const T*>(a.up) + row * a.up_stride + first, count, static_cast<T*>(a.out) + begin);
    begin += count;
  }
}

}  // namespace
}  // namespace sparsemm::cpu
