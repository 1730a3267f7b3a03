// Fixed-width vectors over the compiler's vector extension, for the CPU kernels. No torch, no intrinsics.
//
// This header is compiled once per instruction set (see ../build.py). Everything lives in an unnamed namespace, so that
// the linker can never merge code built for a newer instruction set into the baseline build.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <class C>
struct VectorOf {
  typedef C type __attribute__((vector_size(kLanes * sizeof(C))));
};
template <class C>
using Vec = typename VectorOf<C>::type;

typedef uint16_t VecU16 __attribute__((vector_size(kLanes * 2)));
typedef uint32_t VecU32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI32 __attribute__((vector_size(kLanes * 4)));
typedef _Float16 VecF16 __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
  uint16_t bits;
};

// Element type -> type of the arithmetic: 16-bit rows are read as float32, float64 keeps its own precision.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class V>
inline V load_raw(const void* source) {
  V v;
  std::memcpy(&v, source, sizeof(V));
  return v;
}

inline Vec<float> load(const float* p) { return load_raw<Vec<float>>(p); }
inline Vec<double> load(const double* p) { return load_raw<Vec<double>>(p); }
inline Vec<float> load(const BFloat16* p) {
  const VecU32 wide = __builtin_convertvector(load_raw<VecU16>(p), VecU32) << 16;
  return load_raw<Vec<float>>(&wide);
}
inline Vec<float> load(const _Float16* p) { return __builtin_convertvector(load_raw<VecF16>(p), Vec<float>); }

template <class C>
inline void store(C* p, Vec<C> v) {
  std::memcpy(p, &v, sizeof(v));
}

inline float to_compute(float x) { return x; }
inline double to_compute(double x) { return x; }
inline float to_compute(_Float16 x) { return static_cast<float>(x); }
inline float to_compute(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void from_compute(float x, float* out) { *out = x; }
inline void from_compute(double x, double* out) { *out = x; }
inline void from_compute(float x, _Float16* out) { *out = static_cast<_Float16>(x); }
inline void from_compute(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) {
    out->bits = 0x7fc0;
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // nearest, ties to even
  }
}

// The vector in the dtype of the rows, each value rounded as from_compute does.
inline void store_as(float* p, Vec<float> v) { store(p, v); }
inline void store_as(double* p, Vec<double> v) { store(p, v); }
inline void store_as(_Float16* p, Vec<float> v) {
  const VecF16 narrow = __builtin_convertvector(v, VecF16);
  std::memcpy(p, &narrow, sizeof(narrow));
}
// The float32 bits of a value whose upper half is its nearest bfloat16, ties to even. A NaN stays one as long as it
// comes from bfloat16 numbers, or from the processor: its lower half is 0.
inline VecU32 rounded_bits(Vec<float> v) {
  const VecU32 bits = load_raw<VecU32>(&v);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
inline void store_as(BFloat16* p, Vec<float> v) {
  const VecU16 narrow = __builtin_convertvector(rounded_bits(v) >> 16, VecU16);
  std::memcpy(p, &narrow, sizeof(narrow));
}

template <class C>
constexpr C kMinusInfinity = -std::numeric_limits<C>::infinity();

template <class C>
inline Vec<C> splat(C x) {
  return Vec<C>{} + x;
}

// The sum of all lanes, by halves: few additions wait for another.
template <class C, int N>
inline C sum_of(const C* lanes) {
  if constexpr (N == 1) {
    return lanes[0];
  } else {
    C halves[N / 2];
    for (int i = 0; i < N / 2; ++i) halves[i] = lanes[i] + lanes[i + N / 2];
    return sum_of<C, N / 2>(halves);
  }
}
template <class C>
inline C sum_lanes(Vec<C> v) {
  C lanes[kLanes];
  store(lanes, v);
  return sum_of<C, kLanes>(lanes);
}

// e^x for x <= 0 to about one unit in the last place: x = k ln2 + r, |r| <= ln2 / 2, degree-6 polynomial in r.
// Below -87 the result is 0, which also serves -inf.
inline Vec<float> exp_nonpositive(Vec<float> x) {
  const VecI32 underflow = x < -87.0f;
  const Vec<float> bounded = underflow ? splat(-87.0f) : x;
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec<float> k = (bounded * 1.44269504f + magic) - magic;
  const Vec<float> r = (bounded - k * 0.693359375f) + k * 2.12194440e-4f;
  Vec<float> p = r * 1.3981999507e-3f + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const VecI32 exponent = (__builtin_convertvector(k, VecI32) + 127) << 23;
  const Vec<float> scaled = p * load_raw<Vec<float>>(&exponent);
  return underflow ? splat(0.0f) : scaled;
}
inline Vec<double> exp_nonpositive(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes; ++i) y[i] = std::exp(x[i]);
  return y;
}

}  // namespace
