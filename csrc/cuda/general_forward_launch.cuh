// Launches of the general forward for one dtype; each general_forward_*.cu and general_small_*.cu
// instantiates one, which keeps their compile times short.
#pragma once

#include "general_calls.h"
#include "general_forward.cuh"
#include "launch_kernel.cuh"
#include "reduce.cuh"

namespace flatten::cuda::general {

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

}  // namespace flatten::cuda::general
