// torch.ops.sparsemm.* on the CPU: checks, work split over torch's threads, kernels of cpu/kernels.cpp.
#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "registration.h"
#include "tensors.h"

namespace sparsemm {
namespace {

const cpu::KernelTable& kernels() {
#if defined(SPARSEMM_X86_LEVELS)
  static const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  static const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                         __builtin_cpu_supports("avx512cd");
  return v4 ? cpu::kernels_v4() : v3 ? cpu::kernels_v3() : cpu::kernels_baseline();
#else
  return cpu::kernels_baseline();
#endif
}

Dtype dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, ": rows must be floating point of 16 to 64 bits, got ",
                  torch::headeronly::toString(t.scalar_type()));
  return Dtype::kFloat32;
}

// Rows of any size may lie anywhere.
void check_vectors(const char*, const Tensor&) {}

// Work below this is not worth a second thread, which may have to wait for a busy core.
constexpr int64_t kGrainBytes = 256 * 1024;
constexpr int64_t kPrefetchRows = 8;
constexpr int64_t kGrainProducts = 256 * 1024;

int64_t grain_for(int64_t row_bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes)); }

void compact(Tensor key, Tensor value, Tensor positions, Tensor cu_kept, Tensor offsets, Tensor key_buffer,
             Tensor value_buffer) {
  check_compact(key, value, positions, cu_kept, offsets, key_buffer, value_buffer);
  dtype_of("compact", key);
  const int64_t num_kv_heads = key.size(1), num_columns = key.size(2), lists = key.size(0) * num_kv_heads;
  const int64_t total = positions.size(0), slots = key_buffer.size(0);
  const int64_t element = static_cast<int64_t>(key.element_size()), row_bytes = key.size(3) * element;
  const int32_t *kept = ints(positions), *begin = ints(cu_kept), *offset = ints(offsets);
  STD_TORCH_CHECK(lists == 0 || (begin[0] == 0 && begin[lists] == total), "cu_kept must run from 0 to ", total);
  for (int64_t r = 0; r < lists; ++r) {
    const int64_t count = begin[r + 1] - begin[r];
    STD_TORCH_CHECK(count >= 0 && offset[r] >= 0 && offset[r] + count <= slots, "the kept rows of row list ", r,
                    " do not fit into the ", slots, " slots of the buffers");
  }
  for (int64_t i = 0; i < total; ++i) {
    STD_TORCH_CHECK(kept[i] >= 0 && kept[i] < num_columns, "position ", kept[i], " is not one of the ", num_columns,
                    " columns");
  }
  const Tensor* sources[2] = {&key, &value};
  char* targets[2] = {static_cast<char*>(key_buffer.mutable_data_ptr()),
                      static_cast<char*>(value_buffer.mutable_data_ptr())};
  torch::stable::parallel_for(0, total, grain_for(2 * row_bytes), [&](int64_t first, int64_t last) {
    for (int which = 0; which < 2; ++which) {
      const char* source = static_cast<const char*>(sources[which]->const_data_ptr());
      const int64_t stride_b = sources[which]->stride(0) * element, stride_h = sources[which]->stride(1) * element;
      const int64_t stride_t = sources[which]->stride(2) * element;
      const auto source_of = [&](int64_t i, int64_t& r) {
        while (i >= begin[r + 1]) ++r;
        return source + r / num_kv_heads * stride_b + r % num_kv_heads * stride_h + kept[i] * stride_t;
      };
      int64_t r = 0, ahead = 0;
      for (int64_t i = first; i < last; ++i) {
        if (i + kPrefetchRows < last) {  // kept rows lie anywhere: the processor cannot guess the next one
          const char* next = source_of(i + kPrefetchRows, ahead);
          for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(next + byte);
        }
        const char* row = source_of(i, r);
        std::memcpy(targets[which] + (offset[r] + (i - begin[r])) * row_bytes, row, row_bytes);
      }
    }
  });
}

void append(Tensor key, Tensor value, Tensor offsets, Tensor lens, Tensor key_buffer, Tensor value_buffer,
            Tensor overflow, std::optional<Tensor> mask) {
  check_append(key, value, offsets, lens, key_buffer, value_buffer, overflow, mask);
  dtype_of("append", key);
  const int64_t num_kv_heads = key.size(1), n = key.size(2), lists = key.size(0) * num_kv_heads;
  const int64_t element = static_cast<int64_t>(key.element_size()), row_bytes = key.size(3) * element;
  const int64_t slots = key_buffer.size(0);
  const int32_t* offset = ints(offsets);
  int32_t* length = static_cast<int32_t*>(lens.mutable_data_ptr());
  const bool* stored = mask.has_value() ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  const int64_t mask_b = stored ? mask->stride(0) : 0, mask_n = stored ? mask->stride(1) : 0;
  for (int64_t r = 0; r < lists; ++r) {
    STD_TORCH_CHECK(offset[r] >= 0 && length[r] >= 0 && offset[r + 1] <= slots, "row list ", r,
                    " lies outside the buffers of ", slots, " slots");
  }
  const char *new_keys = static_cast<const char*>(key.const_data_ptr()),
             *new_values = static_cast<const char*>(value.const_data_ptr());
  char *key_rows = static_cast<char*>(key_buffer.mutable_data_ptr()),
       *value_rows = static_cast<char*>(value_buffer.mutable_data_ptr());
  const auto source = [&](const Tensor& t, const char* base, int64_t r, int64_t i) {
    return base + (r / num_kv_heads * t.stride(0) + r % num_kv_heads * t.stride(1) + i * t.stride(2)) * element;
  };
  bool full = false;
  for (int64_t r = 0; r < lists; ++r) {
    const auto keeps = [&](int64_t i) { return !stored || stored[r / num_kv_heads * mask_b + i * mask_n]; };
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += keeps(i);
    if (length[r] + count > offset[r + 1] - offset[r]) {
      full = true;
      continue;
    }
    for (int64_t i = 0; i < n; ++i) {
      if (!keeps(i)) continue;
      const int64_t slot = offset[r] + length[r]++;
      std::memcpy(key_rows + slot * row_bytes, source(key, new_keys, r, i), row_bytes);
      std::memcpy(value_rows + slot * row_bytes, source(value, new_values, r, i), row_bytes);
    }
  }
  if (full) *static_cast<int32_t*>(overflow.mutable_data_ptr()) = 1;
}

// The pieces of one decode call. Rows are cut so that every thread gets about the same number of (query, row) products,
// however skewed the lengths are: a long list is shared by several threads and its partial results are merged.
struct DecodePlan {
  std::vector<cpu::DecodePiece> pieces;
  std::vector<int64_t> thread_begin;  // pieces of thread i: thread_begin[i] .. thread_begin[i + 1]
  std::vector<int64_t> block_begin;   // pieces of query block i: block_begin[i] .. block_begin[i + 1]
};

// Rows of list r that any query sees: none of a sequence that has ended.
int64_t rows_of(const cpu::DecodeArgs& a, int64_t r) {
  if (a.num_queries != 1 || a.num_later == nullptr) return a.lens[r];
  return std::clamp<int64_t>(int64_t{a.lens[r]} - a.num_later[r / a.num_kv_heads], 0, a.lens[r]);
}

DecodePlan plan_decode(const cpu::DecodeArgs& a, int64_t lists, int64_t threads) {
  constexpr int64_t kOverhead = 16;  // cost of starting and merging a piece, in rows
  const int64_t queries = a.num_query_heads / a.num_kv_heads * a.num_queries;
  const int64_t blocks = (queries + cpu::kMaxQueryBlock - 1) / cpu::kMaxQueryBlock;
  int64_t cost = 0;
  for (int64_t r = 0; r < lists; ++r) cost += blocks * (rows_of(a, r) + kOverhead);
  const int64_t row_products = std::max<int64_t>(1, std::min(queries, cpu::kMaxQueryBlock) * a.head_dim);
  const int64_t share = std::max((cost + threads - 1) / threads, std::max(kOverhead, kGrainProducts / row_products));
  DecodePlan plan;
  plan.thread_begin.push_back(0);
  plan.block_begin.push_back(0);
  int64_t left = share;
  for (int64_t r = 0; r < lists; ++r) {
    const int64_t total = rows_of(a, r);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * cpu::kMaxQueryBlock, last = std::min(queries, first + cpu::kMaxQueryBlock);
      int64_t row = 0;
      do {
        const int64_t rest = total - row;
        // A remainder too short to be worth merging stays in one piece.
        const int64_t rows = rest <= left + 2 * kOverhead ? rest : std::max<int64_t>(left, kOverhead);
        plan.pieces.push_back({r, first, last, row, row + rows});
        row += rows;
        left -= rows + kOverhead;
        if (left <= 0) {
          plan.thread_begin.push_back(static_cast<int64_t>(plan.pieces.size()));
          left = share;
        }
      } while (row < total);
      plan.block_begin.push_back(static_cast<int64_t>(plan.pieces.size()));
    }
  }
  if (plan.thread_begin.back() != static_cast<int64_t>(plan.pieces.size())) {
    plan.thread_begin.push_back(static_cast<int64_t>(plan.pieces.size()));
  }
  return plan;
}

template <class C>
void run_decode(const cpu::DecodeArgs& a, const DecodePlan& plan) {
  const cpu::KernelTable& table = kernels();
  const int64_t queries =
      std::min(cpu::kMaxQueryBlock, a.num_query_heads / a.num_kv_heads * a.num_queries);
  const int64_t record = queries * (a.head_dim + 2), scratch = cpu::decode_scratch(a);
  std::unique_ptr<C[]> states(new C[record * plan.pieces.size()]);
  const int64_t threads = static_cast<int64_t>(plan.thread_begin.size()) - 1;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    std::unique_ptr<C[]> local(new C[scratch]);
    for (int64_t p = plan.thread_begin[first]; p < plan.thread_begin[last]; ++p) {
      table.decode_piece(a, plan.pieces[p], states.get() + p * record, local.get());
    }
  });
  for (size_t block = 0; block + 1 < plan.block_begin.size(); ++block) {
    const int64_t begin = plan.block_begin[block], end = plan.block_begin[block + 1];
    table.decode_finish(a, plan.pieces[begin], states.get() + begin * record, record, end - begin);
  }
}

std::tuple<Tensor, Tensor> varlen_decode(Tensor query, Tensor key_buffer, Tensor value_buffer, Tensor offsets,
                                         Tensor lens, double scale, std::optional<Tensor> num_later) {
  check_varlen_decode(query, key_buffer, value_buffer, offsets, lens, num_later);
  const int64_t batch = query.size(0), num_query_heads = query.size(1), n = query.size(2), head_dim = query.size(3);
  const int64_t lists = lens.size(0), slots = key_buffer.size(0);
  Tensor out = empty_beside(query, {batch, num_query_heads, n, head_dim}, query.scalar_type());
  Tensor lse = empty_beside(query, {batch, num_query_heads, n}, ScalarType::Float);
  cpu::DecodeArgs a{dtype_of("varlen_decode", query), query.const_data_ptr(), key_buffer.const_data_ptr(),
                    value_buffer.const_data_ptr(), ints(offsets), ints(lens),
                    num_later.has_value() ? ints(*num_later) : nullptr, out.mutable_data_ptr(),
                    static_cast<float*>(lse.mutable_data_ptr()), lists / batch, num_query_heads, n, head_dim,
                    query.stride(0), query.stride(1), query.stride(2), scale};
  for (int64_t r = 0; r < lists; ++r) {
    STD_TORCH_CHECK(a.lens[r] >= 0 && a.offsets[r] >= 0 && a.offsets[r] + int64_t{a.lens[r]} <= slots,
                    "the rows of list ", r, " lie outside the buffers of ", slots, " slots");
  }
  if (out.numel() == 0) return {out, lse};
  const DecodePlan plan = plan_decode(a, lists, torch::stable::get_num_threads());
  if (a.dtype == Dtype::kFloat64) {
    run_decode<double>(a, plan);
  } else {
    run_decode<float>(a, plan);
  }
  return {out, lse};
}

Tensor window_scores(Tensor query, Tensor key, Tensor starts, Tensor num_queries, double scale) {
  check_window_scores(query, key, starts, num_queries);
  const int64_t batch = key.size(0), num_kv_heads = key.size(1), num_columns = key.size(2);
  Tensor scores = empty_beside(key, {batch, num_kv_heads, num_columns}, ScalarType::Float);
  const cpu::WindowArgs a{dtype_of("window_scores", query), query.const_data_ptr(), key.const_data_ptr(), ints(starts),
                          ints(num_queries), static_cast<float*>(scores.mutable_data_ptr()), num_kv_heads,
                          query.size(1), query.size(2), num_columns, key.size(3), query.stride(0), query.stride(1),
                          query.stride(2), key.stride(0), key.stride(1), key.stride(2), scale};
  const int64_t products = query.size(1) / std::max<int64_t>(1, num_kv_heads) * query.size(2) * num_columns * key.size(3);
  const int64_t grain = std::max<int64_t>(1, kGrainProducts / std::max<int64_t>(1, products));
  torch::stable::parallel_for(0, batch * num_kv_heads, grain, [&](int64_t first, int64_t last) {
    std::unique_ptr<float[]> scratch(new float[kernels().window_scratch(a)]);
    for (int64_t r = first; r < last; ++r) kernels().window_list(a, r, scratch.get());
  });
  return scores;
}

Tensor select_rows(Tensor scores, Tensor starts, Tensor counts, int64_t window, Tensor cu_kept, int64_t total) {
  check_select_rows(scores, starts, counts, window, cu_kept, total);
  const int64_t lists = scores.size(0), num_columns = scores.size(1);
  const int32_t *start = ints(starts), *count = ints(counts), *begin = ints(cu_kept);
  for (int64_t r = 0; r < lists; ++r) {
    const int64_t first = std::max<int64_t>(start[r], 0), chosen = std::max<int64_t>(count[r], 0);
    const int64_t expected = chosen + num_columns + window - std::max(first, num_columns);
    STD_TORCH_CHECK(chosen <= std::max<int64_t>(0, num_columns - first), "row list ", r, " cannot give ", count[r],
                    " of its ", num_columns - first, " columns");
    STD_TORCH_CHECK(begin[r] >= 0 && begin[r + 1] - begin[r] == expected && begin[r + 1] <= total, "cu_kept gives ",
                    begin[r + 1] - begin[r], " items to row list ", r, ", which keeps ", expected);
  }
  Tensor positions = empty_beside(scores, {total}, ScalarType::Int);
  int32_t* out = static_cast<int32_t*>(positions.mutable_data_ptr());
  const float* values = static_cast<const float*>(scores.const_data_ptr());
  torch::stable::parallel_for(0, lists, grain_for(16 * num_columns), [&](int64_t first, int64_t last) {
    std::unique_ptr<uint32_t[]> scratch(new uint32_t[2 * num_columns + 1]);
    for (int64_t r = first; r < last; ++r) {
      kernels().select_list(values + r * num_columns, start[r], num_columns, count[r], window, out + begin[r],
                            scratch.get());
    }
  });
  return positions;
}

void launch(const NormArgs& a, const Tensor& x) {
  torch::stable::parallel_for(0, a.rows, grain_for(a.size * static_cast<int64_t>(x.element_size())),
                              [&](int64_t first, int64_t last) { kernels().norm_rows(a, first, last); });
}

void launch(const RopeArgs& a, const Tensor& key) {
  const int64_t lists = int64_t{a.batch} * a.num_kv_heads, heads = lists + int64_t{a.batch} * a.num_query_heads;
  for (int64_t r = 0; r < lists; ++r) {
    STD_TORCH_CHECK(a.lens[r] >= 0 && a.offsets[r] >= 0 && a.offsets[r + 1] <= a.slots, "the rows of list ", r,
                    " lie outside the buffers of ", a.slots, " slots");
  }
  const int64_t head_bytes = int64_t{a.columns} * a.head_dim * static_cast<int64_t>(key.element_size());
  torch::stable::parallel_for(0, heads, grain_for(2 * head_bytes),
                              [&](int64_t first, int64_t last) { kernels().rope_heads(a, first, last); });
}

void launch(const GatedArgs& a, const Tensor& gate) {  // a row alone is shared among threads, too
  torch::stable::parallel_for(0, a.rows * a.size, grain_for(4 * static_cast<int64_t>(gate.element_size())),
                              [&](int64_t first, int64_t last) { kernels().gated_elements(a, first, last); });
}

}  // namespace
}  // namespace sparsemm

#include "binding_fused.h"

namespace sparsemm {
namespace {

const KernelEntry kEntries[] = {
    {"compact", TORCH_BOX(&compact)},
    {"append", TORCH_BOX(&append)},
    {"varlen_decode", TORCH_BOX(&varlen_decode)},
    {"window_scores", TORCH_BOX(&window_scores)},
    {"select_rows", TORCH_BOX(&select_rows)},
    {"add_rms_norm", TORCH_BOX(&add_rms_norm)},
    {"rope_append", TORCH_BOX(&rope_append)},
    {"silu_mul", TORCH_BOX(&silu_mul)},
    {"gelu_tanh_mul", TORCH_BOX(&gelu_tanh_mul)},
};

}  // namespace
}  // namespace sparsemm

SPARSEMM_DEFINE_ENTRY_POINTS("CPU", sparsemm::kEntries)
