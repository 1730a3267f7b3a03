// Argument checks shared by the CPU and CUDA bindings: the dispatcher knows the schemas, but not the dtypes, shapes and
// devices that the kernels rely on. The rules and messages are those of sparsemm/ops/checks.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <string>

namespace sparsemm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  if (t.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t i = 0;
  for (int64_t size : shape) {
    if (t.size(i++) != size) return false;
  }
  return true;
}

// The last dimension is read with vector loads, so it must be contiguous; any other strides are fine.
inline void check_inner(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, name,
                  " must have a contiguous last dimension; call .contiguous()");
}

inline void check_int32(const char* name, const Tensor& t, std::initializer_list<int64_t> shape, const Tensor& rows) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int, name, " must be int32, got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(same_device(t, rows), name, " is on another device than the rows; move it there");
  STD_TORCH_CHECK(has_shape(t, shape), name, " has the wrong shape ", shape_of(t));
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

inline void check_rows(const Tensor& key, const Tensor& value) {
  STD_TORCH_CHECK(key.dim() == 4, "key must be [B, Hkv, T, D], got ", shape_of(key));
  STD_TORCH_CHECK(value.dim() == 4 && has_shape(value, {key.size(0), key.size(1), key.size(2), key.size(3)}), "key ",
                  shape_of(key), " and value ", shape_of(value), " must have one shape");
  STD_TORCH_CHECK(key.scalar_type() == value.scalar_type(), "key and value must have one dtype");
  STD_TORCH_CHECK(same_device(key, value), "key and value must be on one device");
  check_inner("key", key);
  check_inner("value", value);
}

inline void check_buffers(const Tensor& rows, const Tensor& key_buffer, const Tensor& value_buffer) {
  const int64_t head_dim = rows.size(rows.dim() - 1);
  STD_TORCH_CHECK(key_buffer.dim() == 2 && key_buffer.size(1) == head_dim, "key_buffer must be [slots, ", head_dim,
                  "], got ", shape_of(key_buffer));
  STD_TORCH_CHECK(has_shape(value_buffer, {key_buffer.size(0), head_dim}), "key_buffer ", shape_of(key_buffer),
                  " and value_buffer ", shape_of(value_buffer), " must have one shape");
  for (const Tensor* buffer : {&key_buffer, &value_buffer}) {
    STD_TORCH_CHECK(buffer->scalar_type() == rows.scalar_type(), "a buffer is ",
                    torch::headeronly::toString(buffer->scalar_type()), ", the rows are ",
                    torch::headeronly::toString(rows.scalar_type()));
    STD_TORCH_CHECK(same_device(*buffer, rows), "a buffer is on another device than the rows");
    STD_TORCH_CHECK(buffer->is_contiguous(), "key_buffer and value_buffer must be contiguous");
  }
}

inline void check_compact(const Tensor& key, const Tensor& value, const Tensor& positions, const Tensor& cu_kept,
                          const Tensor& offsets, const Tensor& key_buffer, const Tensor& value_buffer) {
  check_rows(key, value);
  check_buffers(key, key_buffer, value_buffer);
  const int64_t lists = key.size(0) * key.size(1);
  STD_TORCH_CHECK(positions.dim() == 1, "positions must be [total], got ", shape_of(positions));
  check_int32("positions", positions, {positions.size(0)}, key);
  check_int32("cu_kept", cu_kept, {lists + 1}, key);
  check_int32("offsets", offsets, {lists + 1}, key);
}

inline void check_append(const Tensor& key, const Tensor& value, const Tensor& offsets, const Tensor& lens,
                         const Tensor& key_buffer, const Tensor& value_buffer, const Tensor& overflow,
                         const std::optional<Tensor>& mask) {
  check_rows(key, value);
  check_buffers(key, key_buffer, value_buffer);
  const int64_t lists = key.size(0) * key.size(1);
  check_int32("offsets", offsets, {lists + 1}, key);
  check_int32("lens", lens, {lists}, key);
  check_int32("overflow", overflow, {1}, key);
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool, got ",
                    torch::headeronly::toString(mask->scalar_type()));
    STD_TORCH_CHECK(same_device(*mask, key), "mask is on another device than the rows");
    STD_TORCH_CHECK(has_shape(*mask, {key.size(0), key.size(2)}), "mask must have shape [", key.size(0), ", ",
                    key.size(2), "], got ", shape_of(*mask));
  }
}

inline void check_varlen_decode(const Tensor& query, const Tensor& key_buffer, const Tensor& value_buffer,
                                const Tensor& offsets, const Tensor& lens, const std::optional<Tensor>& num_later) {
  STD_TORCH_CHECK(query.dim() == 4, "query must be [B, Hq, n, D], got ", shape_of(query));
  check_inner("query", query);
  check_buffers(query, key_buffer, value_buffer);
  STD_TORCH_CHECK(lens.dim() == 1, "lens must be [B * Hkv], got ", shape_of(lens));
  const int64_t batch = query.size(0), lists = lens.size(0);
  STD_TORCH_CHECK(batch > 0 && lists > 0 && lists % batch == 0 && query.size(1) % (lists / batch) == 0, lists,
                  " row lists do not divide among batch ", batch, " and ", query.size(1), " query heads");
  check_int32("offsets", offsets, {lists + 1}, query);
  check_int32("lens", lens, {lists}, query);
  if (num_later.has_value()) check_int32("num_later", *num_later, {batch, query.size(2)}, query);
}

inline void check_window_scores(const Tensor& query, const Tensor& key, const Tensor& starts,
                                const Tensor& num_queries) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "query must be [B, Hq, w, D] and key [B, Hkv, T, D]");
  STD_TORCH_CHECK(query.size(0) == key.size(0) && query.size(3) == key.size(3) && key.size(1) > 0 &&
                      query.size(1) % key.size(1) == 0,
                  "query ", shape_of(query), " and key ", shape_of(key), " do not belong together");
  STD_TORCH_CHECK(query.size(2) <= key.size(2), query.size(2), " window queries over only ", key.size(2), " columns");
  STD_TORCH_CHECK(query.scalar_type() == key.scalar_type(), "query and key must have one dtype");
  STD_TORCH_CHECK(same_device(query, key), "query and key must be on one device");
  check_inner("query", query);
  check_inner("key", key);
  check_int32("starts", starts, {key.size(0), key.size(1)}, key);
  check_int32("num_queries", num_queries, {key.size(0)}, key);
}

inline void check_select_rows(const Tensor& scores, const Tensor& starts, const Tensor& counts, int64_t window,
                              const Tensor& cu_kept, int64_t total) {
  STD_TORCH_CHECK(scores.dim() == 2 && scores.scalar_type() == ScalarType::Float,
                  "scores must be float32 [R, C], got ", shape_of(scores));
  STD_TORCH_CHECK(scores.is_contiguous(), "scores must be contiguous");
  const int64_t lists = scores.size(0);
  check_int32("starts", starts, {lists}, scores);
  check_int32("counts", counts, {lists}, scores);
  check_int32("cu_kept", cu_kept, {lists + 1}, scores);
  STD_TORCH_CHECK(window >= 0 && total >= 0, "window ", window, " and total ", total, " must not be negative");
}

}  // namespace sparsemm
