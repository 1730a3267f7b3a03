// Everything CUDA-only that the kernels use, behind small functions. The emulation (tests/emulation/platform_emulated.h)
// gives the same names a meaning on the CPU, so that the kernel sources themselves can be executed without a GPU.
#pragma once

#include <cstdint>

#if defined(SPARSEMM_EMULATION)

#include "platform_emulated.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SPARSEMM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

namespace sparsemm::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr unsigned kFullWarp = 0xffffffffu;

// The dynamic shared memory of the block, aligned to 16 bytes.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }

template <class V>
__device__ __forceinline__ V shuffle(V value, int lane) {
  return __shfl_sync(kFullWarp, value, lane);
}
template <class V>
__device__ __forceinline__ V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(kFullWarp, value, mask);
}
template <class V>
__device__ __forceinline__ V shuffle_up(V value, int delta) {
  return __shfl_up_sync(kFullWarp, value, delta);
}
__device__ __forceinline__ unsigned ballot(bool predicate) { return __ballot_sync(kFullWarp, predicate); }
__device__ __forceinline__ unsigned match_any(unsigned value) { return __match_any_sync(kFullWarp, value); }
__device__ __forceinline__ int count_bits(unsigned bits) { return __popc(bits); }
__device__ __forceinline__ int first_bit(unsigned bits) { return __ffs(static_cast<int>(bits)) - 1; }
__device__ __forceinline__ void add_shared(int* target, int value) { atomicAdd(target, value); }

__device__ __forceinline__ float exp2_fast(float x) { return exp2f(x); }
__device__ __forceinline__ float log2_fast(float x) { return log2f(x); }
__device__ __forceinline__ float inverse_sqrt(float x) { return rsqrtf(x); }
__device__ __forceinline__ unsigned float_bits(float x) { return __float_as_uint(x); }

// Rows are read once: through the read-only path.
__device__ __forceinline__ uint4 load16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
// The same where `present`, else zeros: one predicated load, no branch. `p` may be anything where not present.
__device__ __forceinline__ uint4 load16_if(bool present, const void* p) {
  uint4 v;
  asm("{\n .reg .pred p;\n setp.ne.b32 p, %5, 0;\n"
      " mov.u32 %0, 0;\n mov.u32 %1, 0;\n mov.u32 %2, 0;\n mov.u32 %3, 0;\n"
      " @p ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];\n}\n"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"(static_cast<int>(present)));
  return v;
}
__device__ __forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) {
  return __float2half_rn(x);
}

// Bits of two 16-bit numbers in one register, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(T low, T high) {
  return static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&low)) |
         static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&high)) << 16;
}
// Lower (upper) halves of two registers in one.
__device__ __forceinline__ uint32_t join_low(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t join_high(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// c += a · b, 16 x 8 x 16, on the tensor cores; fragment layout: PTX ISA, mma.m16n8k16 for 16-bit types.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma<fp16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace sparsemm::cuda

#endif
