// CPU kernels over ragged rows: plain pointers in, no torch. Layout and semantics: sparsemm/ops/schemas.py.
#pragma once

#include "../fused_args.h"

namespace sparsemm::cpu {

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
  // Elements begin .. end - 1 of all rows together.
  void (*gated_elements)(const GatedArgs&, int64_t begin, int64_t end);
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
