// The one-launch backward pass of one element type and head dimension, behind plain functions: what an
// instantiation unit (backward_window_*.cu) gives to backward.cpp.
#pragma once

#include "backward_window.cuh"
#include "enqueue.cuh"

namespace flatten::cuda::tensorcore {

template <typename T, int kHeadDim, int kThreads = kBackwardThreads>
struct BackwardWindow {
  template <int kTaps>
  using Traits = WindowGradientTraits<kHeadDim, kTaps, (kThreads > kBackwardThreads)>;

  static int shared_bytes(int taps, int channels, int groups, bool per_channel, int keys) {
    switch (taps) {
      case 3:
        return Traits<3>::shared_bytes(channels, groups, per_channel, keys);
      case 5:
        return Traits<5>::shared_bytes(channels, groups, per_channel, keys);
      default:
        return Traits<0>::shared_bytes(channels, groups, per_channel, keys);
    }
  }

  static cudaError_t launch(const WindowGradientParams& params, int taps, int windows, cudaStream_t stream) {
    const KeyGradientParams& p = params.key;
    const int threads = p.patches * p.channels;
    const int shared =
        shared_bytes(taps, p.channels, p.patches, p.per_channel, p.grid.window_h * p.grid.window_w);
    switch (taps) {
      case 3:
        return enqueue<backward_window<T, kHeadDim, 3, kThreads>>(windows, threads, shared, params, stream);
      case 5:
        return enqueue<backward_window<T, kHeadDim, 5, kThreads>>(windows, threads, shared, params, stream);
      default:
        return enqueue<backward_window<T, kHeadDim, 0, kThreads>>(windows, threads, shared, params, stream);
    }
  }

  static constexpr WindowGradientKernels kKernels = {shared_bytes, launch};
};

}  // namespace flatten::cuda::tensorcore
