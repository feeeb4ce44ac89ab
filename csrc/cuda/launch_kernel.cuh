// What every launch of a general kernel needs: a grid of one dimension, and the taps as a template argument.
#pragma once

#include <type_traits>

#include "enqueue.cuh"
#include "taps.cuh"

namespace flatten::cuda {

/// A grid of one dimension, in blocks of kThreads.
template <auto kKernel, class Call>
cudaError_t launch_kernel(const Call& call, std::int64_t blocks, std::size_t shared_bytes,
                          cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return enqueue<kKernel>(static_cast<unsigned>(blocks), kThreads, shared_bytes, call, stream);
}

/// The K of the kernel that takes calls of size k. Of 16-bit types most calls go to tensor-core kernels: one
/// general kernel has all sizes, and the library builds faster.
template <class T>
constexpr int kernel_taps(int k) {
  return sizeof(T) == 2 ? kRuntimeTaps : k;
}

template <class T, class F>
cudaError_t with_taps(const Taps& taps, F&& launch) {
  if constexpr (!std::is_same_v<T, double>) {
    switch (taps_case<T>(taps)) {
      case 3:
        return launch(std::integral_constant<int, 3>());
      case 5:
        return launch(std::integral_constant<int, 5>());
      case 7:
        return launch(std::integral_constant<int, 7>());
    }
  }
  return launch(std::integral_constant<int, kAnyTaps>());
}

}  // namespace flatten::cuda
