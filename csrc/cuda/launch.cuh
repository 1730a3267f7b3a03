// Helpers of the launchers (kernels_*.cu).
#pragma once

#include "args.h"
#include "platform.cuh"

namespace sparsemm::cuda {

// What the last launch of this thread has to say, or null.
inline const char* launch_status() {
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace sparsemm::cuda
