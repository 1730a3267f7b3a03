// CPU kernels over ragged rows; compiled once per instruction set with SPARSEMM_TABLE naming the table it exports.
#include "kernels.h"

#include <algorithm>

#include "fused.h"
#include "vector.h"

namespace sparsemm::cpu {
namespace {

template <class C>
constexpr C kMinusInfinity = -std::numeric_limits<C>::infinity();

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

template <class T, int QB>
void dot_rows(const Compute<T>* query, const T* key, int64_t rows, int64_t head_dim, Compute<T>* logits) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) dot_block<T, QB, 4>(query, key + r * head_dim, head_dim, logits + r);
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
  for (int64_t row = piece.row_begin; row < piece.row_end; row += kDecodeTile) {
    const int64_t rows = piece.row_end - row < kDecodeTile ? piece.row_end - row : kDecodeTile;
    int64_t q = 0;
    for (; q + 4 <= count; q += 4) {
      dot_rows<T, 4>(scaled + q * head_dim, key + row * head_dim, rows, head_dim, weights + q * kDecodeTile);
    }
    for (; q < count; ++q) {
      dot_rows<T, 1>(scaled + q * head_dim, key + row * head_dim, rows, head_dim, weights + q * kDecodeTile);
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
      for (; r + 4 <= visible; r += 4) add_values<T, 4>(w + r, value + (row + r) * head_dim, head_dim, record_q + 2);
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

// logits[t * padded + i] of RB key rows against QV vectors of (transposed, scaled) queries.
template <class T, int QV, int RB>
void window_block(const T* key, int64_t key_stride, const float* queries, int64_t padded, int64_t head_dim,
                  float* logits) {
  Vec<float> acc[RB][QV] = {};
  for (int64_t d = 0; d < head_dim; ++d) {
    Vec<float> x[QV];
    for (int v = 0; v < QV; ++v) x[v] = load(queries + d * padded + v * kLanes);
    for (int r = 0; r < RB; ++r) {
      const float k = static_cast<float>(to_compute(key[r * key_stride + d]));
      for (int v = 0; v < QV; ++v) acc[r][v] += x[v] * k;
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
    window_block<T, QV, kRows>(key + t * key_stride, key_stride, queries, padded, head_dim, logits + t * padded);
  }
  for (; t < end; ++t) {
    window_block<T, QV, 1>(key + t * key_stride, key_stride, queries, padded, head_dim, logits + t * padded);
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

#define SPARSEMM_DISPATCH(dtype, ...)                                        \
  switch (dtype) {                                                           \
    case Dtype::kFloat32: { using T = float; __VA_ARGS__; break; }           \
    case Dtype::kFloat64: { using T = double; __VA_ARGS__; break; }          \
    case Dtype::kFloat16: { using T = _Float16; __VA_ARGS__; break; }        \
    case Dtype::kBFloat16: { using T = BFloat16; __VA_ARGS__; break; }       \
  }

void decode_piece(const DecodeArgs& a, const DecodePiece& piece, void* state, void* scratch) {
  SPARSEMM_DISPATCH(a.dtype, decode_piece_typed<T>(a, piece, static_cast<Compute<T>*>(state),
                                                   static_cast<Compute<T>*>(scratch)));
}

void decode_finish(const DecodeArgs& a, const DecodePiece& piece, const void* states, int64_t stride, int64_t count) {
  SPARSEMM_DISPATCH(a.dtype,
                    decode_finish_typed<T>(a, piece, static_cast<const Compute<T>*>(states), stride, count));
}

void window_list(const WindowArgs& a, int64_t list, float* scratch) {
  SPARSEMM_DISPATCH(a.dtype, window_list_typed<T>(a, list, scratch));
}

int64_t window_scratch(const WindowArgs& a) { return padded_window(a) * (a.head_dim + 2 + a.num_columns); }

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

void norm_rows(const NormArgs& a, int64_t begin, int64_t end) {
  SPARSEMM_DISPATCH(a.dtype, norm_rows_typed<T>(a, begin, end));
}

void rope_heads(const RopeArgs& a, int64_t begin, int64_t end) {
  SPARSEMM_DISPATCH(a.dtype, rope_heads_typed<T>(a, begin, end));
}

void gated_row(Dtype dtype, Activation activation, const void* gate, const void* up, int64_t size, void* out) {
  SPARSEMM_DISPATCH(dtype, gated_row_typed<T>(activation, static_cast<const T*>(gate), static_cast<const T*>(up), size,
                                              static_cast<T*>(out)));
}

}  // namespace

const KernelTable& SPARSEMM_TABLE() {
  static const KernelTable table = {decode_piece, decode_finish, window_list, window_scratch,
                                    select_list,  norm_rows,     rope_heads,  gated_row};
  return table;
}

}  // namespace sparsemm::cpu
