// varlen_decode: attention of a few queries per head over ragged rows, split over a fixed grid.
//
// The rows of all lists are cut into tiles of kDecodeTileRows; block c takes the tiles c * per .. (c + 1) * per - 1 of
// the whole, whichever lists they belong to. A list of any length is thus spread over as many blocks as its share of the
// work, and skewed lengths cost what uniform ones do. What a block computes for a list that it does not hold entirely
// goes to the workspace, and combine_kernel merges it. Lengths are read on the device and the grid depends on shapes
// only, so that both launches can be captured in a CUDA graph.
//
// Where the lists alone fill the device, or hold few rows, each is one block's (`whole`), and one launch is all.
#pragma once

#include <cmath>
#include <type_traits>

#include "args.h"
#include "row_math.cuh"

namespace sparsemm::cuda {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeWarps = kDecodeThreads / 32;
constexpr int kCombineThreads = 256;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float minus_infinity() { return -INFINITY; }

__device__ __forceinline__ int tiles_of(int length) {
  return length > 0 ? (length + kDecodeTileRows - 1) / kDecodeTileRows : 0;
}

// Queries of one kv head are numbered head-in-group * n + i and taken kDecodeQueries at a time ("blocks").
__device__ __forceinline__ int query_blocks(const DecodeArgs& a) {
  return (a.group * a.num_queries + kDecodeQueries - 1) / kDecodeQueries;
}

// Rows of list r that query i of its batch row sees.
__device__ __forceinline__ int rows_seen(const DecodeArgs& a, int r, int i, int length) {
  const int later = a.num_later ? a.num_later[r / a.num_kv_heads * a.num_queries + i] : a.num_queries - 1 - i;
  const int seen = length - later;
  return seen < 0 ? 0 : (seen > length ? length : seen);
}

// Rows of list r that any query sees: none of a sequence that has ended.
__device__ __forceinline__ int rows_of(const DecodeArgs& a, int r) {
  return a.num_queries == 1 ? rows_seen(a, r, 0, a.lens[r]) : a.lens[r];
}

// Place of query `index` of list r in out and lse: (b * Hq + head) * n + i.
__device__ __forceinline__ int64_t output_row(const DecodeArgs& a, int r, int index) {
  const int64_t b = r / a.num_kv_heads, head = r % a.num_kv_heads * a.group + index / a.num_queries;
  return (b * a.num_kv_heads * a.group + head) * a.num_queries + index % a.num_queries;
}

template <class T>
__device__ __forceinline__ void store_output(const DecodeArgs& a, int r, int index, int dim, const float (&value)[4]) {
  T* target = static_cast<T*>(a.out) + output_row(a, r, index) * a.head_dim + dim;
  for (int j = 0; j < 4; ++j) target[j] = from_float<T>(value[j]);
}

// Where the tiles of each list begin. Every block computes what it needs of the running sum itself: thread t sums the
// lists t * chunk .. (t + 1) * chunk - 1, the block scans the sums. Returns the number of tiles; `start` receives the
// list that holds tile `wanted` and that list's first tile. Block 0 also stores the running sum for combine_kernel.
__device__ __forceinline__ int find_tile(const DecodeArgs& a, int* warp_sums, int* start, bool store, int* per) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int chunk = (a.lists + kDecodeThreads - 1) / kDecodeThreads, blocks = query_blocks(a);
  const int first = thread * chunk, last = first + chunk < a.lists ? first + chunk : a.lists;
  int sum = 0;
  for (int r = first; r < last; ++r) sum += tiles_of(rows_of(a, r)) * blocks;
  int inclusive = sum;
  for (int step = 1; step < 32; step *= 2) {
    const int other = shuffle_up(inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  sync_block();
  int total = 0, before = inclusive - sum;
  for (int w = 0; w < kDecodeWarps; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  *per = (total + a.num_ctas - 1) / a.num_ctas;
  const int wanted = static_cast<int>(blockIdx.x) * *per;
  for (int r = first, begin = before; r < last; ++r) {
    const int tiles = tiles_of(rows_of(a, r)) * blocks;
    if (begin <= wanted && wanted < begin + tiles) {
      start[0] = r;
      start[1] = begin;
    }
    if (store) a.tile_begin[r] = begin;
    begin += tiles;
  }
  if (store && thread == 0) a.tile_begin[a.lists] = total;
  sync_block();
  return total;
}

template <class T, int kDim>
struct DecodeShared {
  static constexpr int kPitch = kDim + 4;  // keeps the eight queries of a warp in different banks
  float out[kDecodeWarps][kDecodeQueries][kPitch];
  float maximum[kDecodeWarps][kDecodeQueries];
  float sum[kDecodeWarps][kDecodeQueries];
  int warp_sums[kDecodeWarps];
  int start[2];
};

// Attention of one block of queries over the rows [row_begin, row_end) of list r; every warp takes every fourth sixteen
// rows, then leaves maximum, sum and unnormalised output (base-2 logits) in shared memory.
template <class T, int kDim>
__device__ __forceinline__ void attend(const DecodeArgs& a, DecodeShared<T, kDim>& shared, int r, int block,
                                       int row_begin, int row_end) {
  using Math = RowMath<T, kDim, kDecodeQueries>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4, part = lane % 4;
  const int index = block * kDecodeQueries + quad;
  const T* query_row[1] = {nullptr};
  int seen = 0;
  if (index < a.group * a.num_queries) {
    const int i = index % a.num_queries, head = r % a.num_kv_heads * a.group + index / a.num_queries;
    query_row[0] = static_cast<const T*>(a.query) + r / a.num_kv_heads * a.query_stride_b + head * a.query_stride_h +
                   i * a.query_stride_n;
    seen = rows_seen(a, r, i, a.lens[r]);
  }
  if (seen > row_end) seen = row_end;
  const int64_t offset = static_cast<int64_t>(a.offsets[r]) * a.head_dim;
  const T* key = static_cast<const T*>(a.key_buffer) + offset;
  const T* value = static_cast<const T*>(a.value_buffer) + offset;
  const float scale = a.scale * kLog2e;

  float maximum = minus_infinity(), sum = 0;
  typename Math::Out out = {};
  typename Math::Keys keys;
  typename Math::Values values;
  // The next rows are under way while these are worked on, and the queries stay in registers; at 256 dimensions there
  // are not enough of those for either.
  constexpr bool kPrefetch = kDim <= 128;
  typename Math::Query query;
  if (kPrefetch) Math::load_query(query, query_row, a.head_dim, lane);
  int row = row_begin + warp * 16;
  if (kPrefetch && row < row_end) {
    Math::load_keys(keys, key, a.head_dim, row, row_end, a.head_dim, lane);
    Math::load_values(values, value, a.head_dim, row, row_end, a.head_dim, lane);
  }
  while (row < row_end) {  // the same for all lanes of a warp
    const int next = row + kDecodeWarps * 16;
    typename Math::Logits s;
    if (kPrefetch) {
      Math::logits(query, keys, s, lane);
    } else {
      Math::stream_logits(query_row, key, a.head_dim, row, row_end, a.head_dim, s, lane);
    }
    if (!kPrefetch) Math::load_values(values, value, a.head_dim, row, row_end, a.head_dim, lane);
    if (kPrefetch && next < row_end) Math::load_keys(keys, key, a.head_dim, next, row_end, a.head_dim, lane);
    float top = maximum;
    for (int tile = 0; tile < 2; ++tile) {
      for (int i = 0; i < 2; ++i) {
        float& logit = s[tile][0][i];
        logit = row + tile * 8 + part * 2 + i < seen ? logit * scale : minus_infinity();
        top = fmaxf(top, logit);
      }
    }
    top = fmaxf(top, shuffle_xor(top, 1));
    top = fmaxf(top, shuffle_xor(top, 2));
    const float base = top == minus_infinity() ? 0.0f : top;
    const float factor = exp2_fast(maximum - base);
    sum *= factor;
    for (int tile = 0; tile < 2; ++tile) {
      for (int i = 0; i < 2; ++i) {
        s[tile][0][i] = exp2_fast(s[tile][0][i] - base);
        sum += s[tile][0][i];
      }
    }
    maximum = top;
#pragma unroll
    for (int e = 0; e < Math::kValueChunks; ++e) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        out[e][j][0][0] *= factor;
        out[e][j][0][1] *= factor;
      }
    }
    Math::accumulate(s, values, out, lane);
    if (kPrefetch && next < row_end) Math::load_values(values, value, a.head_dim, next, row_end, a.head_dim, lane);
    row = next;
  }
  sum += shuffle_xor(sum, 1);
  sum += shuffle_xor(sum, 2);
  if (part == 0) {
    shared.maximum[warp][quad] = maximum;
    shared.sum[warp][quad] = sum;
  }
#pragma unroll
  for (int e = 0; e < Math::kValueChunks; ++e) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) shared.out[warp][quad][e * 64 + (part * 2 + i) * 8 + j] = out[e][j][0][i];
    }
  }
}

// Merges the warps' results and writes them: final ones to out and lse, partial ones to record `partial`.
template <class T, int kDim>
__device__ __forceinline__ void finish(const DecodeArgs& a, const DecodeShared<T, kDim>& shared, int r, int block,
                                       int64_t partial) {
  for (int item = threadIdx.x; item < kDecodeQueries * (a.head_dim / 4); item += kDecodeThreads) {
    const int q = item / (a.head_dim / 4), dim = item % (a.head_dim / 4) * 4, index = block * kDecodeQueries + q;
    if (index >= a.group * a.num_queries) continue;
    float maximum = minus_infinity();
    for (int w = 0; w < kDecodeWarps; ++w) maximum = fmaxf(maximum, shared.maximum[w][q]);
    const float base = maximum == minus_infinity() ? 0.0f : maximum;
    float sum = 0, value[4] = {0, 0, 0, 0};
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float factor = exp2_fast(shared.maximum[w][q] - base);
      sum += shared.sum[w][q] * factor;
      for (int j = 0; j < 4; ++j) value[j] += shared.out[w][q][dim + j] * factor;
    }
    if (partial >= 0) {
      float* target = a.partial_out + (partial * kDecodeQueries + q) * a.head_dim + dim;
      for (int j = 0; j < 4; ++j) target[j] = value[j];
      if (dim == 0) {
        a.partial_stats[(partial * kDecodeQueries + q) * 2] = maximum;
        a.partial_stats[(partial * kDecodeQueries + q) * 2 + 1] = sum;
      }
    } else {
      const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
      for (int j = 0; j < 4; ++j) value[j] *= inverse;
      store_output<T>(a, r, index, dim, value);
      if (dim == 0) {
        a.lse[output_row(a, r, index)] = sum == 0 ? minus_infinity() : (maximum + log2_fast(sum)) * kLn2;
      }
    }
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(kDecodeThreads, 2) decode_kernel(DecodeArgs a) {
  auto& shared = *reinterpret_cast<DecodeShared<T, kDim>*>(shared_memory());
  int per, tile = 0, end = 1, r = static_cast<int>(blockIdx.x) % a.lists, list_begin = 0;
  const int blocks = query_blocks(a);
  if (!a.whole) {
    const int total = find_tile(a, shared.warp_sums, shared.start, blockIdx.x == 0, &per);
    tile = static_cast<int>(blockIdx.x) * per;
    end = tile + per < total ? tile + per : total;
    if (tile >= end) return;
    r = shared.start[0];
    list_begin = shared.start[1];
  }
  while (tile < end) {
    const int length = rows_of(a, r), tiles = tiles_of(length);
    int block = static_cast<int>(blockIdx.x) / a.lists, count = 1, row_begin = 0, row_end = length;
    int64_t partial = -1;
    if (!a.whole) {
      block = (tile - list_begin) / tiles;
      const int first = (tile - list_begin) % tiles;
      count = tiles - first < end - tile ? tiles - first : end - tile;
      row_begin = first * kDecodeTileRows;
      if ((first + count) * kDecodeTileRows < length) row_end = (first + count) * kDecodeTileRows;
      // A block leaves at most two unfinished results: of the list it begins in the middle of, and of its last list.
      if (count != tiles) partial = static_cast<int64_t>(blockIdx.x) * 2 + (first == 0 ? 1 : 0);
    }
    attend<T, kDim>(a, shared, r, block, row_begin, row_end);
    sync_block();
    finish<T, kDim>(a, shared, r, block, partial);
    sync_block();  // the results are read before the next list overwrites them
    tile += count;
    if (tile < end && tile == list_begin + tiles * blocks) {
      list_begin = tile;
      do {
        ++r;
      } while (tiles_of(rows_of(a, r)) == 0);
    }
  }
}

// One block a (list and query block, query): merges the partial results of lists that several decode blocks shared, and
// answers for empty lists.
template <class T>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(DecodeArgs a) {
  constexpr int kWarps = kCombineThreads / 32, kVectors = kMaxHeadDim / 128;
  float* warp_out = reinterpret_cast<float*>(shared_memory());  // [kWarps, kMaxHeadDim]
  float* warp_stats = warp_out + kWarps * kMaxHeadDim;          // [kWarps, 2]
  const int r = static_cast<int>(blockIdx.x) % a.lists, block = static_cast<int>(blockIdx.x) / a.lists;
  const int q = blockIdx.y, index = block * kDecodeQueries + q;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  if (index >= a.group * a.num_queries) return;
  const int tiles = tiles_of(rows_of(a, r));
  if (tiles == 0) {
    const float zeros[4] = {0, 0, 0, 0};
    for (int dim = thread * 4; dim < a.head_dim; dim += kCombineThreads * 4) store_output<T>(a, r, index, dim, zeros);
    if (thread == 0) a.lse[output_row(a, r, index)] = minus_infinity();
    return;
  }
  const int per = (a.tile_begin[a.lists] + a.num_ctas - 1) / a.num_ctas;
  const int begin = a.tile_begin[r] + block * tiles, first = begin / per, last = (begin + tiles - 1) / per;
  if (first == last) return;  // one block held it all and has written the result
  float maximum = minus_infinity(), sum = 0, value[kVectors][4] = {};
  for (int cta = first + warp; cta <= last; cta += kWarps) {
    const int64_t record = (static_cast<int64_t>(cta) * 2 + (cta == first ? 1 : 0)) * kDecodeQueries + q;
    const float other = a.partial_stats[record * 2];
    const float top = fmaxf(maximum, other), base = top == minus_infinity() ? 0.0f : top;
    const float keep = exp2_fast(maximum - base), add = exp2_fast(other - base);
    sum = sum * keep + a.partial_stats[record * 2 + 1] * add;
    maximum = top;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int dim = v * 128 + lane * 4;
      if (dim >= a.head_dim) continue;
      const float* source = a.partial_out + record * a.head_dim + dim;
      for (int j = 0; j < 4; ++j) value[v][j] = value[v][j] * keep + source[j] * add;
    }
  }
  if (lane == 0) {
    warp_stats[warp * 2] = maximum;
    warp_stats[warp * 2 + 1] = sum;
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    for (int j = 0; j < 4; ++j) warp_out[warp * kMaxHeadDim + v * 128 + lane * 4 + j] = value[v][j];
  }
  sync_block();
  if (thread * 4 >= a.head_dim) return;
  maximum = minus_infinity();
  for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, warp_stats[w * 2]);
  const float base = maximum == minus_infinity() ? 0.0f : maximum;
  float total = 0, merged[4] = {0, 0, 0, 0};
  for (int w = 0; w < kWarps; ++w) {
    const float factor = exp2_fast(warp_stats[w * 2] - base);
    total += warp_stats[w * 2 + 1] * factor;
    for (int j = 0; j < 4; ++j) merged[j] += warp_out[w * kMaxHeadDim + thread * 4 + j] * factor;
  }
  const float inverse = total == 0 ? 0.0f : 1.0f / total;
  for (int j = 0; j < 4; ++j) merged[j] *= inverse;
  store_output<T>(a, r, index, thread * 4, merged);
  if (thread == 0) {
    a.lse[output_row(a, r, index)] = total == 0 ? minus_infinity() : (maximum + log2_fast(total)) * kLn2;
  }
}

constexpr int kCombineShared = (kCombineThreads / 32) * (kMaxHeadDim + 2) * static_cast<int>(sizeof(float));

// Enqueues decode_kernel on args.num_ctas blocks, and combine_kernel behind it where lists are shared.
template <class T, int kDim>
void enqueue_decode(const DecodeArgs& a, void* stream) {
  const int queries = a.group * a.num_queries, blocks = (queries + kDecodeQueries - 1) / kDecodeQueries;
  SPARSEMM_LAUNCH((decode_kernel<T, kDim>), static_cast<unsigned>(a.num_ctas), kDecodeThreads,
                  sizeof(DecodeShared<T, kDim>), stream, a);
  if (a.whole) return;
  // A long chunk has more query blocks than grid.y may count (65,535); grid.x counts to 2^31 - 1.
  const dim3 grid(static_cast<unsigned>(a.lists) * static_cast<unsigned>(blocks),
                  static_cast<unsigned>(queries < kDecodeQueries ? queries : kDecodeQueries));
  SPARSEMM_LAUNCH(combine_kernel<T>, grid, kCombineThreads, kCombineShared, stream, a);
}

// Calls `launch(T{}, integral_constant<int, kDim>{})` with what dtype and head_dim ask for.
template <class F>
void dispatch_rows(Dtype dtype, int head_dim, const F& launch) {
  const auto by_dim = [&](auto zero) {
    if (head_dim <= 64) {
      launch(zero, std::integral_constant<int, 64>{});
    } else if (head_dim <= 128) {
      launch(zero, std::integral_constant<int, 128>{});
    } else {
      launch(zero, std::integral_constant<int, 256>{});
    }
  };
  switch (dtype) {
    case Dtype::kFloat32: by_dim(float{}); break;
    case Dtype::kFloat16: by_dim(fp16{}); break;
    case Dtype::kBFloat16: by_dim(bf16{}); break;
  }
}

}  // namespace sparsemm::cuda
