// Arguments of the operators around attention, on either device: plain pointers and numbers, no torch. Layout and
// semantics: sparsemm/ops/schemas.py. Strides count elements; the last dimension of every tensor is contiguous.
#pragma once

#include <cstdint>

namespace sparsemm {

enum class Dtype : int { kFloat32, kFloat16, kBFloat16, kFloat64 };  // the last one on the CPU alone

struct NormArgs {
  Dtype dtype;
  const void* x;               // [rows, size]
  const void* residual;        // [rows, size] or null
  const void* weight;          // [size]
  void* out;                   // [rows, size]
  void* sum;                   // [rows, size], null without residual
  int64_t rows;
  int size;
  float eps;
  bool unit_offset;
};

struct RopeArgs {
  Dtype dtype;
  const void* query;           // [B, Hq, n, D]
  const void* key;             // [B, Hkv, n, D]
  const void* value;           // [B, Hkv, n, D]
  const void* cos;             // [B or 1, n, width]
  const void* sin;
  const void* query_weight;    // [D] or null
  const void* key_weight;
  const int32_t* offsets;      // [B * Hkv + 1]
  const bool* mask;            // [B, n] or null
  void* out;                   // [B, Hq, n, D] contiguous
  int32_t* lens;               // [B * Hkv]
  void* key_buffer;            // [slots, D]
  void* value_buffer;
  int32_t* overflow;           // [1]
  int64_t query_stride[3], key_stride[3], value_stride[3];  // b, h, n
  int64_t cos_stride_b, cos_stride_n, sin_stride_b, sin_stride_n, mask_stride_b, mask_stride_n;
  int64_t slots;
  int batch, num_query_heads, num_kv_heads, columns, head_dim, width;
  float eps;
  bool unit_offset, interleaved;
};

enum class Activation : int { kSilu, kGeluTanh };

struct GatedArgs {
  Dtype dtype;
  Activation activation;
  const void* gate;            // [rows, size], rows gate_stride apart
  const void* up;
  void* out;                   // [rows, size]
  int64_t gate_stride, up_stride, rows, size;
};

}  // namespace sparsemm
