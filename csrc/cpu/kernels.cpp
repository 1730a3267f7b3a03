// CPU kernels over ragged rows; compiled once per instruction set with SPARSEMM_TABLE naming the table it exports.
#include "kernels.h"

#include "decode.h"
#include "fused.h"
#include "vector.h"
#include "window.h"

namespace sparsemm::cpu {
namespace {

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

void norm_rows(const NormArgs& a, int64_t begin, int64_t end) {
  SPARSEMM_DISPATCH(a.dtype, norm_rows_typed<T>(a, begin, end));
}

void rope_heads(const RopeArgs& a, int64_t begin, int64_t end) {
  SPARSEMM_DISPATCH(a.dtype, rope_heads_typed<T>(a, begin, end));
}

void gated_elements(const GatedArgs& a, int64_t begin, int64_t end) {
  SPARSEMM_DISPATCH(a.dtype, gated_elements_typed<T>(a, begin, end));
}

}  // namespace

const KernelTable& SPARSEMM_TABLE() {
  static const KernelTable table = {decode_piece, decode_finish, window_list, window_scratch,
                                    select_list,  norm_rows,     rope_heads,  gated_elements};
  return table;
}

}  // namespace sparsemm::cpu
