// The one-launch window kernels of one element type, head dimension and mode, behind plain functions.
#pragma once

#include "enqueue.cuh"
#include "forward_window.cuh"

namespace flatten::cuda::tensorcore {

template <typename T, int kHeadDim, int kMode>
struct WindowLaunch {
  static int shared_bytes(int taps, int channels, int keys, bool per_channel) {
    using Traits = WindowTraits<T, kHeadDim>;
    const int rows = Traits::tap_rows(channels, per_channel);
    const int table = taps == 5 ? TapTable<5>::bytes(rows) : taps == 3 ? TapTable<3>::bytes(rows) : 0;
    return Traits::shared_bytes(table, channels, keys);
  }

  template <int kTaps>
  static cudaError_t launch_taps(const WindowParams& params, int windows, cudaStream_t stream) {
    const int keys = params.grid.window_h * params.grid.window_w;
    const int shared = shared_bytes(kTaps, params.channels, keys, params.per_channel);
    return enqueue<forward_window<T, kHeadDim, kTaps, kMode>>(dim3(windows), params.channels, shared, params,
                                                              stream);
  }

  static cudaError_t launch(const WindowParams& params, int taps, int windows, cudaStream_t stream) {
    switch (taps) {
      case 3:
        return launch_taps<3>(params, windows, stream);
      case 5:
        return launch_taps<5>(params, windows, stream);
      default:
        return launch_taps<0>(params, windows, stream);
    }
  }

  static constexpr WindowKernels kKernels = {shared_bytes, launch};
};

}  // namespace flatten::cuda::tensorcore
