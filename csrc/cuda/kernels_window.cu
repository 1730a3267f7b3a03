#include "launch.cuh"
#include "window.cuh"

namespace sparsemm::cuda {

const char* launch_window_scores(const WindowArgs& args, void* stream) {
  dispatch_rows(args.dtype, args.head_dim,
                [&](auto zero, auto dim) { enqueue_window_scores<decltype(zero), decltype(dim)::value>(args, stream); });
  return launch_status();
}

}  // namespace sparsemm::cuda
