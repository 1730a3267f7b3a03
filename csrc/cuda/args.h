// Arguments of the CUDA kernels and their launch functions: plain pointers and numbers, no torch, no CUDA headers.
// Layout and semantics: sparsemm/ops/schemas.py. Strides count elements unless named bytes.
#pragma once

#include "../fused_args.h"

namespace sparsemm::cuda {

struct CompactArgs {
  const char* source[2];       // key, value [B, Hkv, T, D]
  char* target[2];             // key, value buffer [slots, D]
  const int32_t* positions;    // [total]
  const int32_t* cu_kept;      // [lists + 1]
  const int32_t* offsets;      // [lists + 1]
  int64_t stride_b[2], stride_h[2], stride_t[2];  // bytes
  int64_t total, slots;
  int lists, num_kv_heads, num_columns, row_bytes;
};

struct AppendArgs {
  const char* source[2];       // key, value [B, Hkv, n, D]
  char* target[2];             // key, value buffer [slots, D]
  const int32_t* offsets;      // [lists + 1]
  int32_t* lens;               // [lists]
  int32_t* overflow;           // [1]
  const bool* mask;            // [B, n] or null
  int64_t stride_b[2], stride_h[2], stride_t[2];  // bytes
  int64_t mask_stride_b, mask_stride_n;
  int64_t slots;
  int lists, num_kv_heads, num_new, row_bytes;
};

struct DecodeArgs {
  Dtype dtype;
  const void* query;           // [B, Hq, n, D], strides below
  const void* key_buffer;      // [slots, D]
  const void* value_buffer;    // [slots, D]
  const int32_t* offsets;      // [lists + 1]
  const int32_t* lens;         // [lists]
  const int32_t* num_later;    // [B, n] or null: n - 1 - i
  void* out;                   // [B, Hq, n, D] contiguous
  float* lse;                  // [B, Hq, n]
  int32_t* tile_begin;         // [lists + 1] workspace: first tile of each list
  float* partial_stats;        // [num_ctas, 2, kDecodeQueries, 2] workspace: maximum and sum
  float* partial_out;          // [num_ctas, 2, kDecodeQueries, D] workspace
  int64_t query_stride_b, query_stride_h, query_stride_n;
  float scale;
  int lists, num_kv_heads, group, num_queries, head_dim, num_ctas;
  bool whole;                  // one block takes all rows of a list
};

constexpr int kDecodeQueries = 8;   // queries of one kv head handled in one pass over its rows
constexpr int kDecodeTileRows = 64;  // rows of one unit of decode work
constexpr int kMaxHeadDim = 256;

// Sets the fixed grid of one decode call: as many blocks as the device runs at once, but no more than there can be
// tiles; or one a list and query block (`whole`), where those keep the device busy or are small.
inline void set_decode_grid(DecodeArgs& a, int64_t slots, int resident) {
  const int64_t blocks = (int64_t{a.group} * a.num_queries + kDecodeQueries - 1) / kDecodeQueries;
  const int64_t tiles = (slots / kDecodeTileRows + a.lists) * blocks;
  a.whole = a.lists * blocks >= 2 * int64_t{resident} || slots <= int64_t{a.lists} * kDecodeTileRows;
  a.num_ctas = static_cast<int>(a.whole ? a.lists * blocks : tiles < resident ? tiles : resident);
}
// Elements of its workspaces.
inline int64_t partial_stats_size(const DecodeArgs& a) {
  return a.whole ? 0 : int64_t{a.num_ctas} * 2 * kDecodeQueries * 2;
}
inline int64_t partial_out_size(const DecodeArgs& a) {
  return a.whole ? 0 : int64_t{a.num_ctas} * 2 * kDecodeQueries * a.head_dim;
}

struct WindowArgs {
  Dtype dtype;
  const void* query;           // [B, Hq, w, D], strides below
  const void* key;             // [B, Hkv, T, D], strides below
  const int32_t* starts;       // [B, Hkv]
  const int32_t* num_queries;  // [B]
  float* stats;                // [B * Hkv, group * w, chunks, 2] workspace
  float* lse;                  // [B * Hkv, group * w] workspace, base 2
  float* scores;               // [B, Hkv, T]
  int64_t query_stride_b, query_stride_h, query_stride_w;
  int64_t key_stride_b, key_stride_h, key_stride_t;
  float scale;
  int batch, num_kv_heads, group, window, num_columns, head_dim;
};

constexpr int kWindowChunk = 1024;  // columns of one partial softmax

inline int64_t window_lse_size(const WindowArgs& a) {
  return int64_t{a.batch} * a.num_kv_heads * a.group * a.window;
}
inline int64_t window_stats_size(const WindowArgs& a) {
  return window_lse_size(a) * ((a.num_columns + kWindowChunk - 1) / kWindowChunk) * 2;
}

struct SelectArgs {
  const float* scores;         // [lists, num_columns]
  const int32_t* starts;       // [lists]
  const int32_t* counts;       // [lists]
  const int32_t* cu_kept;      // [lists + 1]
  int32_t* positions;          // [total]
  int64_t total;
  int lists, num_columns, window;
};

// Makes a device current for this library's CUDA runtime.
const char* select_device(int device);
// Each launches on `stream` and returns null, or what CUDA had to say. No function synchronises.
const char* launch_compact(const CompactArgs& args, void* stream);
const char* launch_append(const AppendArgs& args, void* stream);
// Blocks of the decode kernel that the current device runs at once; the fixed grid is no larger.
const char* decode_resident_ctas(Dtype dtype, int head_dim, int* count);
const char* launch_decode(const DecodeArgs& args, void* stream);
const char* launch_window_scores(const WindowArgs& args, void* stream);
const char* launch_select(const SelectArgs& args, void* stream);
const char* launch_norm(const NormArgs& args, void* stream);
const char* launch_rope(const RopeArgs& args, void* stream);
const char* launch_gated(const GatedArgs& args, void* stream);

}  // namespace sparsemm::cuda
