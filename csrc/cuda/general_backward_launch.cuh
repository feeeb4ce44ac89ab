// Launches of the general backward for one dtype, but for its last kernel; general_backward_*.cu instantiate
// one.
#pragma once

#include "general_backward.cuh"
#include "launch_kernel.cuh"

namespace flatten::cuda::general {

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

}  // namespace flatten::cuda::general
