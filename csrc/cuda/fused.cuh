// add_rms_norm, rope_append and the gated activations: what a decoder layer does around its attention, one launch each.
// Results are rounded to T where the modules of transformers round theirs.
#pragma once

#include <cmath>
#include <type_traits>

#include "args.h"
#include "platform.cuh"

namespace sparsemm::cuda {

constexpr int kNormThreads = 256;
constexpr int kRopeThreads = 64;
constexpr int kGatedThreads = 256;

template <class T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

template <class T>
struct Vector16 {
  static constexpr int kSize = 16 / sizeof(T);
  union {
    uint4 bits;
    T value[kSize];
  };
  __device__ __forceinline__ explicit Vector16(const T* source) : bits(load16(source)) {}
  __device__ __forceinline__ void store(T* target) const { store16(target, bits); }
};

// weight * (x * factor): what a norm makes of one value.
template <class T>
__device__ __forceinline__ T normed(float x, float factor, float weight, bool unit_offset) {
  const float y = x * factor;
  return from_float<T>(unit_offset ? y * (weight + 1.0f) : weight * rounded<T>(y));
}

// One block a row of a.size elements, a multiple of a 16-byte vector.
template <class T>
__global__ void __launch_bounds__(kNormThreads) norm_kernel(NormArgs a) {
  using Vector = Vector16<T>;
  float* warp_sums = reinterpret_cast<float*>(shared_memory());  // [kNormThreads / 32]
  const int thread = threadIdx.x;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * a.size;
  const T* x = static_cast<const T*>(a.x) + row;
  const T* residual = a.residual ? static_cast<const T*>(a.residual) + row : nullptr;
  const auto total = [&](int i) {  // computed again for the second pass: its operands are in the cache
    Vector v(x + i);
    if (residual) {
      const Vector other(residual + i);
      for (int j = 0; j < Vector::kSize; ++j) v.value[j] = from_float<T>(to_float(v.value[j]) + to_float(other.value[j]));
    }
    return v;
  };
  float squares = 0;
  for (int i = thread * Vector::kSize; i < a.size; i += kNormThreads * Vector::kSize) {
    const Vector v = total(i);
    for (int j = 0; j < Vector::kSize; ++j) squares += to_float(v.value[j]) * to_float(v.value[j]);
    if (residual) v.store(static_cast<T*>(a.sum) + row + i);
  }
  for (int step = 16; step > 0; step /= 2) squares += shuffle_xor(squares, step);
  if (thread % 32 == 0) warp_sums[thread / 32] = squares;
  sync_block();
  squares = 0;
  for (int w = 0; w < kNormThreads / 32; ++w) squares += warp_sums[w];
  const float factor = inverse_sqrt(squares / static_cast<float>(a.size) + a.eps);
  for (int i = thread * Vector::kSize; i < a.size; i += kNormThreads * Vector::kSize) {
    Vector v = total(i);
    const Vector weight(static_cast<const T*>(a.weight) + i);
    for (int j = 0; j < Vector::kSize; ++j) {
      v.value[j] = normed<T>(to_float(v.value[j]), factor, to_float(weight.value[j]), a.unit_offset);
    }
    v.store(static_cast<T*>(a.out) + row + i);
  }
}

// One row of query or key, by one warp: normalised where there is a weight, then rotated. Rows are short: unrolled
// loops would only take registers.
template <class T>
__device__ __forceinline__ void rope_row(const RopeArgs& a, const T* x, const T* weight, const T* cos, const T* sin,
                                         T* out) {
  const int lane = threadIdx.x % 32, half = a.width / 2;
  float factor = 1;
  if (weight) {  // the same for all lanes
    float squares = 0;
#pragma unroll 1
    for (int d = lane; d < a.head_dim; d += 32) squares += to_float(x[d]) * to_float(x[d]);
    for (int step = 16; step > 0; step /= 2) squares += shuffle_xor(squares, step);
    factor = inverse_sqrt(squares / static_cast<float>(a.head_dim) + a.eps);
  }
  const auto value = [&](int d) {
    const float plain = to_float(x[d]);
    return weight ? to_float(normed<T>(plain, factor, to_float(weight[d]), a.unit_offset)) : plain;
  };
#pragma unroll 1
  for (int i = lane; i < half; i += 32) {
    const int first = a.interleaved ? 2 * i : i, second = a.interleaved ? 2 * i + 1 : half + i;
    const int at = a.interleaved ? i : second;  // of the second one's factors
    const float low = value(first), high = value(second);
    out[first] = from_float<T>(rounded<T>(low * to_float(cos[i])) + rounded<T>(-high * to_float(sin[i])));
    out[second] = from_float<T>(rounded<T>(high * to_float(cos[at])) + rounded<T>(low * to_float(sin[at])));
  }
#pragma unroll 1
  for (int d = a.width + lane; d < a.head_dim; d += 32) out[d] = from_float<T>(value(d));
}

// One block a head of one batch row, query heads before kv heads; its warps take the columns in turn. For few columns:
// each counts the stored ones before it itself.
template <class T>
__global__ void __launch_bounds__(kRopeThreads) rope_kernel(RopeArgs a) {
  const int heads = a.num_query_heads + a.num_kv_heads, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t b = blockIdx.x / heads;
  const int head = blockIdx.x % heads, h = head - a.num_query_heads;
  const bool is_query = h < 0;
  const int64_t r = is_query ? 0 : b * a.num_kv_heads + h;
  const bool* mask = a.mask ? a.mask + b * a.mask_stride_b : nullptr;
  const auto stored_before = [&](int end) {  // columns 0 .. end - 1 that are stored
    int count = 0;
#pragma unroll 1
    for (int i = lane; i < end; i += 32) count += !mask || mask[i * a.mask_stride_n] ? 1 : 0;
    for (int step = 16; step > 0; step /= 2) count += shuffle_xor(count, step);
    return count;
  };
  int64_t first = (b * a.num_query_heads + head) * a.columns;  // row of `out`, or slot, of the first column
  if (!is_query) {
    const int total = stored_before(a.columns);
    const int64_t begin = a.offsets[r], end = a.offsets[r + 1], length = a.lens[r];
    sync_block();  // every thread has read the length by now
    if (length < 0 || begin < 0 || begin + length + total > end || end > a.slots) {
      if (threadIdx.x == 0) *a.overflow = 1;
      return;
    }
    if (threadIdx.x == 0) a.lens[r] = static_cast<int32_t>(length + total);
    first = begin + length;
  }
  const int items = is_query ? a.columns : 2 * a.columns;  // of a kv head its values, too
#pragma unroll 1
  for (int item = warp; item < items; item += kRopeThreads / 32) {
    const int i = is_query ? item : item / 2;
    int64_t row = first + i;
    if (!is_query) {
      row = first + stored_before(i);
      if (mask && !mask[i * a.mask_stride_n]) continue;  // the same for all lanes
    }
    if (!is_query && item % 2 == 1) {
      const T* value = static_cast<const T*>(a.value) + b * a.value_stride[0] + h * a.value_stride[1] +
                       i * a.value_stride[2];
#pragma unroll 1
      for (int d = lane; d < a.head_dim; d += 32) static_cast<T*>(a.value_buffer)[row * a.head_dim + d] = value[d];
      continue;
    }
    const int64_t* stride = is_query ? a.query_stride : a.key_stride;
    const T* x = static_cast<const T*>(is_query ? a.query : a.key) + b * stride[0] + (is_query ? head : h) * stride[1] +
                 i * stride[2];
    rope_row(a, x, static_cast<const T*>(is_query ? a.query_weight : a.key_weight),
             static_cast<const T*>(a.cos) + b * a.cos_stride_b + i * a.cos_stride_n,
             static_cast<const T*>(a.sin) + b * a.sin_stride_b + i * a.sin_stride_n,
             static_cast<T*>(is_query ? a.out : a.key_buffer) + row * a.head_dim);
  }
}

__device__ __forceinline__ float activated(Activation activation, float x) {
  // x * sigmoid(y); gelu_tanh: 1 + tanh(z) = 2 sigmoid(2 z)
  const float y = activation == Activation::kSilu ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exp2_fast(-1.4426950408889634f * y));
}

// One 16-byte vector a thread.
template <class T>
__global__ void __launch_bounds__(kGatedThreads) gated_kernel(GatedArgs a) {
  using Vector = Vector16<T>;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kGatedThreads + threadIdx.x;
  const int64_t vectors = a.size / Vector::kSize, row = item / vectors, i = item % vectors * Vector::kSize;
  if (row >= a.rows) return;
  Vector gate(static_cast<const T*>(a.gate) + row * a.gate_stride + i);
  const Vector up(static_cast<const T*>(a.up) + row * a.up_stride + i);
  for (int j = 0; j < Vector::kSize; ++j) {
    const float product = rounded<T>(activated(a.activation, to_float(gate.value[j]))) * to_float(up.value[j]);
    gate.value[j] = from_float<T>(product);
  }
  gate.store(static_cast<T*>(a.out) + row * a.size + i);
}

template <class T>
void enqueue_norm(const NormArgs& a, void* stream) {
  if (a.rows == 0 || a.size == 0) return;
  SPARSEMM_LAUNCH(norm_kernel<T>, static_cast<unsigned>(a.rows), kNormThreads, kNormThreads / 32 * sizeof(float), stream,
                  a);
}

template <class T>
void enqueue_rope(const RopeArgs& a, void* stream) {
  const int64_t blocks = int64_t{a.batch} * (a.num_query_heads + a.num_kv_heads);
  if (blocks == 0 || a.columns == 0) return;
  SPARSEMM_LAUNCH(rope_kernel<T>, static_cast<unsigned>(blocks), kRopeThreads, 0, stream, a);
}

template <class T>
void enqueue_gated(const GatedArgs& a, void* stream) {
  const int64_t vectors = a.rows * (a.size / Vector16<T>::kSize);
  if (vectors == 0) return;
  SPARSEMM_LAUNCH(gated_kernel<T>, static_cast<unsigned>((vectors + kGatedThreads - 1) / kGatedThreads), kGatedThreads, 0,
                  stream, a);
}

// Calls `launch(T{})` with the type that dtype names.
template <class F>
void dispatch_dtype(Dtype dtype, const F& launch) {
  switch (dtype) {
    case Dtype::kFloat32: launch(float{}); break;
    case Dtype::kFloat16: launch(fp16{}); break;
    case Dtype::kBFloat16: launch(bf16{}); break;
  }
}

}  // namespace sparsemm::cuda
