// Argument checks of the operators around attention; see checks.h.
#pragma once

#include "checks.h"

namespace sparsemm {

inline void check_like(const char* name, const Tensor& t, const Tensor& rows) {
  STD_TORCH_CHECK(t.scalar_type() == rows.scalar_type(), name, " is ",
                  torch::headeronly::toString(t.scalar_type()), ", the rows are ",
                  torch::headeronly::toString(rows.scalar_type()));
  STD_TORCH_CHECK(same_device(t, rows), name, " is on another device than the rows");
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline void check_weight(const char* name, const Tensor& weight, int64_t size, const Tensor& rows) {
  STD_TORCH_CHECK(has_shape(weight, {size}) && weight.is_contiguous(), name, " must be [", size, "], got ",
                  shape_of(weight));
  check_like(name, weight, rows);
}

inline void check_add_rms_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.is_contiguous(), "x must be contiguous [..., H], got ", shape_of(x));
  check_weight("weight", weight, x.size(x.dim() - 1), x);
  if (!residual.has_value()) return;
  STD_TORCH_CHECK(same_shape(*residual, x) && residual->is_contiguous(),
                  "residual must be contiguous and have the shape of x, ", shape_of(x), ", got ", shape_of(*residual));
  check_like("residual", *residual, x);
}

inline void check_rope_append(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cos,
                              const Tensor& sin, const Tensor& offsets, const Tensor& lens, const Tensor& key_buffer,
                              const Tensor& value_buffer, const Tensor& overflow, const std::optional<Tensor>& mask,
                              const std::optional<Tensor>& query_weight, const std::optional<Tensor>& key_weight) {
  check_append(key, value, offsets, lens, key_buffer, value_buffer, overflow, mask);
  const int64_t batch = key.size(0), n = key.size(2), head_dim = key.size(3);
  STD_TORCH_CHECK(query.dim() == 4 && has_shape(query, {batch, query.size(1), n, head_dim}), "query ",
                  shape_of(query), " and key ", shape_of(key), " do not belong together");
  check_like("query", query, key);
  check_inner("query", query);
  STD_TORCH_CHECK(cos.dim() == 3 && (cos.size(0) == 1 || cos.size(0) == batch) && cos.size(1) == n, "cos must be [",
                  batch, " or 1, ", n, ", R], got ", shape_of(cos));
  STD_TORCH_CHECK(cos.size(2) % 2 == 0 && cos.size(2) <= head_dim, cos.size(2),
                  " dimensions cannot be rotated of ", head_dim, "; an even number is needed");
  STD_TORCH_CHECK(same_shape(sin, cos), "cos ", shape_of(cos), " and sin ", shape_of(sin), " must have one shape");
  check_like("cos", cos, key);
  check_like("sin", sin, key);
  check_inner("cos", cos);
  check_inner("sin", sin);
  STD_TORCH_CHECK(query_weight.has_value() == key_weight.has_value(), "query_weight and key_weight go together");
  if (!query_weight.has_value()) return;
  check_weight("query_weight", *query_weight, head_dim, key);
  check_weight("key_weight", *key_weight, head_dim, key);
}

inline void check_gated(const Tensor& gate, const Tensor& up) {
  STD_TORCH_CHECK(gate.dim() >= 1 && same_shape(gate, up), "gate ", shape_of(gate), " and up ", shape_of(up),
                  " must have one shape");
  STD_TORCH_CHECK(gate.scalar_type() == up.scalar_type(), "gate and up must have one dtype");
  STD_TORCH_CHECK(same_device(gate, up), "gate and up must be on one device");
}

// Distance between rows of `t` seen as [rows, H]; -1 where its rows do not lie evenly.
inline int64_t row_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.numel() == 0 || last == 0) return t.size(last);
  if (t.size(last) > 1 && t.stride(last) != 1) return -1;
  int64_t step = 0, rows = 1;  // of the innermost dimension that is longer than one
  for (int64_t d = last - 1; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (step == 0) {
      step = t.stride(d);
    } else if (t.stride(d) != step * rows) {
      return -1;
    }
    rows *= t.size(d);
  }
  return step == 0 ? t.size(last) : step;
}

}  // namespace sparsemm
