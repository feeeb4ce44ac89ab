// The launches of the tensor-core kernels of one element type and head dimension, behind plain functions:
// what a unit (units.txt) gives to the host code (forward.cpp, backward.cpp).
#pragma once

#include <limits>
#include <type_traits>

#include "../enqueue.cuh"
#include "backward_key.cuh"
#include "backward_query.cuh"
#include "backward_window.cuh"
#include "forward_output.cuh"
#include "forward_state.cuh"
#include "forward_window.cuh"

namespace flatten::cuda::tensorcore {

/// f with the taps as a constant, if they are one of kSizes (0: no taps); `otherwise` if not.
template <int... kSizes, class R, class F>
R with_taps(int taps, R otherwise, F&& f) {
  R result = otherwise;
  (void)((taps == kSizes && (result = f(std::integral_constant<int, kSizes>()), true)) || ...);
  return result;
}

/// More than any device has: what a kernel takes that does not exist.
constexpr int kNoSharedMemory = std::numeric_limits<int>::max();

template <typename T, int kHeadDim, int kMode>
struct Forward {
  static int state_shared(int channels, int groups, bool biased) {
    return StateTraits<T, kHeadDim>::shared_bytes(channels, groups, biased);
  }

  static cudaError_t state(const StateParams& params, int chunks, int windows, cudaStream_t stream) {
    const int threads = params.groups * params.channels / kSliceChannels * 32;
    return enqueue<forward_state<T, kHeadDim, kMode>>(
        dim3(chunks, windows), threads,
        state_shared(params.channels, params.groups, params.focus.key_bias.data != nullptr), params, stream);
  }

  static int output_shared(int taps, int channels, int patches, bool per_channel) {
    return with_taps<0, 3, 5, 7>(taps, kNoSharedMemory, [&](auto k) {
      return OutputTraits<T, kHeadDim, k>::shared_bytes(channels, patches, per_channel);
    });
  }

  static cudaError_t output(const OutputParams& params, int taps, dim3 grid, cudaStream_t stream) {
    const int threads = params.patches * params.channels / OutputTraits<T, kHeadDim, 0>::kWarpChannels * 32;
    const int shared = output_shared(taps, params.channels, params.patches, params.per_channel);
    return with_taps<0, 3, 5, 7>(taps, cudaErrorInvalidValue, [&](auto k) {
      return enqueue<forward_output<T, kHeadDim, k, kMode>>(grid, threads, shared, params, stream);
    });
  }

  static constexpr ForwardKernels kKernels = {state_shared, state, output_shared, output};
};

template <typename T, int kHeadDim, int kMode>
struct WindowLaunch {
  static int shared_bytes(int taps, int channels, int keys, bool per_channel) {
    using Traits = WindowTraits<T, kHeadDim>;
    const int rows = Traits::tap_rows(channels, per_channel);
    const int table = with_taps<3, 5>(taps, 0, [&](auto k) { return TapTable<k>::bytes(rows); });
    return Traits::shared_bytes(table, channels, keys);
  }

  static cudaError_t launch(const WindowParams& params, int taps, int windows, cudaStream_t stream) {
    const int keys = params.grid.window_h * params.grid.window_w;
    const int shared = shared_bytes(taps, params.channels, keys, params.per_channel);
    return with_taps<0, 3, 5>(taps, cudaErrorInvalidValue, [&](auto k) {
      return enqueue<forward_window<T, kHeadDim, k, kMode>>(windows, params.channels, shared, params, stream);
    });
  }

  static constexpr WindowKernels kKernels = {shared_bytes, launch};
};

template <typename T, int kHeadDim>
struct Backward {
  static int query_shared(int channels, int groups) {
    return QueryGradientTraits<kHeadDim>::shared_bytes(channels, groups);
  }

  static cudaError_t query(const QueryGradientParams& params, int chunks, int windows, cudaStream_t stream) {
    return enqueue<backward_query<T, kHeadDim>>(dim3(chunks, windows), params.groups * params.channels,
                                                query_shared(params.channels, params.groups), params, stream);
  }

  static int key_shared(int taps, int channels, int patches, bool per_channel) {
    return with_taps<0, 3, 5, 7>(taps, kNoSharedMemory, [&](auto k) {
      return KeyGradientTraits<kHeadDim, k>::shared_bytes(channels, patches, per_channel);
    });
  }

  static cudaError_t key(const KeyGradientParams& params, int taps, dim3 grid, cudaStream_t stream) {
    const int threads = params.patches * params.channels;
    const int shared = key_shared(taps, params.channels, params.patches, params.per_channel);
    const auto launch = [&](auto k) {
      return enqueue<backward_key<T, kHeadDim, k>>(grid, threads, shared, params, stream);
    };
    if constexpr (kHeadDim <= 32) return with_taps<0, 3, 5, 7>(taps, cudaErrorInvalidValue, launch);
    return with_taps<0, 3, 5>(taps, cudaErrorInvalidValue, launch);
  }

  static constexpr BackwardKernels kKernels = {query_shared, query, key_shared, key};
};

template <typename T, int kHeadDim, int kThreads = kBackwardThreads>
struct BackwardWindow {
  template <int kTaps>
  using Traits = WindowGradientTraits<kHeadDim, kTaps, (kThreads > kBackwardThreads)>;

  static int shared_bytes(int taps, int channels, int groups, bool per_channel, int keys) {
    return with_taps<0, 3, 5>(taps, kNoSharedMemory, [&](auto k) {
      return Traits<k>::shared_bytes(channels, groups, per_channel, keys);
    });
  }

  static cudaError_t launch(const WindowGradientParams& params, int taps, int windows, cudaStream_t stream) {
    const KeyGradientParams& p = params.key;
    const int threads = p.patches * p.channels;
    const int shared =
        shared_bytes(taps, p.channels, p.patches, p.per_channel, p.grid.window_h * p.grid.window_w);
    return with_taps<0, 3, 5>(taps, cudaErrorInvalidValue, [&](auto k) {
      return enqueue<backward_window<T, kHeadDim, k, kThreads>>(windows, threads, shared, params, stream);
    });
  }

  static constexpr WindowGradientKernels kKernels = {shared_bytes, launch};
};

}  // namespace flatten::cuda::tensorcore
