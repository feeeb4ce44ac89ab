// A launch with dynamic shared memory beyond 48 KiB.
#pragma once

#include <cuda_runtime.h>

namespace flatten::cuda::tensorcore {

template <typename Params>
cudaError_t launch_tensorcore(void (*kernel)(Params), dim3 grid, int threads, int shared,
                              const Params& params, cudaStream_t stream) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, shared, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace flatten::cuda::tensorcore
