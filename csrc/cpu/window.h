// Which rows of a prompt are kept: scores of its columns by the window's queries, and the choice of the highest. Part of
// kernels.cpp.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "vector.h"

namespace sparsemm::cpu {
namespace {

// logits[t * padded + i] of RB key rows against QV vectors of (transposed, scaled) queries. The rows at `ahead`, which
// come next, are fetched meanwhile: a processor does not see them coming among so many streams.
template <class T, int QV, int RB>
void window_block(const T* key, const T* ahead, int64_t key_stride, const float* queries, int64_t padded,
                  int64_t head_dim, float* logits) {
  constexpr int64_t kLine = 64 / sizeof(T);
  Vec<float> acc[RB][QV] = {};
  for (int64_t begin = 0; begin < head_dim; begin += kLine) {
    for (int r = 0; r < RB; ++r) __builtin_prefetch(ahead + r * key_stride + begin);
    const int64_t end = begin + kLine < head_dim ? begin + kLine : head_dim;
    for (int64_t d = begin; d < end; ++d) {
      Vec<float> x[QV];
      for (int v = 0; v < QV; ++v) x[v] = load(queries + d * padded + v * kLanes);
      for (int r = 0; r < RB; ++r) {
        const float k = static_cast<float>(to_compute(key[r * key_stride + d]));
        for (int v = 0; v < QV; ++v) acc[r][v] += x[v] * k;
      }
    }
  }
  for (int r = 0; r < RB; ++r) {
    for (int v = 0; v < QV; ++v) store(logits + r * padded + v * kLanes, acc[r][v]);
  }
}

template <class T, int QV>
void window_logits(const T* key, int64_t key_stride, const float* queries, int64_t padded, int64_t head_dim,
                   int64_t begin, int64_t end, float* logits) {
  // As many rows as there are registers for their sums: every vector of queries is loaded once for all of them.
  constexpr int kRows = kLanes == 16 ? 8 : 4;
  int64_t t = begin;
  for (; t + kRows <= end; t += kRows) {
    const T* rows = key + t * key_stride;
    window_block<T, QV, kRows>(rows, t + 2 * kRows <= end ? rows + kRows * key_stride : rows, key_stride, queries,
                               padded, head_dim, logits + t * padded);
  }
  for (; t < end; ++t) {
    const T* row = key + t * key_stride;
    window_block<T, QV, 1>(row, row, key_stride, queries, padded, head_dim, logits + t * padded);
  }
}

inline int64_t padded_window(const WindowArgs& a) { return (a.window + kLanes - 1) / kLanes * kLanes; }

template <class T>
void window_list_typed(const WindowArgs& a, int64_t list, float* scratch) {
  const int64_t b = list / a.num_kv_heads, h = list % a.num_kv_heads, group = a.num_query_heads / a.num_kv_heads;
  const int64_t padded = padded_window(a), num_columns = a.num_columns, first_query = num_columns - a.window;
  const int64_t start = a.starts[list] < 0 ? 0 : (a.starts[list] > num_columns ? num_columns : a.starts[list]);
  float* queries = scratch;                       // [D, padded]
  float* maximum = queries + a.head_dim * padded;  // [padded]
  float* weight = maximum + padded;                // [padded]
  float* logits = weight + padded;                 // [T, padded]
  float* scores = a.scores + list * num_columns;
  for (int64_t t = 0; t < num_columns; ++t) scores[t] = 0;
  const T* key = static_cast<const T*>(a.key) + b * a.key_stride_b + h * a.key_stride_h;
  for (int64_t head = h * group; head < (h + 1) * group; ++head) {
    const T* query = static_cast<const T*>(a.query) + b * a.query_stride_b + head * a.query_stride_h;
    for (int64_t d = 0; d < a.head_dim; ++d) {
      for (int64_t i = 0; i < padded; ++i) {
        queries[d * padded + i] = i < a.window ? static_cast<float>(to_compute(query[i * a.query_stride_w + d])) *
                                                     static_cast<float>(a.scale)
                                               : 0.0f;
      }
    }
    int64_t lane = 0;
    for (; lane + 2 * kLanes <= padded; lane += 2 * kLanes) {
      window_logits<T, 2>(key, a.key_stride_t, queries + lane, padded, a.head_dim, start, num_columns, logits + lane);
    }
    for (; lane < padded; lane += kLanes) {
      window_logits<T, 1>(key, a.key_stride_t, queries + lane, padded, a.head_dim, start, num_columns, logits + lane);
    }
    for (int64_t t = first_query < start ? start : first_query; t < num_columns; ++t) {
      for (int64_t i = 0; i < t - first_query; ++i) logits[t * padded + i] = kMinusInfinity<float>;  // causal
    }
    for (lane = 0; lane < padded; lane += kLanes) {
      Vec<float> top = splat(kMinusInfinity<float>);
      for (int64_t t = start; t < num_columns; ++t) {
        const Vec<float> x = load(logits + t * padded + lane);
        top = x > top ? x : top;
      }
      // A query that sees no column keeps weight 0 (below); its maximum must only be finite.
      top = top == kMinusInfinity<float> ? splat(0.0f) : top;
      store(maximum + lane, top);
      Vec<float> block = {};
      double sums[kLanes] = {};
      for (int64_t t = start; t < num_columns; ++t) {
        const Vec<float> e = exp_nonpositive(load(logits + t * padded + lane) - top);
        store(logits + t * padded + lane, e);
        block += e;
        if ((t & 63) == 63 || t + 1 == num_columns) {  // blocks of 64 keep long float32 sums accurate
          for (int j = 0; j < kLanes; ++j) sums[j] += block[j];
          block = Vec<float>{};
        }
      }
      for (int j = 0; j < kLanes; ++j) {
        const int64_t i = lane + j;
        const bool counted = i < a.window && i >= a.window - a.num_queries[b] && sums[j] > 0;
        weight[i] = counted ? static_cast<float>(1.0 / sums[j]) : 0.0f;
        if (sums[j] != sums[j] && i < a.window) weight[i] = std::numeric_limits<float>::quiet_NaN();
      }
    }
    for (int64_t t = start; t < num_columns; ++t) {
      Vec<float> sum = {};
      for (lane = 0; lane < padded; lane += kLanes) sum += load(logits + t * padded + lane) * load(weight + lane);
      scores[t] += sum_lanes<float>(sum);
    }
  }
  const int64_t counted = a.num_queries[b] < 1 ? 1 : a.num_queries[b];
  const float mean = 1.0f / static_cast<float>(group * counted);
  for (int64_t t = start; t < num_columns; ++t) scores[t] *= mean;
}

// Order-preserving integer of a score: larger score, larger integer; NaN above everything, as torch.sort has it.
inline uint32_t sort_key(float score) {
  if (score != score) return 0xffffffffu;
  score += 0.0f;  // -0 and +0 are one score
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

int64_t select_list(const float* scores, int64_t start, int64_t num_columns, int64_t count, int64_t window,
                    int32_t* positions, uint32_t* scratch) {
  start = start < 0 ? 0 : start;
  int64_t written = 0;
  const int64_t length = num_columns - start;
  if (count > length) count = length;
  if (count > 0) {
    uint32_t* keys = scratch;
    uint32_t* order = scratch + num_columns;
    for (int64_t c = 0; c < length; ++c) keys[c] = sort_key(scores[start + c]);
    // The upper bits leave few candidates for the lowest kept key; only those are ranked.
    constexpr int kShift = 20, kBins = 1 << (32 - kShift);
    uint32_t histogram[kBins] = {};
    for (int64_t c = 0; c < length; ++c) ++histogram[keys[c] >> kShift];
    int64_t wanted = count;
    uint32_t bin = kBins - 1;
    for (; wanted > histogram[bin]; --bin) wanted -= histogram[bin];
    int64_t candidates = 0;
    for (int64_t c = 0; c < length; ++c) {
      order[candidates] = keys[c];
      candidates += keys[c] >> kShift == bin;
    }
    const auto descending = [](uint32_t x, uint32_t y) { return x > y; };
    std::nth_element(order, order + (wanted - 1), order + candidates, descending);
    const uint32_t cut = order[wanted - 1];
    int64_t ties = count;  // how many columns at the cut are kept: the lowest ones
    for (int64_t c = 0; c < length; ++c) ties -= keys[c] > cut;
    for (int64_t c = 0; c < length; ++c) {
      if (keys[c] > cut || (keys[c] == cut && ties-- > 0)) positions[written++] = static_cast<int32_t>(start + c);
    }
  }
  for (int64_t c = start > num_columns ? start : num_columns; c < num_columns + window; ++c) {
    positions[written++] = static_cast<int32_t>(c);
  }
  return written;
}

}  // namespace
}  // namespace sparsemm::cpu
