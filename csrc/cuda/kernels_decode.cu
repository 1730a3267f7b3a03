#include "decode.cuh"
#include "launch.cuh"

namespace sparsemm::cuda {

const char* decode_resident_ctas(Dtype dtype, int head_dim, int* count) {
  int device = 0, processors = 0, per_processor = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  dispatch_rows(dtype, head_dim, [&](auto zero, auto dim) {
    using T = decltype(zero);
    constexpr int kDim = decltype(dim)::value;
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, decode_kernel<T, kDim>, kDecodeThreads,
                                                           sizeof(DecodeShared<T, kDim>));
  });
  if (status != cudaSuccess) return cudaGetErrorString(status);
  *count = processors * (per_processor > 0 ? per_processor : 1);
  return nullptr;
}

const char* launch_decode(const DecodeArgs& args, void* stream) {
  dispatch_rows(args.dtype, args.head_dim,
                [&](auto zero, auto dim) { enqueue_decode<decltype(zero), decltype(dim)::value>(args, stream); });
  return launch_status();
}

}  // namespace sparsemm::cuda
