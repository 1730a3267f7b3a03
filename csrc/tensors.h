// Tensors as both bindings make and read them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>

namespace sparsemm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An uninitialised contiguous tensor on the device of `like`. Not by torch::stable::empty: looking an operator up by
// name takes longer than the kernels of a small model run.
inline Tensor empty_beside(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  constexpr size_t kMaxDims = 16;
  STD_TORCH_CHECK(shape.size() <= kMaxDims, "tensors of ", shape.size(), " dimensions are not supported; at most ",
                  kMaxDims, " are");
  std::array<int64_t, kMaxDims> strides{};
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device, like.get_device_index(), &made));
  return Tensor(made);
}

inline const int32_t* ints(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }

// The row lists that an operator appends to, and which of the columns [B, n] it stores.
template <typename Args>
void set_lists(Args& a, const Tensor& offsets, const Tensor& lens, const Tensor& overflow,
               const std::optional<Tensor>& mask) {
  a.offsets = ints(offsets);
  a.lens = static_cast<int32_t*>(lens.mutable_data_ptr());
  a.overflow = static_cast<int32_t*>(overflow.mutable_data_ptr());
  if (mask.has_value()) {
    a.mask = static_cast<const bool*>(mask->const_data_ptr());
    a.mask_stride_b = mask->stride(0);
    a.mask_stride_n = mask->stride(1);
  }
}

inline const void* pointer(const std::optional<Tensor>& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

}  // namespace sparsemm
