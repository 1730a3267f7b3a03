// The CUDA kernels around attention as CPU functions; as emulated.cpp.
#include "guarded.h"
#include "fused.cuh"

using namespace sparsemm;
using namespace sparsemm::cuda;

extern "C" const char* emulated_norm(int dtype, const void* x, const void* residual, const void* weight, void* out,
                                     void* sum, int64_t rows, int64_t size, double eps, int64_t unit_offset,
                                     uint64_t seed) {
  return guarded(seed, [&] {
    const NormArgs a{static_cast<Dtype>(dtype), x,   residual, weight, out, sum, rows, static_cast<int>(size),
                     static_cast<float>(eps),   unit_offset != 0};
    dispatch_dtype(a.dtype, [&](auto zero) { enqueue_norm<decltype(zero)>(a, nullptr); });
  });
}

extern "C" const char* emulated_rope(int dtype, const void* query, const void* key, const void* value, const void* cos,
                                     const void* sin, const int32_t* offsets, int32_t* lens, void* key_buffer,
                                     void* value_buffer, int32_t* overflow, const bool* mask, const void* query_weight,
                                     const void* key_weight, void* out, const int64_t* query_strides,
                                     const int64_t* key_strides, const int64_t* value_strides, int64_t slots,
                                     int64_t batch, int64_t num_query_heads, int64_t num_kv_heads, int64_t columns,
                                     int64_t head_dim, int64_t width, int64_t cos_rows, double eps,
                                     int64_t unit_offset, int64_t interleaved, uint64_t seed) {
  return guarded(seed, [&] {
    RopeArgs a{};
    a.dtype = static_cast<Dtype>(dtype);
    a.query = query;
    a.key = key;
    a.value = value;
    a.cos = cos;
    a.sin = sin;
    a.query_weight = query_weight;
    a.key_weight = key_weight;
    a.offsets = offsets;
    a.mask = mask;
    a.out = out;
    a.lens = lens;
    a.key_buffer = key_buffer;
    a.value_buffer = value_buffer;
    a.overflow = overflow;
    for (int d = 0; d < 3; ++d) {
      a.query_stride[d] = query_strides[d];
      a.key_stride[d] = key_strides[d];
      a.value_stride[d] = value_strides[d];
    }
    a.cos_stride_n = a.sin_stride_n = width;
    a.cos_stride_b = a.sin_stride_b = cos_rows == 1 ? 0 : columns * width;
    a.mask_stride_b = columns;
    a.mask_stride_n = 1;
    a.slots = slots;
    a.batch = static_cast<int>(batch);
    a.num_query_heads = static_cast<int>(num_query_heads);
    a.num_kv_heads = static_cast<int>(num_kv_heads);
    a.columns = static_cast<int>(columns);
    a.head_dim = static_cast<int>(head_dim);
    a.width = static_cast<int>(width);
    a.eps = static_cast<float>(eps);
    a.unit_offset = unit_offset != 0;
    a.interleaved = interleaved != 0;
    dispatch_dtype(a.dtype, [&](auto zero) { enqueue_rope<decltype(zero)>(a, nullptr); });
  });
}

extern "C" const char* emulated_gated(int dtype, const void* gate, const void* up, void* out, int64_t activation,
                                      int64_t gate_stride, int64_t up_stride, int64_t rows, int64_t size,
                                      uint64_t seed) {
  return guarded(seed, [&] {
    const GatedArgs a{static_cast<Dtype>(dtype), static_cast<Activation>(activation), gate, up, out, gate_stride,
                      up_stride, rows, size};
    dispatch_dtype(a.dtype, [&](auto zero) { enqueue_gated<decltype(zero)>(a, nullptr); });
  });
}
