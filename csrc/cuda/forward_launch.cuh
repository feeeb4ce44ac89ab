// The forward kernels of one element type and head dimension, behind plain functions: what an instantiation
// unit (forward_*.cu) gives to forward.cpp.
#pragma once

#include "enqueue.cuh"
#include "forward_output.cuh"
#include "forward_state.cuh"

namespace flatten::cuda::tensorcore {

template <typename T, int kHeadDim, int kMode>
struct Forward {
  static int state_shared(int channels, int groups) {
    return StateTraits<T, kHeadDim>::shared_bytes(channels, groups);
  }

  static cudaError_t state(const StateParams& params, int chunks, int windows, cudaStream_t stream) {
    const int threads = params.groups * params.channels / kSliceChannels * 32;
    return enqueue<forward_state<T, kHeadDim, kMode>>(
        dim3(chunks, windows), threads, state_shared(params.channels, params.groups), params, stream);
  }

  static int output_shared(int taps, int channels, int patches, bool per_channel) {
    switch (taps) {
      case 3:
        return OutputTraits<T, kHeadDim, 3>::shared_bytes(channels, patches, per_channel);
      case 5:
        return OutputTraits<T, kHeadDim, 5>::shared_bytes(channels, patches, per_channel);
      case 7:
        return OutputTraits<T, kHeadDim, 7>::shared_bytes(channels, patches, per_channel);
      default:
        return OutputTraits<T, kHeadDim, 0>::shared_bytes(channels, patches, per_channel);
    }
  }

  static cudaError_t output(const OutputParams& params, int taps, dim3 grid, cudaStream_t stream) {
    const int threads = params.patches * params.channels / OutputTraits<T, kHeadDim, 0>::kWarpChannels * 32;
    const int shared = output_shared(taps, params.channels, params.patches, params.per_channel);
    switch (taps) {
      case 3:
        return enqueue<forward_output<T, kHeadDim, 3, kMode>>(grid, threads, shared, params, stream);
      case 5:
        return enqueue<forward_output<T, kHeadDim, 5, kMode>>(grid, threads, shared, params, stream);
      case 7:
        return enqueue<forward_output<T, kHeadDim, 7, kMode>>(grid, threads, shared, params, stream);
      default:
        return enqueue<forward_output<T, kHeadDim, 0, kMode>>(grid, threads, shared, params, stream);
    }
  }

  static constexpr ForwardKernels kKernels = {state_shared, state, output_shared, output};
};

}  // namespace flatten::cuda::tensorcore
