// torch.ops.sparsemm.* on CUDA: checks, device guard, workspaces, current stream, kernels of cuda/.
//
// The library links no CUDA part of torch, so that the same file loads under a CPU torch (where nothing calls it); the one
// function it needs from there is looked up when first used. Nothing here synchronises with the device.
#include <dlfcn.h>

#include <tuple>

#include "checks.h"
#include "cuda/args.h"
#include "registration.h"
#include "tensors.h"

namespace sparsemm {
namespace {

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// Python loads torch's libraries with local visibility, so the linker alone would not find the function in
// libtorch_cuda.so; asking that library (already loaded, never loaded by us) does.
CurrentStream find_current_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  void* found = dlsym(RTLD_DEFAULT, kName);
  for (const char* name : {"libtorch_cuda.so", "libtorch.so"}) {
    if (found != nullptr) break;
    if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(library, kName);
  }
  return reinterpret_cast<CurrentStream>(found);
}

// Makes `t`'s device current for torch and for this library's CUDA runtime, and gives torch's current stream on it.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& t) : guard_(t.get_device_index()) {
    static const CurrentStream current_stream = find_current_stream();
    STD_TORCH_CHECK(current_stream != nullptr, "this torch has no CUDA");
    STD_TORCH_CHECK(current_stream(t.get_device_index(), &stream_) == 0, "no current CUDA stream for device ",
                    t.get_device_index());
    const char* status = cuda::select_device(t.get_device_index());
    STD_TORCH_CHECK(status == nullptr, "device ", t.get_device_index(), ": ", status ? status : "");
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

void check_launch(const char* name, const char* status) {
  STD_TORCH_CHECK(status == nullptr, name, ": ", status ? status : "");
}

Dtype dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " on a GPU takes float32, float16 or bfloat16, got ",
                  torch::headeronly::toString(t.scalar_type()), "; cast the model, or use the reference backend");
  return Dtype::kFloat32;
}

// Rows are moved 16 bytes at a time.
void check_vectors(const char* name, const Tensor& t) {
  const int64_t element = static_cast<int64_t>(t.element_size()), last = t.dim() - 1;
  STD_TORCH_CHECK(t.size(last) * element % 16 == 0, name, ": rows of ", t.size(last) * element,
                  " bytes; a multiple of 16 is needed");
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < last; ++d) aligned = aligned && (t.size(d) <= 1 || t.stride(d) * element % 16 == 0);
  STD_TORCH_CHECK(aligned, name, " is not aligned to 16 bytes; call .contiguous() or .clone()");
}

void check_head_dim(int64_t head_dim) {
  STD_TORCH_CHECK(head_dim % 8 == 0 && head_dim >= 8 && head_dim <= cuda::kMaxHeadDim, "head_dim ", head_dim,
                  " must be a multiple of 8 up to ", cuda::kMaxHeadDim);
}

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// What compact and append have in common: rows of key and value [B, Hkv, T, D] that go into the flat buffers.
template <typename Args>
void set_rows(Args& a, const Tensor& key, const Tensor& value, const Tensor& key_buffer, const Tensor& value_buffer) {
  const Tensor* sources[2] = {&key, &value};
  const Tensor* targets[2] = {&key_buffer, &value_buffer};
  const int64_t element = static_cast<int64_t>(key.element_size());
  for (int which = 0; which < 2; ++which) {
    check_vectors("key and value", *sources[which]);
    check_vectors("key_buffer and value_buffer", *targets[which]);
    a.source[which] = static_cast<const char*>(sources[which]->const_data_ptr());
    a.target[which] = static_cast<char*>(targets[which]->mutable_data_ptr());
    a.stride_b[which] = sources[which]->stride(0) * element;
    a.stride_h[which] = sources[which]->stride(1) * element;
    a.stride_t[which] = sources[which]->stride(2) * element;
  }
  a.slots = key_buffer.size(0);
  a.lists = static_cast<int>(key.size(0) * key.size(1));
  a.num_kv_heads = static_cast<int>(key.size(1));
  a.row_bytes = static_cast<int>(key.size(3) * element);
}

void compact(Tensor key, Tensor value, Tensor positions, Tensor cu_kept, Tensor offsets, Tensor key_buffer,
             Tensor value_buffer) {
  check_compact(key, value, positions, cu_kept, offsets, key_buffer, value_buffer);
  cuda::CompactArgs a{};
  set_rows(a, key, value, key_buffer, value_buffer);
  a.positions = ints(positions);
  a.cu_kept = ints(cu_kept);
  a.offsets = ints(offsets);
  a.total = positions.size(0);
  a.num_columns = static_cast<int>(key.size(2));
  const DeviceScope scope(key);
  check_launch("compact", cuda::launch_compact(a, scope.stream()));
}

void append(Tensor key, Tensor value, Tensor offsets, Tensor lens, Tensor key_buffer, Tensor value_buffer,
            Tensor overflow, std::optional<Tensor> mask) {
  check_append(key, value, offsets, lens, key_buffer, value_buffer, overflow, mask);
  cuda::AppendArgs a{};
  set_rows(a, key, value, key_buffer, value_buffer);
  set_lists(a, offsets, lens, overflow, mask);
  a.num_new = static_cast<int>(key.size(2));
  const DeviceScope scope(key);
  check_launch("append", cuda::launch_append(a, scope.stream()));
}

std::tuple<Tensor, Tensor> varlen_decode(Tensor query, Tensor key_buffer, Tensor value_buffer, Tensor offsets,
                                         Tensor lens, double scale, std::optional<Tensor> num_later) {
  check_varlen_decode(query, key_buffer, value_buffer, offsets, lens, num_later);
  check_head_dim(query.size(3));
  check_vectors("query", query);
  check_vectors("key_buffer", key_buffer);
  check_vectors("value_buffer", value_buffer);
  const int64_t batch = query.size(0), num_query_heads = query.size(1), n = query.size(2), head_dim = query.size(3);
  Tensor out = empty_beside(query, {batch, num_query_heads, n, head_dim}, query.scalar_type());
  Tensor lse = empty_beside(query, {batch, num_query_heads, n}, ScalarType::Float);
  cuda::DecodeArgs a{};
  a.dtype = dtype_of("varlen_decode", query);
  if (out.numel() == 0) return {out, lse};
  a.query = query.const_data_ptr();
  a.key_buffer = key_buffer.const_data_ptr();
  a.value_buffer = value_buffer.const_data_ptr();
  a.offsets = ints(offsets);
  a.lens = ints(lens);
  a.num_later = num_later.has_value() ? ints(*num_later) : nullptr;
  a.out = out.mutable_data_ptr();
  a.lse = floats(lse);
  a.query_stride_b = query.stride(0);
  a.query_stride_h = query.stride(1);
  a.query_stride_n = query.stride(2);
  a.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(num_query_heads * batch * n <= INT32_MAX, "varlen_decode: ", num_query_heads * batch * n,
                  " queries; at most 2^31 - 1 are attended to at once");
  a.lists = static_cast<int>(lens.size(0));
  a.num_kv_heads = static_cast<int>(lens.size(0) / batch);
  a.group = static_cast<int>(num_query_heads / a.num_kv_heads);
  a.num_queries = static_cast<int>(n);
  a.head_dim = static_cast<int>(head_dim);
  const DeviceScope scope(query);
  int resident = 0;
  check_launch("varlen_decode", cuda::decode_resident_ctas(a.dtype, a.head_dim, &resident));
  cuda::set_decode_grid(a, key_buffer.size(0), resident);
  Tensor tile_begin = empty_beside(query, {a.lists + int64_t{1}}, ScalarType::Int);
  Tensor stats = empty_beside(query, {cuda::partial_stats_size(a)}, ScalarType::Float);
  Tensor partial = empty_beside(query, {cuda::partial_out_size(a)}, ScalarType::Float);
  a.tile_begin = static_cast<int32_t*>(tile_begin.mutable_data_ptr());
  a.partial_stats = floats(stats);
  a.partial_out = floats(partial);
  check_launch("varlen_decode", cuda::launch_decode(a, scope.stream()));
  return {out, lse};
}

Tensor window_scores(Tensor query, Tensor key, Tensor starts, Tensor num_queries, double scale) {
  check_window_scores(query, key, starts, num_queries);
  check_head_dim(query.size(3));
  check_vectors("query", query);
  check_vectors("key", key);
  cuda::WindowArgs a{};
  a.dtype = dtype_of("window_scores", query);
  a.batch = static_cast<int>(key.size(0));
  a.num_kv_heads = static_cast<int>(key.size(1));
  a.group = static_cast<int>(query.size(1) / key.size(1));
  a.window = static_cast<int>(query.size(2));
  a.num_columns = static_cast<int>(key.size(2));
  a.head_dim = static_cast<int>(key.size(3));
  STD_TORCH_CHECK(int64_t{a.batch} * a.num_kv_heads <= 65535, "batch times kv heads must be at most 65535, got ",
                  int64_t{a.batch} * a.num_kv_heads);
  Tensor scores = empty_beside(key, {key.size(0), key.size(1), key.size(2)}, ScalarType::Float);
  if (scores.numel() == 0) return scores;
  if (a.window == 0) return torch::stable::fill_(scores, 0.0);
  a.query = query.const_data_ptr();
  a.key = key.const_data_ptr();
  a.starts = ints(starts);
  a.num_queries = ints(num_queries);
  a.scores = floats(scores);
  a.query_stride_b = query.stride(0);
  a.query_stride_h = query.stride(1);
  a.query_stride_w = query.stride(2);
  a.key_stride_b = key.stride(0);
  a.key_stride_h = key.stride(1);
  a.key_stride_t = key.stride(2);
  a.scale = static_cast<float>(scale);
  Tensor stats = empty_beside(key, {cuda::window_stats_size(a)}, ScalarType::Float);
  Tensor lse = empty_beside(key, {cuda::window_lse_size(a)}, ScalarType::Float);
  a.stats = floats(stats);
  a.lse = floats(lse);
  const DeviceScope scope(key);
  check_launch("window_scores", cuda::launch_window_scores(a, scope.stream()));
  return scores;
}

Tensor select_rows(Tensor scores, Tensor starts, Tensor counts, int64_t window, Tensor cu_kept, int64_t total) {
  check_select_rows(scores, starts, counts, window, cu_kept, total);
  Tensor positions = empty_beside(scores, {total}, ScalarType::Int);
  const cuda::SelectArgs a{static_cast<const float*>(scores.const_data_ptr()), ints(starts), ints(counts),
                           ints(cu_kept), static_cast<int32_t*>(positions.mutable_data_ptr()), total,
                           static_cast<int>(scores.size(0)), static_cast<int>(scores.size(1)),
                           static_cast<int>(window)};
  const DeviceScope scope(scores);
  check_launch("select_rows", cuda::launch_select(a, scope.stream()));
  return positions;
}

void launch(const NormArgs& a, const Tensor& x) {
  const DeviceScope scope(x);
  check_launch("add_rms_norm", cuda::launch_norm(a, scope.stream()));
}

void launch(const RopeArgs& a, const Tensor& key) {
  const DeviceScope scope(key);
  check_launch("rope_append", cuda::launch_rope(a, scope.stream()));
}

void launch(const GatedArgs& a, const Tensor& gate) {
  const DeviceScope scope(gate);
  check_launch("a gated activation", cuda::launch_gated(a, scope.stream()));
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

SPARSEMM_DEFINE_ENTRY_POINTS("CUDA", sparsemm::kEntries)
