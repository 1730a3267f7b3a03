// window_scores: mean attention of the last w queries over the columns, without a [w, T] table in memory.
//
// Three launches: the softmax statistics of every query over chunks of columns, their merge, and the logits a second
// time for the mean over queries and group. The logits are cheap on the tensor cores; storing them would not be.
#pragma once

#include "decode.cuh"

namespace sparsemm::cuda {

constexpr int kWindowThreads = 128;
constexpr int kWindowWarps = kWindowThreads / 32;
constexpr int kWindowQueries = 16;  // queries of one product
constexpr int kMeanColumns = kWindowWarps * 16;

// Queries of one kv head are numbered head-in-group * w + i.
template <class T>
__device__ __forceinline__ const T* window_query(const WindowArgs& a, int list, int index) {
  if (index >= a.group * a.window) return nullptr;
  const int b = list / a.num_kv_heads, head = list % a.num_kv_heads * a.group + index / a.window;
  return static_cast<const T*>(a.query) + b * a.query_stride_b + head * a.query_stride_h +
         index % a.window * a.query_stride_w;
}

// One past the last column that query `index` sees; 0 for queries that do not exist.
__device__ __forceinline__ int columns_seen(const WindowArgs& a, int index) {
  return index < a.group * a.window ? a.num_columns - a.window + index % a.window + 1 : 0;
}

// Block (chunk, query tile, list): maximum and sum (base 2) of 16 queries over one chunk of columns.
template <class T, int kDim>
__global__ void __launch_bounds__(kWindowThreads) window_stats_kernel(WindowArgs a) {
  using Math = RowMath<T, kDim, kWindowQueries>;
  float* shared = reinterpret_cast<float*>(shared_memory());  // [kWindowWarps, kWindowQueries, 2]
  const int chunk = blockIdx.x, list = blockIdx.z, first_query = blockIdx.y * kWindowQueries;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4, part = lane % 4;
  const T* rows[2];
  int seen[2];
  for (int half = 0; half < 2; ++half) {
    rows[half] = window_query<T>(a, list, first_query + half * 8 + quad);
    seen[half] = columns_seen(a, first_query + half * 8 + quad);
  }
  typename Math::Query query;
  Math::load_query(query, rows, a.head_dim, lane);
  const T* key = static_cast<const T*>(a.key) + list / a.num_kv_heads * a.key_stride_b +
                 list % a.num_kv_heads * a.key_stride_h;
  const float scale = a.scale * kLog2e;
  const int start = a.starts[list], begin = chunk * kWindowChunk;
  const int end = begin + kWindowChunk < a.num_columns ? begin + kWindowChunk : a.num_columns;
  float maximum[2] = {minus_infinity(), minus_infinity()}, sum[2] = {0, 0};
  for (int column = begin + warp * 16; column < end; column += kWindowWarps * 16) {
    if (column + 16 <= start) continue;  // the same for all lanes of a warp
    typename Math::Keys keys;
    typename Math::Logits s;
    Math::load_keys(keys, key, a.key_stride_t, column, end, a.head_dim, lane);
    Math::logits(query, keys, s, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = maximum[half];
      for (int tile = 0; tile < 2; ++tile) {
        for (int i = 0; i < 2; ++i) {
          const int at = column + tile * 8 + part * 2 + i;
          float& logit = s[tile][half][i];
          logit = at >= start && at < seen[half] && at < end ? logit * scale : minus_infinity();
          top = fmaxf(top, logit);
        }
      }
      const float base = top == minus_infinity() ? 0.0f : top;
      sum[half] *= exp2_fast(maximum[half] - base);
      for (int tile = 0; tile < 2; ++tile) {
        for (int i = 0; i < 2; ++i) sum[half] += exp2_fast(s[tile][half][i] - base);
      }
      maximum[half] = top;  // of this lane's columns only
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    for (int step = 1; step < 4; step *= 2) {
      const float other = shuffle_xor(maximum[half], step), other_sum = shuffle_xor(sum[half], step);
      const float top = fmaxf(maximum[half], other), base = top == minus_infinity() ? 0.0f : top;
      sum[half] = sum[half] * exp2_fast(maximum[half] - base) + other_sum * exp2_fast(other - base);
      maximum[half] = top;
    }
    if (part == 0) {
      float* target = shared + (warp * kWindowQueries + half * 8 + quad) * 2;
      target[0] = maximum[half];
      target[1] = sum[half];
    }
  }
  sync_block();
  const int index = first_query + threadIdx.x;
  if (threadIdx.x >= kWindowQueries || index >= a.group * a.window) return;
  float top = minus_infinity(), total = 0;
  for (int w = 0; w < kWindowWarps; ++w) top = fmaxf(top, shared[(w * kWindowQueries + threadIdx.x) * 2]);
  for (int w = 0; w < kWindowWarps; ++w) {
    const float* source = shared + (w * kWindowQueries + threadIdx.x) * 2;
    total += source[1] * exp2_fast(source[0] - (top == minus_infinity() ? 0.0f : top));
  }
  const int chunks = (a.num_columns + kWindowChunk - 1) / kWindowChunk;
  float* target = a.stats + ((static_cast<int64_t>(list) * a.group * a.window + index) * chunks + chunk) * 2;
  target[0] = top;
  target[1] = total;
}

// One thread a query: log2 of its whole softmax sum; +inf, which makes every weight 0, for queries that do not count.
__global__ void __launch_bounds__(kWindowThreads) window_lse_kernel(WindowArgs a) {
  const int64_t queries = static_cast<int64_t>(a.group) * a.window;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWindowThreads + threadIdx.x;
  if (item >= static_cast<int64_t>(a.batch) * a.num_kv_heads * queries) return;
  const int chunks = (a.num_columns + kWindowChunk - 1) / kWindowChunk;
  const int b = static_cast<int>(item / queries / a.num_kv_heads), i = static_cast<int>(item % queries % a.window);
  const float* source = a.stats + item * chunks * 2;
  float top = minus_infinity(), sum = 0;
  for (int c = 0; c < chunks; ++c) top = fmaxf(top, source[c * 2]);
  for (int c = 0; c < chunks; ++c) {
    sum += source[c * 2 + 1] * exp2_fast(source[c * 2] - (top == minus_infinity() ? 0.0f : top));
  }
  const bool counted = i >= a.window - a.num_queries[b] && sum != 0;
  a.lse[item] = counted ? top + log2_fast(sum) : -minus_infinity();
}

// Block (columns, list): each warp holds the keys of 16 columns and goes over all queries of the group.
template <class T, int kDim>
__global__ void __launch_bounds__(kWindowThreads) window_mean_kernel(WindowArgs a) {
  using Math = RowMath<T, kDim, kWindowQueries>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4, part = lane % 4, list = blockIdx.y;
  const int column = blockIdx.x * kMeanColumns + warp * 16, start = a.starts[list], queries = a.group * a.window;
  const T* key = static_cast<const T*>(a.key) + list / a.num_kv_heads * a.key_stride_b +
                 list % a.num_kv_heads * a.key_stride_h;
  const float scale = a.scale * kLog2e;
  typename Math::Keys keys;
  Math::load_keys(keys, key, a.key_stride_t, column, a.num_columns, a.head_dim, lane);
  float mean[2][2] = {};
  for (int first = 0; first < queries; first += kWindowQueries) {
    const T* rows[2];
    int seen[2];
    float lse[2];
    for (int half = 0; half < 2; ++half) {
      const int index = first + half * 8 + quad;
      rows[half] = window_query<T>(a, list, index);
      seen[half] = columns_seen(a, index);
      lse[half] = index < queries ? a.lse[static_cast<int64_t>(list) * queries + index] : 0.0f;
    }
    typename Math::Query query;
    typename Math::Logits s;
    Math::load_query(query, rows, a.head_dim, lane);
    Math::logits(query, keys, s, lane);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      for (int i = 0; i < 2; ++i) {
        const int at = column + tile * 8 + part * 2 + i;
        for (int half = 0; half < 2; ++half) {
          if (at >= start && at < seen[half]) mean[tile][i] += exp2_fast(s[tile][half][i] * scale - lse[half]);
        }
      }
    }
  }
  const int counted = a.num_queries[list / a.num_kv_heads];
  const float factor = 1.0f / static_cast<float>(a.group * (counted < 1 ? 1 : counted));
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    for (int i = 0; i < 2; ++i) {
      float sum = mean[tile][i];
      for (int step = 4; step < 32; step *= 2) sum += shuffle_xor(sum, step);  // over the eight quads
      const int at = column + tile * 8 + part * 2 + i;
      if (quad == 0 && at < a.num_columns) {
        a.scores[static_cast<int64_t>(list) * a.num_columns + at] = sum * factor;
      }
    }
  }
}

template <class T, int kDim>
void enqueue_window_scores(const WindowArgs& a, void* stream) {
  const unsigned lists = static_cast<unsigned>(a.batch * a.num_kv_heads);
  const unsigned queries = static_cast<unsigned>(a.group * a.window);
  const unsigned chunks = static_cast<unsigned>((a.num_columns + kWindowChunk - 1) / kWindowChunk);
  const dim3 stats_grid(chunks, (queries + kWindowQueries - 1) / kWindowQueries, lists);
  SPARSEMM_LAUNCH((window_stats_kernel<T, kDim>), stats_grid, kWindowThreads,
                  kWindowWarps * kWindowQueries * 2 * sizeof(float), stream, a);
  SPARSEMM_LAUNCH(window_lse_kernel, (lists * queries + kWindowThreads - 1) / kWindowThreads, kWindowThreads, 0, stream,
                  a);
  const dim3 mean_grid((static_cast<unsigned>(a.num_columns) + kMeanColumns - 1) / kMeanColumns, lists);
  SPARSEMM_LAUNCH((window_mean_kernel<T, kDim>), mean_grid, kWindowThreads, 0, stream, a);
}

}  // namespace sparsemm::cuda
