// A kernel launch, and the dynamic shared memory that launches may ask for.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "launch_error.h"

namespace flatten::cuda {

/// Dynamic shared memory that every launch may have without asking.
constexpr std::size_t kFreeSharedBytes = 48 * 1024;

/// Lets launches of `kernel` on the current device use as much dynamic shared memory as a block may have
/// there. The limit belongs to the function, for all host threads: were it set to what one call needs, a
/// smaller call could lower it between a larger one's setting and its launch. So it is set once, to the most.
/// `allowed` is the kernel's own and has a bit for each device that this was done on.
inline cudaError_t allow_shared_memory(const void* kernel, std::atomic<std::uint64_t>& allowed) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::uint64_t bit = device < 64 ? std::uint64_t{1} << device : 0;  // beyond 64: set every time
  if (allowed.load(std::memory_order_acquire) & bit) return cudaSuccess;
  int bytes = 0;
  error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_release);
  return error;
}

/// Launches a kernel that takes one struct by value.
template <auto kKernel, class Params>
cudaError_t enqueue(dim3 grid, dim3 block, std::size_t shared_bytes, const Params& params,
                    cudaStream_t stream) {
  static std::atomic<std::uint64_t> allowed{0};
  if (shared_bytes > kFreeSharedBytes) {
    const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kKernel), allowed);
    if (error != cudaSuccess) return noted(error, __PRETTY_FUNCTION__);
  }
  kKernel<<<grid, block, shared_bytes, stream>>>(params);
  return noted(cudaGetLastError(), __PRETTY_FUNCTION__);
}

}  // namespace flatten::cuda
