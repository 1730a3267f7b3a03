// CPU kernels over ragged rows: plain pointers in, no torch. Layout and semantics: sparsemm/ops/schemas.py.
#pragma once

#include <cstdint>

namespace sparsemm::cpu {

enum class Dtype { kFloat32, kFloat64, kFloat16, kBFloat16 };

// One varlen_decode call. Strides count elements; the last dimension of every tensor is contiguous.
struct DecodeArgs {
  Dtype dtype;
  const void* query;          // [B, Hq, n, D], strides below
  const void* key_buffer;     // [slots, D]
  const void* value_buffer;   // [slots, D]
  const int32_t* offsets;     // [B * Hkv + 1]
  const int32_t* lens;        // [B * Hkv]
  const int32_t* num_later;   // [B, n] or null: n - 1 - i
  void* out;                  // [B, Hq, n, D] contiguous
  float* lse;                 // [B, Hq, n]
  int64_t num_kv_heads, num_query_heads, num_queries, head_dim;
  int64_t query_stride_b, query_stride_h, query_stride_n;
  double scale;
};

// One piece of decode work: queries [query_begin, query_end) of row list `list`, numbered head-in-group * n + i, over
// its rows [row_begin, row_end). Fills `state` with one record of 2 + D compute values a query: maximum, sum, and the
// weighted values relative to the maximum.
struct DecodePiece {
  int64_t list, query_begin, query_end, row_begin, row_end;
};

struct WindowArgs {
  Dtype dtype;
  const void* query;            // [B, Hq, w, D], strides below
  const void* key;              // [B, Hkv, T, D], strides below
  const int32_t* starts;        // [B, Hkv]
  const int32_t* num_queries;   // [B]
  float* scores;                // [B, Hkv, T]
  int64_t num_kv_heads, num_query_heads, window, num_columns, head_dim;
  int64_t query_stride_b, query_stride_h, query_stride_w;
  int64_t key_stride_b, key_stride_h, key_stride_t;
  double scale;
};

// One add_rms_norm call over contiguous rows of `size` values.
struct NormArgs {
  Dtype dtype;
  const void* x;
  const void* residual;  // or null
  const void* weight;    // [size]
  void* out;
  void* sum;             // null without residual
  int64_t size;
  double eps;
  bool unit_offset;
};

// One rope_append call. Strides [b, h, n] count elements; the last dimension of every tensor is contiguous.
struct RopeArgs {
  Dtype dtype;
  const void* query;         // [B, Hq, n, D]
  const void* key;           // [B, Hkv, n, D]
  const void* value;         // [B, Hkv, n, D]
  const void* cos;           // [B or 1, n, width], strides below
  const void* sin;
  const void* query_weight;  // [D] or null
  const void* key_weight;
  const int32_t* offsets;    // [B * Hkv + 1]
  const bool* mask;          // [B, n] or null
  void* out;                 // [B, Hq, n, D] contiguous
  int32_t* lens;             // [B * Hkv]
  void* key_buffer;          // [slots, D]
  void* value_buffer;
  int32_t* overflow;         // [1]
  int64_t query_stride[3], key_stride[3], value_stride[3];
  int64_t cos_stride_b, cos_stride_n, sin_stride_b, sin_stride_n, mask_stride_b, mask_stride_n;
  int64_t num_query_heads, num_kv_heads, columns, head_dim, width;
  double eps;
  bool unit_offset, interleaved;
};

enum class Activation { kSilu, kGeluTanh };

// The kernels built for one instruction set.
struct KernelTable {
  // Values of the compute type (float, or double for float64) that one query's record holds.
  void (*decode_piece)(const DecodeArgs&, const DecodePiece&, void* state, void* scratch);
  // Merges `count` states of the same queries (record after record, `stride` values apart) and writes out and lse.
  void (*decode_finish)(const DecodeArgs&, const DecodePiece&, const void* states, int64_t stride, int64_t count);
  // Scores of one row list; scratch holds window_scratch() floats.
  void (*window_list)(const WindowArgs&, int64_t list, float* scratch);
  int64_t (*window_scratch)(const WindowArgs&);
  // The count highest of scores[start .. num_columns) in column order (ties to the lower column), then the columns
  // max(start, num_columns) .. num_columns + window - 1. Returns how many were written; scratch: 2 * num_columns.
  int64_t (*select_list)(const float* scores, int64_t start, int64_t num_columns, int64_t count, int64_t window,
                         int32_t* positions, uint32_t* scratch);
  void (*norm_rows)(const NormArgs&, int64_t begin, int64_t end);
  // Heads begin .. end - 1 of B * (Hq + Hkv): of each batch row the query heads, then the kv heads.
  void (*rope_heads)(const RopeArgs&, int64_t begin, int64_t end);
  void (*gated_row)(Dtype, Activation, const void* gate, const void* up, int64_t size, void* out);
};

constexpr int64_t kDecodeTile = 32;     // rows whose weights are held at a time
constexpr int64_t kMaxQueryBlock = 32;  // queries a piece may hold

// Compute values of scratch that decode_piece needs: the scaled queries and the weights of one tile of rows.
inline int64_t decode_scratch(const DecodeArgs& a) { return kMaxQueryBlock * (a.head_dim + kDecodeTile); }

const KernelTable& kernels_baseline();
#if defined(SPARSEMM_X86_LEVELS)
const KernelTable& kernels_v3();
const KernelTable& kernels_v4();
#endif

}  // namespace sparsemm::cpu
