// The launches of the kernels with a warp for each head (by_head.h).
#pragma once

#include "../enqueue.cuh"
#include "backward_by_head.cuh"
#include "forward_by_head.cuh"

namespace flatten::cuda::general {

/// One block for each chunk of each window's tiles.
template <auto kKernel, class Call>
cudaError_t launch_by_head(const Call& call, const HeadSide& side, std::int64_t shared_bytes,
                           cudaStream_t stream) {
  const std::int64_t blocks = call.params.geometry.batch * call.plan.windows * side.chunks;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return enqueue<kKernel>(static_cast<unsigned>(blocks), call.plan.heads * 32,
                          static_cast<std::size_t>(shared_bytes), call, stream);
}

/// f with the size of the taps, 0 where there are none, as a constant.
template <class F>
cudaError_t with_head_taps(const Taps& taps, F&& f) {
  if (!taps) return f(std::integral_constant<int, 0>());
  if (taps.kernel_h == 3) return f(std::integral_constant<int, 3>());
  if (taps.kernel_h == 5) return f(std::integral_constant<int, 5>());
  return cudaErrorInvalidValue;  // takes_by_head() lets no other pass
}

/// S and m of every window, or their gradients, from the partial ones.
template <class T, class Call>
cudaError_t sum_head_partials(const Call& call, const HeadSide& side, float* to, const float* partials,
                              cudaStream_t stream) {
  if (side.chunks == 1) return cudaSuccess;
  const Plan& plan = call.plan;
  const PartialSums<T> sums{to, partials, plan.state(), side.chunks, static_cast<T>(plan.inverse_keys)};
  const std::int64_t blocks = call.params.geometry.batch * plan.windows * sums.blocks_per_pair();
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return enqueue<sum_partials<T>>(static_cast<unsigned>(blocks), kThreads, 0, sums, stream);
}

template <class T>
cudaError_t launch_head_state(const HeadForward& call, cudaStream_t stream) {
  const cudaError_t error = launch_by_head<state_by_head<T>>(
      call, call.keys, head_shared_bytes(kStateShared, call.plan.heads), stream);
  return error == cudaSuccess ? sum_head_partials<T>(call, call.keys, call.state, call.partials, stream)
                              : error;
}

template <class T>
cudaError_t launch_head_output(const HeadForward& call, cudaStream_t stream) {
  return with_head_taps(call.params.taps, [&](auto taps) {
    constexpr int K = decltype(taps)::value;
    return launch_by_head<output_by_head<T, K>>(call, call.queries,
                                                head_shared_bytes(output_shared(K), call.plan.heads), stream);
  });
}

template <class T>
cudaError_t launch_head_backward(const HeadBackward& call, cudaStream_t stream) {
  if (!call.attention) return launch_head_key_gradient<T>(call, stream);
  cudaError_t error = launch_by_head<grad_state_by_head<T>>(
      call, call.queries, head_shared_bytes(kGradStateShared, call.plan.heads), stream);
  if (error == cudaSuccess) {
    error = sum_head_partials<T>(call, call.queries, call.grad_state, call.grad_partials, stream);
  }
  if (error == cudaSuccess && (call.params.grad_query.data || call.scale_partials)) {
    error = launch_by_head<grad_query_by_head<T>>(
        call, call.queries, head_shared_bytes(kGradQueryShared, call.plan.heads), stream);
  }
  const bool wants_keys =
      call.params.grad_key.data || call.params.grad_value.data || call.scale_partials || call.taps_partials;
  return error == cudaSuccess && wants_keys ? launch_head_key_gradient<T>(call, stream) : error;
}

template <class T>
cudaError_t launch_head_key_gradient(const HeadBackward& call, cudaStream_t stream) {
  return with_head_taps(call.params.taps, [&](auto taps) {
    constexpr int K = decltype(taps)::value;
    return launch_by_head<grad_key_by_head<T, K>>(call, call.keys, grad_key_shared_bytes(call.params),
                                                  stream);
  });
}

}  // namespace flatten::cuda::general
