// Launches of the convolution kernels for one dtype; each general_conv_*.cu instantiates one.
#pragma once

#include "general_conv.cuh"
#include "launch_kernel.cuh"
#include "parameters.cuh"

namespace flatten::cuda::general {

template <class T>
cudaError_t launch_conv(const ConvCall& call, cudaStream_t stream) {
  return with_taps<T>(call.taps, [&](auto taps) {
    constexpr int K = decltype(taps)::value;
    const std::int64_t blocks = call.batch * call.plan.windows * call.tiling.tiles * column_blocks(call.plan);
    const std::size_t elements = kTileElements + taps_elements<K, Acc<T>>(call.tiling.log_width);
    return launch_kernel<convolve_tiles<T, K>>(call, blocks, elements * sizeof(Acc<T>), stream);
  });
}

template <class T>
cudaError_t launch_taps(const TapsCall& call, cudaStream_t stream) {
  return with_taps<T>(call.taps, [&](auto taps) {
    constexpr int K = decltype(taps)::value;
    std::size_t elements = 0;
    if constexpr (K != kAnyTaps) {
      elements = std::max(halo_elements<K, Acc<T>>(call.tiling.log_width), TapGradient<T, K>::kScratch);
    }
    return launch_kernel<sum_taps<T, K>>(call,
                                         static_cast<std::int64_t>(call.chunks) * column_blocks(call.plan),
                                         elements * sizeof(Acc<T>), stream);
  });
}

template <class T>
cudaError_t launch_parameters(const ParameterCall& call, cudaStream_t stream) {
  const ParameterBlocks blocks(call);
  if (blocks.total() == 0) return cudaSuccess;
  sum_parameters<T>
      <<<static_cast<unsigned>(blocks.total()), dim3(kSumColumns, kSumStripes), 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace flatten::cuda::general
