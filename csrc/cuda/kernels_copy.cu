#include "copy.cuh"
#include "launch.cuh"
#include "select.cuh"

namespace sparsemm::cuda {

const char* select_device(int device) {
  const cudaError_t status = cudaSetDevice(device);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

const char* launch_compact(const CompactArgs& args, void* stream) {
  enqueue_compact(args, stream);
  return launch_status();
}

const char* launch_append(const AppendArgs& args, void* stream) {
  enqueue_append(args, stream);
  return launch_status();
}

const char* launch_select(const SelectArgs& args, void* stream) {
  enqueue_select(args, stream);
  return launch_status();
}

}  // namespace sparsemm::cuda
