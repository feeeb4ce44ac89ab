// The backward kernels of one element type and head dimension, behind plain functions: what an
// instantiation unit (backward_*.cu) gives to backward.cpp.
#pragma once

#include "backward_key.cuh"
#include "backward_query.cuh"
#include "enqueue.cuh"

namespace flatten::cuda::tensorcore {

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
    switch (taps) {
      case 3:
        return KeyGradientTraits<kHeadDim, 3>::shared_bytes(channels, patches, per_channel);
      case 5:
        return KeyGradientTraits<kHeadDim, 5>::shared_bytes(channels, patches, per_channel);
      case 7:
        return KeyGradientTraits<kHeadDim, 7>::shared_bytes(channels, patches, per_channel);
      default:
        return KeyGradientTraits<kHeadDim, 0>::shared_bytes(channels, patches, per_channel);
    }
  }

  static cudaError_t key(const KeyGradientParams& params, int taps, dim3 grid, cudaStream_t stream) {
    const int threads = params.patches * params.channels;
    const int shared = key_shared(taps, params.channels, params.patches, params.per_channel);
    switch (taps) {
      case 3:
        return enqueue<backward_key<T, kHeadDim, 3>>(grid, threads, shared, params, stream);
      case 5:
        return enqueue<backward_key<T, kHeadDim, 5>>(grid, threads, shared, params, stream);
      case 7:
        if constexpr (kHeadDim <= 32) {
          return enqueue<backward_key<T, kHeadDim, 7>>(grid, threads, shared, params, stream);
        }
        return cudaErrorInvalidValue;  // never asked for, see takes()
      default:
        return enqueue<backward_key<T, kHeadDim, 0>>(grid, threads, shared, params, stream);
    }
  }

  static constexpr BackwardKernels kKernels = {query_shared, query, key_shared, key};
};

}  // namespace flatten::cuda::tensorcore
