// The operators around attention; part of both bindings, which define `dtype_of`, `check_vectors` and `launch`.
#pragma once

#include "checks_fused.h"
#include "fused_args.h"
#include "tensors.h"

namespace sparsemm {
namespace {

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, std::optional<Tensor> residual, Tensor weight, double eps,
                                        bool unit_offset) {
  check_add_rms_norm(x, residual, weight);
  check_vectors("x", x);
  check_vectors("weight", weight);
  if (residual.has_value()) check_vectors("residual", *residual);
  NormArgs a{};
  a.dtype = dtype_of("add_rms_norm", x);
  Tensor out = empty_beside(x, x.sizes(), x.scalar_type());
  Tensor sum = residual.has_value() ? empty_beside(x, x.sizes(), x.scalar_type())
                                    : empty_beside(x, {0}, x.scalar_type());
  a.x = x.const_data_ptr();
  a.residual = pointer(residual);
  a.weight = weight.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.sum = residual.has_value() ? sum.mutable_data_ptr() : nullptr;
  a.size = static_cast<int>(x.size(x.dim() - 1));
  a.rows = a.size > 0 ? x.numel() / a.size : 0;
  a.eps = static_cast<float>(eps);
  a.unit_offset = unit_offset;
  STD_TORCH_CHECK(a.rows <= INT32_MAX, "add_rms_norm: ", a.rows, " rows; at most 2^31 - 1 are normalised at once");
  launch(a, x);
  return {out, sum};
}

Tensor rope_append(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor offsets, Tensor lens,
                   Tensor key_buffer, Tensor value_buffer, Tensor overflow, std::optional<Tensor> mask,
                   std::optional<Tensor> query_weight, std::optional<Tensor> key_weight, double eps, bool unit_offset,
                   bool interleaved) {
  check_rope_append(query, key, value, cos, sin, offsets, lens, key_buffer, value_buffer, overflow, mask, query_weight,
                    key_weight);
  RopeArgs a{};
  a.dtype = dtype_of("rope_append", query);
  Tensor out = empty_beside(query, query.sizes(), query.scalar_type());
  a.query = query.const_data_ptr();
  a.key = key.const_data_ptr();
  a.value = value.const_data_ptr();
  a.cos = cos.const_data_ptr();
  a.sin = sin.const_data_ptr();
  a.query_weight = pointer(query_weight);
  a.key_weight = pointer(key_weight);
  set_lists(a, offsets, lens, overflow, mask);
  a.out = out.mutable_data_ptr();
  a.key_buffer = key_buffer.mutable_data_ptr();
  a.value_buffer = value_buffer.mutable_data_ptr();
  for (int d = 0; d < 3; ++d) {
    a.query_stride[d] = query.stride(d);
    a.key_stride[d] = key.stride(d);
    a.value_stride[d] = value.stride(d);
  }
  a.cos_stride_b = cos.size(0) == 1 ? 0 : cos.stride(0);
  a.sin_stride_b = sin.size(0) == 1 ? 0 : sin.stride(0);
  a.cos_stride_n = cos.stride(1);
  a.sin_stride_n = sin.stride(1);
  a.slots = key_buffer.size(0);
  a.batch = static_cast<int>(key.size(0));
  a.num_query_heads = static_cast<int>(query.size(1));
  a.num_kv_heads = static_cast<int>(key.size(1));
  a.columns = static_cast<int>(key.size(2));
  a.head_dim = static_cast<int>(key.size(3));
  a.width = static_cast<int>(cos.size(2));
  a.eps = static_cast<float>(eps);
  a.unit_offset = unit_offset;
  a.interleaved = interleaved;
  launch(a, key);
  return out;
}

Tensor gated(const char* name, Activation activation, const Tensor& gate, const Tensor& up) {
  check_gated(gate, up);
  check_vectors("gate", gate);
  check_vectors("up", up);
  GatedArgs a{};
  a.dtype = dtype_of(name, gate);
  a.activation = activation;
  a.gate_stride = row_stride(gate);
  a.up_stride = row_stride(up);
  STD_TORCH_CHECK(a.gate_stride >= 0 && a.up_stride >= 0,
                  "gate and up must have a contiguous last dimension and evenly spaced rows; call .contiguous()");
  Tensor out = empty_beside(gate, gate.sizes(), gate.scalar_type());
  a.gate = gate.const_data_ptr();
  a.up = up.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.size = gate.size(gate.dim() - 1);
  a.rows = a.size > 0 ? gate.numel() / a.size : 0;
  launch(a, gate);
  return out;
}

Tensor silu_mul(Tensor gate, Tensor up) { return gated("silu_mul", Activation::kSilu, gate, up); }
Tensor gelu_tanh_mul(Tensor gate, Tensor up) { return gated("gelu_tanh_mul", Activation::kGeluTanh, gate, up); }

}  // namespace
}  // namespace sparsemm
