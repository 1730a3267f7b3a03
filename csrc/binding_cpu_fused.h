// The operators around attention on the CPU; part of binding_cpu.cpp.
#pragma once

#include "checks_fused.h"
#include "cpu/kernels.h"

namespace sparsemm {
namespace {

Tensor empty_like_cpu(const Tensor& t) { return empty_cpu(t.sizes(), t.scalar_type()); }

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, std::optional<Tensor> residual, Tensor weight, double eps,
                                        bool unit_offset) {
  check_add_rms_norm(x, residual, weight);
  Tensor out = empty_like_cpu(x);
  Tensor sum = residual.has_value() ? empty_like_cpu(x) : empty_cpu({0}, x.scalar_type());
  const int64_t size = x.size(x.dim() - 1), rows = size > 0 ? x.numel() / size : 0;
  const cpu::NormArgs a{dtype_of(x), x.const_data_ptr(), residual.has_value() ? residual->const_data_ptr() : nullptr,
                        weight.const_data_ptr(), out.mutable_data_ptr(),
                        residual.has_value() ? sum.mutable_data_ptr() : nullptr, size, eps, unit_offset};
  torch::stable::parallel_for(0, rows, grain_for(size * static_cast<int64_t>(x.element_size())),
                              [&](int64_t first, int64_t last) { kernels().norm_rows(a, first, last); });
  return {out, sum};
}

Tensor rope_append(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor offsets, Tensor lens,
                   Tensor key_buffer, Tensor value_buffer, Tensor overflow, std::optional<Tensor> mask,
                   std::optional<Tensor> query_weight, std::optional<Tensor> key_weight, double eps, bool unit_offset,
                   bool interleaved) {
  check_rope_append(query, key, value, cos, sin, offsets, lens, key_buffer, value_buffer, overflow, mask, query_weight,
                    key_weight);
  Tensor out = empty_like_cpu(query);
  cpu::RopeArgs a{};
  a.dtype = dtype_of(query);
  a.query = query.const_data_ptr();
  a.key = key.const_data_ptr();
  a.value = value.const_data_ptr();
  a.cos = cos.const_data_ptr();
  a.sin = sin.const_data_ptr();
  a.offsets = ints(offsets);
  a.lens = static_cast<int32_t*>(lens.mutable_data_ptr());
  a.overflow = static_cast<int32_t*>(overflow.mutable_data_ptr());
  a.out = out.mutable_data_ptr();
  a.key_buffer = key_buffer.mutable_data_ptr();
  a.value_buffer = value_buffer.mutable_data_ptr();
  if (mask.has_value()) {
    a.mask = static_cast<const bool*>(mask->const_data_ptr());
    a.mask_stride_b = mask->stride(0);
    a.mask_stride_n = mask->stride(1);
  }
  if (query_weight.has_value()) {
    a.query_weight = query_weight->const_data_ptr();
    a.key_weight = key_weight->const_data_ptr();
  }
  for (int d = 0; d < 3; ++d) {
    a.query_stride[d] = query.stride(d);
    a.key_stride[d] = key.stride(d);
    a.value_stride[d] = value.stride(d);
  }
  a.cos_stride_b = cos.size(0) == 1 ? 0 : cos.stride(0);
  a.sin_stride_b = sin.size(0) == 1 ? 0 : sin.stride(0);
  a.cos_stride_n = cos.stride(1);
  a.sin_stride_n = sin.stride(1);
  a.num_query_heads = query.size(1);
  a.num_kv_heads = key.size(1);
  a.columns = key.size(2);
  a.head_dim = key.size(3);
  a.width = cos.size(2);
  a.eps = eps;
  a.unit_offset = unit_offset;
  a.interleaved = interleaved;
  const int64_t slots = key_buffer.size(0), lists = key.size(0) * a.num_kv_heads;
  for (int64_t r = 0; r < lists; ++r) {
    STD_TORCH_CHECK(a.lens[r] >= 0 && a.offsets[r] >= 0 && a.offsets[r + 1] <= slots, "the rows of list ", r,
                    " lie outside the buffers of ", slots, " slots");
  }
  const int64_t heads = key.size(0) * (a.num_query_heads + a.num_kv_heads);
  const int64_t head_bytes = a.columns * a.head_dim * static_cast<int64_t>(key.element_size());
  torch::stable::parallel_for(0, heads, grain_for(2 * head_bytes),
                              [&](int64_t first, int64_t last) { kernels().rope_heads(a, first, last); });
  return out;
}

Tensor gated(cpu::Activation activation, const Tensor& gate, const Tensor& up) {
  check_gated(gate, up);
  const int64_t size = gate.size(gate.dim() - 1), gate_stride = row_stride(gate), up_stride = row_stride(up);
  STD_TORCH_CHECK(gate_stride >= 0 && up_stride >= 0,
                  "gate and up must have a contiguous last dimension and evenly spaced rows; call .contiguous()");
  Tensor out = empty_like_cpu(gate);
  const Dtype dtype = dtype_of(gate);
  const int64_t element = static_cast<int64_t>(gate.element_size()), rows = size > 0 ? gate.numel() / size : 0;
  const char *gates = static_cast<const char*>(gate.const_data_ptr()), *ups = static_cast<const char*>(up.const_data_ptr());
  char* target = static_cast<char*>(out.mutable_data_ptr());
  constexpr int64_t kPiece = 2048;  // elements: a row alone is shared among threads, too
  const int64_t pieces = (size + kPiece - 1) / kPiece;
  torch::stable::parallel_for(0, rows * pieces, grain_for(4 * kPiece * element), [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t row = item / pieces, begin = item % pieces * kPiece;
      kernels().gated_row(dtype, activation, gates + (row * gate_stride + begin) * element,
                          ups + (row * up_stride + begin) * element, std::min(kPiece, size - begin),
                          target + (row * size + begin) * element);
    }
  });
  return out;
}

Tensor silu_mul(Tensor gate, Tensor up) { return gated(cpu::Activation::kSilu, gate, up); }
Tensor gelu_tanh_mul(Tensor gate, Tensor up) { return gated(cpu::Activation::kGeluTanh, gate, up); }

}  // namespace
}  // namespace sparsemm
