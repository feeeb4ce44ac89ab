// The launches of the general kernels, by element type: the units (units.txt) instantiate them, one or a few
// each, which keeps their compile times short.
#pragma once

#include <type_traits>

#include "../enqueue.cuh"
#include "backward.cuh"
#include "backward_key.cuh"
#include "conv.cuh"
#include "forward.cuh"
#include "launch_by_head.cuh"
#include "parameters.cuh"
#include "reduce.cuh"
#include "taps.cuh"

namespace flatten::cuda::general {

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
  const int kernel = taps_case<T>(taps);
  if (kernel == kAnyTaps) return launch(std::integral_constant<int, kAnyTaps>());
  if constexpr (!std::is_same_v<T, double>) {
    if (kernel == 3) return launch(std::integral_constant<int, 3>());
    if (kernel == 5) return launch(std::integral_constant<int, 5>());
    if (kernel == 7) return launch(std::integral_constant<int, 7>());
  }
  return cudaErrorInvalidValue;  // taps_case() knows no other
}

// Forward.

template <class T>
cudaError_t launch_forward(const ForwardCall& call, cudaStream_t stream) {
  using A = Acc<T>;
  using Shared = ForwardShared<A>;
  const Plan& plan = call.plan;
  const std::int64_t pairs = call.params.geometry.batch * plan.windows;
  cudaError_t error = launch_kernel<sum_keys<T>>(call, pairs * call.keys.groups * call.keys.chunks,
                                                 Shared::keys(plan) * sizeof(A), stream);
  if (error == cudaSuccess && call.keys.chunks > 1) {
    const PartialSums<A> sums{static_cast<A*>(call.state), static_cast<const A*>(call.partials), plan.state(),
                              call.keys.chunks, A(plan.inverse_keys)};
    error = launch_kernel<sum_partials<A>>(sums, pairs * sums.blocks_per_pair(), 0, stream);
  }
  if (error != cudaSuccess || call.state_only) return error;
  return with_taps<T>(call.params.taps, [&](auto taps) {
    constexpr int K = decltype(taps)::value;
    return launch_kernel<attend<T, kernel_taps<T>(K)>>(
        call, pairs * call.queries.groups * call.queries.chunks,
        Shared::template queries<K>(plan, call.queries.tiling) * sizeof(A), stream);
  });
}

template <class T>
cudaError_t launch_small(const ForwardCall& call, cudaStream_t stream) {
  using A = Acc<T>;
  return with_taps<T>(call.params.taps, [&](auto taps) {
    constexpr int K = decltype(taps)::value;
    const Plan& plan = call.plan;
    return launch_kernel<attend_small<T, kernel_taps<T>(K)>>(
        call, call.params.geometry.batch * plan.windows * call.keys.groups,
        ForwardShared<A>::template small<K>(plan, call.queries.tiling) * sizeof(A), stream);
  });
}

// Backward.

/// By the taps' size: an instantiation unit may leave some of them to another (extern template).
template <class T, int K>
cudaError_t launch_key_taps(const BackwardCall& call, cudaStream_t stream) {
  using A = Acc<T>;
  const Plan& plan = call.plan;
  const std::int64_t blocks = call.params.geometry.batch * plan.windows * call.keys.groups * call.keys.chunks;
  const auto shared = BackwardShared<A>::template key<K>(plan, call.keys.tiling) * sizeof(A);
  return launch_kernel<gradient_of_key<T, kernel_taps<T>(K)>>(call, blocks, shared, stream);
}

template <class T>
cudaError_t launch_key_gradient(const BackwardCall& call, cudaStream_t stream) {
  return with_taps<T>(call.params.taps,
                      [&](auto taps) { return launch_key_taps<T, decltype(taps)::value>(call, stream); });
}

template <class T>
cudaError_t launch_backward(const BackwardCall& call, cudaStream_t stream) {
  using A = Acc<T>;
  using Shared = BackwardShared<A>;
  const Plan& plan = call.plan;
  const AttentionBackward& params = call.params;
  const std::int64_t pairs = params.geometry.batch * plan.windows;
  const std::int64_t query_blocks = pairs * call.queries.groups * call.queries.chunks;
  cudaError_t error =
      launch_kernel<sum_queries<T>>(call, query_blocks, Shared::sums(plan) * sizeof(A), stream);
  // The sums over chunks ride on the launch of gradient_of_query, which does not need them.
  const std::int64_t sum_blocks =
      call.queries.chunks > 1 ? pairs * partial_sums<A>(call).blocks_per_pair() : 0;
  const bool want_query = params.grad_query.data || call.scale_partials;
  if (error == cudaSuccess) {
    error = launch_kernel<gradient_of_query<T>>(call, sum_blocks + (want_query ? query_blocks : 0),
                                                Shared::query(plan) * sizeof(A), stream);
  }
  if (error != cudaSuccess || !(params.grad_key.data || params.grad_value.data || call.scale_partials)) {
    return error;
  }
  return launch_key_gradient<T>(call, stream);
}

// The convolution alone, the gradients of its taps, and those of all parameters.

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
  return noted(cudaGetLastError(), __PRETTY_FUNCTION__);
}

}  // namespace flatten::cuda::general
