#include "fused.cuh"
#include "launch.cuh"

namespace sparsemm::cuda {

const char* launch_norm(const NormArgs& args, void* stream) {
  dispatch_dtype(args.dtype, [&](auto zero) { enqueue_norm<decltype(zero)>(args, stream); });
  return launch_status();
}

const char* launch_rope(const RopeArgs& args, void* stream) {
  dispatch_dtype(args.dtype, [&](auto zero) { enqueue_rope<decltype(zero)>(args, stream); });
  return launch_status();
}

const char* launch_gated(const GatedArgs& args, void* stream) {
  dispatch_dtype(args.dtype, [&](auto zero) { enqueue_gated<decltype(zero)>(args, stream); });
  return launch_status();
}

}  // namespace sparsemm::cuda
