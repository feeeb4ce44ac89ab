// The last launch of a backward pass: gradients of scale, key_bias, taps and bias as ordered sums.
#pragma once

#include "plan.h"

namespace flatten::cuda::general {

inline constexpr int kSumColumns = 32, kSumStripes = 16;

/// Adds value(row) over rows: thread (x, y) takes rows y, y + 16, ..., then stripe 0 adds the stripes in
/// order. All threads of the block call it.
template <class A, class F>
__device__ A sum_rows(std::int64_t rows, bool active, F&& value) {
  __shared__ A stripes[kSumStripes][kSumColumns];
  A total = 0;
  if (active) {
#pragma unroll 4
    for (std::int64_t row = threadIdx.y; row < rows; row += kSumStripes) total += value(row);
  }
  stripes[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  total = 0;
  if (threadIdx.y == 0) {
    for (int y = 0; y < kSumStripes; ++y) total += stripes[y][threadIdx.x];
  }
  return total;
}

/// Blocks of 32 outputs each, in this order.
struct ParameterBlocks {
  std::int64_t scale = 0, key_bias = 0, taps = 0;

  __host__ __device__ ParameterBlocks(const ParameterCall& call) {
    const auto blocks = [](std::int64_t outputs) { return (outputs + kSumColumns - 1) / kSumColumns; };
    const int kernels = call.per_channel ? call.plan.channels : call.plan.head_dim;
    if (call.grad_scale.data) scale = blocks(call.plan.channels);
    if (call.grad_key_bias.data) {
      key_bias = blocks(static_cast<std::int64_t>(call.keys) * call.plan.channels);
    }
    if (call.grad_weight.data || call.grad_bias.data) {
      taps = blocks(static_cast<std::int64_t>(call.taps + 1) * kernels);
    }
  }
  __host__ __device__ std::int64_t total() const { return scale + key_bias + taps; }
};

template <class T>
__global__ void __launch_bounds__(kSumColumns* kSumStripes)
    sum_parameters(const __grid_constant__ ParameterCall call) {
  using A = Acc<T>;
  const Plan& plan = call.plan;
  const ParameterBlocks blocks(call);
  std::int64_t block = blockIdx.x;
  const auto output = [&] { return block * kSumColumns + threadIdx.x; };
  if (block < blocks.scale) {
    const A* partials = static_cast<const A*>(call.scale_partials) + output();
    const bool active = output() < plan.channels;
    const A total =
        sum_rows<A>(call.scale_rows, active, [&](std::int64_t row) { return partials[row * plan.channels]; });
    if (active && threadIdx.y == 0) store_parameter<T>(call.grad_scale, output(), total);
    return;
  }
  block -= blocks.scale;
  if (block < blocks.key_bias) {
    const bool active = output() < static_cast<std::int64_t>(call.keys) * plan.channels;
    const int local = static_cast<int>(output() / plan.channels);
    const int channel = static_cast<int>(output() % plan.channels);
    const A total = sum_rows<A>(call.pairs, active, [&](std::int64_t pair) {
      const Reader<T> in = reader<T>(call.grad_key, pair / plan.windows, false);
      return widen(in.row(plan.map.at(static_cast<int>(pair % plan.windows), local))[channel]);
    });
    if (active && threadIdx.y == 0) store_parameter<T>(call.grad_key_bias, output(), total);
    return;
  }
  block -= blocks.key_bias;
  const int kernels = call.per_channel ? plan.channels : plan.head_dim,
            shared_by = call.taps_channels / kernels;
  const bool active = output() < static_cast<std::int64_t>(call.taps + 1) * kernels;
  const int tap = static_cast<int>(output() / kernels), kernel = static_cast<int>(output() % kernels);
  const A* partials = static_cast<const A*>(call.taps_partials) +
                      static_cast<std::int64_t>(tap) * call.taps_channels + kernel;
  const A total =
      sum_rows<A>(static_cast<std::int64_t>(call.taps_chunks) * shared_by, active, [&](std::int64_t row) {
        const std::int64_t chunk = row / shared_by, head = row % shared_by;
        return partials[chunk * (call.taps + 1) * call.taps_channels + head * kernels];
      });
  if (!active || threadIdx.y != 0) return;
  if (tap < call.taps) {
    if (call.grad_weight.data) {
      store_parameter<T>(call.grad_weight, static_cast<std::int64_t>(kernel) * call.taps + tap, total);
    }
  } else if (call.grad_bias.data) {
    store_parameter<T>(call.grad_bias, kernel, total);
  }
}

}  // namespace flatten::cuda::general
