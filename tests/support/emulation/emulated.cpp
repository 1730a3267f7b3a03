// The CUDA kernels over rows as CPU functions for tests (called through ctypes): the launchers of csrc/cuda over the
// emulated platform. Every function returns null, or what went wrong.
#include <algorithm>
#include <limits>

#include "guarded.h"
#include "decode.cuh"
#include "copy.cuh"
#include "select.cuh"
#include "window.cuh"

namespace {

using namespace sparsemm;
using namespace sparsemm::cuda;

// As dispatch_rows; with SPARSEMM_EMULATION_SMALL only head_dim <= 64 and no float16, for quick compilation.
template <class F>
void dispatch(Dtype dtype, int head_dim, const F& launch) {
#if defined(SPARSEMM_EMULATION_SMALL)
  if (head_dim > 64 || dtype == Dtype::kFloat16) throw std::runtime_error("not in the small emulation");
  if (dtype == Dtype::kFloat32) {
    launch(float{}, std::integral_constant<int, 64>{});
  } else {
    launch(bf16{}, std::integral_constant<int, 64>{});
  }
#else
  dispatch_rows(dtype, head_dim, launch);
#endif
}

// A workspace of its own allocation, filled with NaN (as float) or -1 (as int).
template <class V>
std::unique_ptr<V[]> workspace(int64_t size) {
  std::unique_ptr<V[]> memory(new V[static_cast<size_t>(size)]);
  std::memset(static_cast<void*>(memory.get()), 0xff, static_cast<size_t>(size) * sizeof(V));
  return memory;
}

}  // namespace

// Strides (elements) come as [b, h, t] for each source.
extern "C" const char* emulated_compact(const void* key, const void* value, const int32_t* positions,
                                        const int32_t* cu_kept, const int32_t* offsets, void* key_buffer,
                                        void* value_buffer, const int64_t* key_strides, const int64_t* value_strides,
                                        int64_t lists, int64_t num_kv_heads, int64_t num_columns, int64_t head_dim,
                                        int64_t element, int64_t total, int64_t slots, uint64_t seed) {
  return guarded(seed, [&] {
    CompactArgs a{};
    a.source[0] = static_cast<const char*>(key);
    a.source[1] = static_cast<const char*>(value);
    a.target[0] = static_cast<char*>(key_buffer);
    a.target[1] = static_cast<char*>(value_buffer);
    a.positions = positions;
    a.cu_kept = cu_kept;
    a.offsets = offsets;
    const int64_t* strides[2] = {key_strides, value_strides};
    for (int which = 0; which < 2; ++which) {
      a.stride_b[which] = strides[which][0] * element;
      a.stride_h[which] = strides[which][1] * element;
      a.stride_t[which] = strides[which][2] * element;
    }
    a.total = total;
    a.slots = slots;
    a.lists = static_cast<int>(lists);
    a.num_kv_heads = static_cast<int>(num_kv_heads);
    a.num_columns = static_cast<int>(num_columns);
    a.row_bytes = static_cast<int>(head_dim * element);
    enqueue_compact(a, nullptr);
  });
}

extern "C" const char* emulated_append(const void* key, const void* value, const int32_t* offsets, int32_t* lens,
                                       void* key_buffer, void* value_buffer, int32_t* overflow, const bool* mask,
                                       const int64_t* key_strides, const int64_t* value_strides, int64_t lists,
                                       int64_t num_kv_heads, int64_t num_new, int64_t head_dim, int64_t element,
                                       int64_t slots, uint64_t seed) {
  return guarded(seed, [&] {
    AppendArgs a{};
    a.source[0] = static_cast<const char*>(key);
    a.source[1] = static_cast<const char*>(value);
    a.target[0] = static_cast<char*>(key_buffer);
    a.target[1] = static_cast<char*>(value_buffer);
    a.offsets = offsets;
    a.lens = lens;
    a.overflow = overflow;
    a.mask = mask;
    const int64_t* strides[2] = {key_strides, value_strides};
    for (int which = 0; which < 2; ++which) {
      a.stride_b[which] = strides[which][0] * element;
      a.stride_h[which] = strides[which][1] * element;
      a.stride_t[which] = strides[which][2] * element;
    }
    a.mask_stride_b = num_new;
    a.mask_stride_n = 1;
    a.slots = slots;
    a.lists = static_cast<int>(lists);
    a.num_kv_heads = static_cast<int>(num_kv_heads);
    a.num_new = static_cast<int>(num_new);
    a.row_bytes = static_cast<int>(head_dim * element);
    enqueue_append(a, nullptr);
  });
}

extern "C" const char* emulated_decode(int dtype, const void* query, const void* key_buffer, const void* value_buffer,
                                       const int32_t* offsets, const int32_t* lens, const int32_t* num_later, void* out,
                                       float* lse, const int64_t* query_strides, int64_t lists, int64_t num_kv_heads,
                                       int64_t group, int64_t num_queries, int64_t head_dim, int64_t slots,
                                       double scale, int64_t resident, uint64_t seed) {
  return guarded(seed, [&] {
    DecodeArgs a{};
    a.dtype = static_cast<Dtype>(dtype);
    a.query = query;
    a.key_buffer = key_buffer;
    a.value_buffer = value_buffer;
    a.offsets = offsets;
    a.lens = lens;
    a.num_later = num_later;
    a.out = out;
    a.lse = lse;
    a.query_stride_b = query_strides[0];
    a.query_stride_h = query_strides[1];
    a.query_stride_n = query_strides[2];
    a.scale = static_cast<float>(scale);
    a.lists = static_cast<int>(lists);
    a.num_kv_heads = static_cast<int>(num_kv_heads);
    a.group = static_cast<int>(group);
    a.num_queries = static_cast<int>(num_queries);
    a.head_dim = static_cast<int>(head_dim);
    set_decode_grid(a, slots, static_cast<int>(resident));
    const auto tile_begin = workspace<int32_t>(lists + 1);
    const auto stats = workspace<float>(partial_stats_size(a)), partial = workspace<float>(partial_out_size(a));
    a.tile_begin = tile_begin.get();
    a.partial_stats = stats.get();
    a.partial_out = partial.get();
    dispatch(a.dtype, a.head_dim,
             [&](auto zero, auto dim) { enqueue_decode<decltype(zero), decltype(dim)::value>(a, nullptr); });
  });
}

// Whether a device would launch the grids of such a decode; nothing runs.
extern "C" const char* emulated_decode_launches(int64_t lists, int64_t group, int64_t num_queries, uint64_t seed) {
  return guarded(seed, [&] {
    DecodeArgs a{};
    a.lists = static_cast<int>(lists);
    a.num_kv_heads = 1;
    a.group = static_cast<int>(group);
    a.num_queries = static_cast<int>(num_queries);
    a.head_dim = 64;
    set_decode_grid(a, 100 * lists, 100);
    emulation::machine.runs = false;
    enqueue_decode<float, 64>(a, nullptr);
  });
}

extern "C" const char* emulated_window_scores(int dtype, const void* query, const void* key, const int32_t* starts,
                                              const int32_t* num_queries, float* scores, const int64_t* query_strides,
                                              const int64_t* key_strides, int64_t batch, int64_t num_kv_heads,
                                              int64_t group, int64_t window, int64_t num_columns, int64_t head_dim,
                                              double scale, uint64_t seed) {
  return guarded(seed, [&] {
    WindowArgs a{};
    a.dtype = static_cast<Dtype>(dtype);
    a.query = query;
    a.key = key;
    a.starts = starts;
    a.num_queries = num_queries;
    a.scores = scores;
    a.query_stride_b = query_strides[0];
    a.query_stride_h = query_strides[1];
    a.query_stride_w = query_strides[2];
    a.key_stride_b = key_strides[0];
    a.key_stride_h = key_strides[1];
    a.key_stride_t = key_strides[2];
    a.scale = static_cast<float>(scale);
    a.batch = static_cast<int>(batch);
    a.num_kv_heads = static_cast<int>(num_kv_heads);
    a.group = static_cast<int>(group);
    a.window = static_cast<int>(window);
    a.num_columns = static_cast<int>(num_columns);
    a.head_dim = static_cast<int>(head_dim);
    const auto stats = workspace<float>(window_stats_size(a)), lse = workspace<float>(window_lse_size(a));
    a.stats = stats.get();
    a.lse = lse.get();
    dispatch(a.dtype, a.head_dim, [&](auto zero, auto dim) {
      enqueue_window_scores<decltype(zero), decltype(dim)::value>(a, nullptr);
    });
  });
}

extern "C" const char* emulated_select(const float* scores, const int32_t* starts, const int32_t* counts,
                                       const int32_t* cu_kept, int32_t* positions, int64_t lists, int64_t num_columns,
                                       int64_t window, int64_t total, uint64_t seed) {
  return guarded(seed, [&] {
    SelectArgs a{scores, starts, counts, cu_kept, positions, total, static_cast<int>(lists),
                 static_cast<int>(num_columns), static_cast<int>(window)};
    enqueue_select(a, nullptr);
  });
}
