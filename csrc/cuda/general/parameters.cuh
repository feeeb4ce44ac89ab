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
#pragma unroll 8
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

/// Blocks of 32 outputs each, but key_bias's are larger by four or more, in this order.
struct ParameterBlocks {
  std::int64_t scale = 0, key_bias = 0, taps = 0;

  __host__ __device__ ParameterBlocks(const ParameterCall& call) {
    const auto blocks = [](std::int64_t outputs) { return (outputs + kSumColumns - 1) / kSumColumns; };
    const int kernels = call.per_channel ? call.plan.channels : call.plan.head_dim;
    if (call.grad_scale.data) scale = blocks(call.plan.channels);
    if (call.grad_key_bias.data) {
      const std::int64_t outputs = static_cast<std::int64_t>(call.keys) * call.plan.channels;
      const int by_four = 4 * kSumColumns * kSumStripes / (call.key_bias_stripes ? call.key_bias_stripes : 1);
      key_bias = call.key_bias_stripes ? (outputs + by_four - 1) / by_four : blocks(outputs);
    }
    if (call.grad_weight.data || call.grad_bias.data) {
      taps = blocks(static_cast<std::int64_t>(call.taps + 1) * kernels);
    }
  }
  __host__ __device__ std::int64_t total() const { return scale + key_bias + taps; }
};

/// key_bias's gradient at four adjacent channels a thread. Stripe y of the block's `key_bias_stripes` takes
/// the pairs y, y + stripes, ..; the stripes are added in order.
template <class T>
__device__ void sum_four_of_key_bias(const ParameterCall& call, std::int64_t block) {
  using A = Acc<T>;
  __shared__ A sums[kSumStripes][4][kSumColumns];
  const Plan& plan = call.plan;
  const int stripes = call.key_bias_stripes, group = threadIdx.y / stripes, stripe = threadIdx.y % stripes;
  const std::int64_t outputs = static_cast<std::int64_t>(call.keys) * plan.channels;
  const std::int64_t output = ((block * (kSumStripes / stripes) + group) * kSumColumns + threadIdx.x) * 4;
  A total[4] = {};
  if (output < outputs) {
    const int local = static_cast<int>(output / plan.channels),
              channel = static_cast<int>(output % plan.channels);
    const auto add = [&](const T* from) {
      A x[4];
      load_pack<4>(from, x);
#pragma unroll
      for (int c = 0; c < 4; ++c) total[c] += x[c];
    };
    const auto pixel = [&](int window) {
      return reader<T>(call.grad_key, 0, true).row(plan.map.at(window, local)) + channel;
    };
    if (plan.windows == 1) {
      const T* from = pixel(0);
#pragma unroll 8
      for (std::int64_t image = stripe; image < call.pairs; image += stripes) {
        add(from + image * call.grad_key.batch_stride);
      }
    } else {
#pragma unroll 8
      for (int pair = stripe; pair < call.pairs; pair += stripes) {
        const int image = pair / plan.windows;
        add(pixel(pair - image * plan.windows) + image * call.grad_key.batch_stride);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) sums[threadIdx.y][c][threadIdx.x] = total[c];
  __syncthreads();
  if (stripe != 0 || output >= outputs) return;
  for (int other = 1; other < stripes; ++other) {
#pragma unroll
    for (int c = 0; c < 4; ++c) total[c] += sums[threadIdx.y + other][c][threadIdx.x];
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) store_parameter<T>(call.grad_key_bias, output + c, total[c]);
}

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
  if (block < blocks.key_bias && call.key_bias_stripes) return sum_four_of_key_bias<T>(call, block);
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
        // 32 bits: each chunk and head left a partial gradient, and a 64-bit division takes long.
        const unsigned chunk = static_cast<unsigned>(row) / shared_by,
                       head = static_cast<unsigned>(row) % shared_by;
        return partials[static_cast<std::int64_t>(chunk) * (call.taps + 1) * call.taps_channels +
                        head * kernels];
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
