// Attention of new queries over ragged rows, a piece at a time. Part of kernels.cpp.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace sparsemm::cpu {
namespace {

// logits[q * kDecodeTile + r] = query_q . key_r for RB rows at once: each key vector is read and widened once for QB
// queries.
template <class T, int QB, int RB>
void dot_block(const Compute<T>* query, const T* key, int64_t head_dim, Compute<T>* logits) {
  using C = Compute<T>;
  Vec<C> acc[QB][RB] = {};
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    Vec<C> k[RB];
    for (int r = 0; r < RB; ++r) k[r] = load(key + r * head_dim + d);
    for (int q = 0; q < QB; ++q) {
      const Vec<C> x = load(query + q * head_dim + d);
      for (int r = 0; r < RB; ++r) acc[q][r] += x * k[r];
    }
  }
  for (int q = 0; q < QB; ++q) {
    for (int r = 0; r < RB; ++r) {
      C total = sum_lanes<C>(acc[q][r]);
      for (int64_t e = d; e < head_dim; ++e) total += query[q * head_dim + e] * to_compute(key[r * head_dim + e]);
      logits[q * kDecodeTile + r] = total;
    }
  }
}

// Fetches rows that are read soon. They may lie behind the last one: fetching is no access.
template <class T>
inline void prefetch_rows(const T* rows, int64_t count, int64_t head_dim) {
  for (int64_t i = 0; i < count * head_dim; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(rows + i);
}

// `ahead`: rows to be fetched meanwhile, as many; or null.
template <class T, int QB>
void dot_rows(const Compute<T>* query, const T* key, int64_t rows, int64_t head_dim, Compute<T>* logits,
              const T* ahead) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    if (ahead) prefetch_rows(ahead + r * head_dim, 4, head_dim);
    dot_block<T, QB, 4>(query, key + r * head_dim, head_dim, logits + r);
  }
  for (; r < rows; ++r) dot_block<T, QB, 1>(query, key + r * head_dim, head_dim, logits + r);
}

// acc += sum over RB rows of weight_r * value_r.
template <class T, int RB>
void add_values(const Compute<T>* weights, const T* value, int64_t head_dim, Compute<T>* acc) {
  using C = Compute<T>;
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    Vec<C> sum = load(acc + d);
    for (int r = 0; r < RB; ++r) sum += load(value + r * head_dim + d) * weights[r];
    store(acc + d, sum);
  }
  for (; d < head_dim; ++d) {
    for (int r = 0; r < RB; ++r) acc[d] += weights[r] * to_compute(value[r * head_dim + d]);
  }
}

// Rows of `list` that query i of batch row b sees.
inline int64_t rows_seen(const DecodeArgs& a, int64_t list, int64_t i) {
  const int64_t later =
      a.num_later ? a.num_later[list / a.num_kv_heads * a.num_queries + i] : a.num_queries - 1 - i;
  const int64_t seen = a.lens[list] - later;
  return seen < 0 ? 0 : (seen > a.lens[list] ? a.lens[list] : seen);
}

template <class T>
void decode_piece_typed(const DecodeArgs& a, const DecodePiece& piece, Compute<T>* state, Compute<T>* scratch) {
  using C = Compute<T>;
  const int64_t head_dim = a.head_dim, record = head_dim + 2, count = piece.query_end - piece.query_begin;
  const int64_t group = a.num_query_heads / a.num_kv_heads, b = piece.list / a.num_kv_heads;
  const int64_t first_head = piece.list % a.num_kv_heads * group;
  C* scaled = scratch;
  C* weights = scratch + kMaxQueryBlock * head_dim;
  int64_t seen[kMaxQueryBlock];
  for (int64_t q = 0; q < count; ++q) {
    const int64_t index = piece.query_begin + q, head = first_head + index / a.num_queries, i = index % a.num_queries;
    const T* source = static_cast<const T*>(a.query) + b * a.query_stride_b + head * a.query_stride_h +
                      i * a.query_stride_n;
    for (int64_t d = 0; d < head_dim; ++d) scaled[q * head_dim + d] = to_compute(source[d]) * static_cast<C>(a.scale);
    seen[q] = rows_seen(a, piece.list, i);
    state[q * record] = kMinusInfinity<C>;
    for (int64_t d = 1; d < record; ++d) state[q * record + d] = 0;
  }
  const T* key = static_cast<const T*>(a.key_buffer) + a.offsets[piece.list] * head_dim;
  const T* value = static_cast<const T*>(a.value_buffer) + a.offsets[piece.list] * head_dim;
  // A list begins anywhere, and its two streams take turns: the processor sees neither coming. The values of a tile are
  // fetched while its logits are computed, the keys of the next while its values are added.
  for (int64_t row = piece.row_begin; row < piece.row_end; row += kDecodeTile) {
    const int64_t rows = piece.row_end - row < kDecodeTile ? piece.row_end - row : kDecodeTile;
    int64_t q = 0;
    for (; q + 4 <= count; q += 4) {
      dot_rows<T, 4>(scaled + q * head_dim, key + row * head_dim, rows, head_dim, weights + q * kDecodeTile,
                     q == 0 ? value + row * head_dim : nullptr);
    }
    for (; q < count; ++q) {
      dot_rows<T, 1>(scaled + q * head_dim, key + row * head_dim, rows, head_dim, weights + q * kDecodeTile,
                     q == 0 ? value + row * head_dim : nullptr);
    }
    for (q = 0; q < count; ++q) {
      const int64_t visible = seen[q] - row < rows ? seen[q] - row : rows;
      if (visible <= 0) continue;
      C* w = weights + q * kDecodeTile;
      C* record_q = state + q * record;
      C maximum = record_q[0];
      for (int64_t r = 0; r < visible; ++r) maximum = w[r] > maximum ? w[r] : maximum;
      for (int64_t r = visible; r < kDecodeTile; ++r) w[r] = kMinusInfinity<C>;
      if (maximum > record_q[0]) {  // rescale what was summed under the old maximum
        const C factor = record_q[1] != 0 ? std::exp(record_q[0] - maximum) : C(0);
        for (int64_t d = 1; d < record; ++d) record_q[d] *= factor;
        record_q[0] = maximum;
      }
      Vec<C> sum = {};
      for (int64_t r = 0; r < kDecodeTile; r += kLanes) {
        const Vec<C> e = exp_nonpositive(load(w + r) - maximum);
        store(w + r, e);
        sum += e;
      }
      record_q[1] += sum_lanes<C>(sum);
      int64_t r = 0;
      for (; r + 4 <= visible; r += 4) {
        if (q == 0) prefetch_rows(key + (row + kDecodeTile + r) * head_dim, 4, head_dim);
        add_values<T, 4>(w + r, value + (row + r) * head_dim, head_dim, record_q + 2);
      }
      for (; r < visible; ++r) add_values<T, 1>(w + r, value + (row + r) * head_dim, head_dim, record_q + 2);
    }
  }
}

template <class T>
void decode_finish_typed(const DecodeArgs& a, const DecodePiece& piece, const Compute<T>* states, int64_t stride,
                         int64_t count) {
  using C = Compute<T>;
  const int64_t head_dim = a.head_dim, record = head_dim + 2, group = a.num_query_heads / a.num_kv_heads;
  const int64_t b = piece.list / a.num_kv_heads, first_head = piece.list % a.num_kv_heads * group;
  for (int64_t q = 0; q < piece.query_end - piece.query_begin; ++q) {
    const C* first = states + q * record;
    C maximum = kMinusInfinity<C>;
    for (int64_t s = 0; s < count; ++s) maximum = first[s * stride] > maximum ? first[s * stride] : maximum;
    const int64_t index = piece.query_begin + q, head = first_head + index / a.num_queries, i = index % a.num_queries;
    const int64_t row = (b * a.num_query_heads + head) * a.num_queries + i;
    T* out = static_cast<T*>(a.out) + row * head_dim;
    C total = 0;
    for (int64_t s = 0; s < count; ++s) {
      if (first[s * stride + 1] != 0) total += first[s * stride + 1] * std::exp(first[s * stride] - maximum);
    }
    a.lse[row] = total > 0 ? static_cast<float>(maximum + std::log(total)) : kMinusInfinity<float>;
    for (int64_t d = 0; d < head_dim; ++d) {
      C sum = 0;
      for (int64_t s = 0; s < count; ++s) {
        const C* part = first + s * stride;
        if (part[1] != 0) sum += part[d + 2] * std::exp(part[0] - maximum);
      }
      from_compute(total > 0 ? sum / total : C(0), out + d);
    }
    // A NaN among the logits never wins a maximum; it must not vanish.
    if (total != total) {
      a.lse[row] = static_cast<float>(total);
      for (int64_t d = 0; d < head_dim; ++d) from_compute(total, out + d);
    }
  }
}

}  // namespace
}  // namespace sparsemm::cpu
