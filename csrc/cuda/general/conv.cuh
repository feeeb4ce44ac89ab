// The depthwise convolution alone, and the gradients of its taps. Channels go in blocks of 32 whatever the
// heads.
#pragma once

#include "plan.h"
#include "products.cuh"
#include "taps.cuh"

namespace flatten::cuda::general {

__host__ __device__ inline int column_blocks(const Plan& plan) {
  return (plan.channels + kWidth - 1) / kWidth;
}

__device__ inline Columns flat_columns(int index, const Plan& plan) {
  return {index * kWidth, min(kWidth, plan.channels - index * kWidth)};
}

/// One tile of one window and block of columns; tokens outside the map become 0.
template <class T, int K>
__global__ void __launch_bounds__(kThreads) convolve_tiles(const __grid_constant__ ConvCall call) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  A *convolved = reinterpret_cast<A*>(shared), *scratch = convolved + kTileElements;
  const Plan& plan = call.plan;
  const int blocks = column_blocks(plan);
  const Columns columns = flat_columns(blockIdx.x % blocks, plan);
  const int tile = blockIdx.x / blocks % call.tiling.tiles;
  const std::int64_t pair = blockIdx.x / blocks / call.tiling.tiles;
  const MapWindow where{plan.map, call.tiling, static_cast<int>(pair % plan.windows)};
  const TapIndex taps{call.taps, plan.head_dim};
  const bool on_map = call.tiling.on_map(tile);
  if (on_map) {
    convolve<T, K>(convolved, scratch, reader<T>(call.in, pair / plan.windows, plan.vector), where, tile,
                   columns, taps, call.mirrored);
  }
  const Writer<T> out = writer<T>(call.out, pair / plan.windows, plan.vector);
  const int column = RowProduct<A>::column();
  for (int i = 0; i < 4; ++i) {
    const int slot = RowProduct<A>::slot(i), local = call.tiling.local(tile, slot);
    if (local < 0) continue;
    A x[4] = {};
    if (on_map) {
      load_row(convolved + slot * kRow + column, x);
      for (int c = 0; c < 4; ++c) {
        if (!call.mirrored && call.taps.bias.data && column + c < columns.width) {
          x[c] += load_parameter<T>(call.taps.bias, taps.kernel(columns.first + column + c));
        }
      }
    }
    store_four(out, plan.map.at(where.window, local), columns, column, x);
  }
}

/// The same for kernels of any size: a warp takes every fourth tap, straight from global memory.
template <class T, class F>
__device__ void sum_any_taps(const TapsCall& call, std::int64_t first, std::int64_t last, Columns columns,
                             F&& to) {
  using A = Acc<T>;
  const Plan& plan = call.plan;
  const int lane = threadIdx.x % 32;
  const int h = static_cast<int>(call.taps.kernel_h), w = static_cast<int>(call.taps.kernel_w);
  for (int tap = threadIdx.x / 32; tap <= h * w; tap += kWarps) {
    const bool bias = tap == h * w;
    const int down = bias ? 0 : tap / w - h / 2, right = bias ? 0 : tap % w - w / 2;
    A sum = 0;
    for (std::int64_t t = first; t < last; ++t) {
      const int tile = static_cast<int>(t % call.tiling.tiles);
      const std::int64_t pair = t / call.tiling.tiles;
      const MapWindow where{plan.map, call.tiling, static_cast<int>(pair % plan.windows)};
      const Reader<T> in = reader<T>(call.in, pair / plan.windows, plan.vector);
      const Reader<T> grad = reader<T>(call.grad_out, pair / plan.windows, plan.vector);
      if (!call.tiling.on_map(tile) || lane >= columns.width) continue;
      for (int slot = 0; slot < kSlots; ++slot) {
        const int y = call.tiling.tile_y(tile) + (slot >> call.tiling.log_width);
        const int x = call.tiling.tile_x(tile) + (slot & (call.tiling.tile_width() - 1));
        const int token = where.token(y, x), from = where.token(y + down, x + right);
        if (token < 0 || from < 0) continue;
        const A g = widen(grad.row(token)[columns.first + lane]);
        sum += bias ? g : g * widen(in.row(from)[columns.first + lane]);
      }
    }
    to(tap, lane, sum);
  }
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads) sum_taps(const __grid_constant__ TapsCall call) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  A* scratch = reinterpret_cast<A*>(shared);
  const Plan& plan = call.plan;
  const int blocks = column_blocks(plan);
  const Columns columns = flat_columns(blockIdx.x % blocks, plan);
  const int chunk = blockIdx.x / blocks;
  const std::int64_t first = static_cast<std::int64_t>(chunk) * call.chunk_tiles;
  const std::int64_t last = min(first + call.chunk_tiles, call.tiles);
  const std::int64_t taps = call.taps.kernel_h * call.taps.kernel_w + 1;
  const auto to = [&](int tap, int lane, A x) {
    if (lane < columns.width) {
      static_cast<A*>(call.partials)[(chunk * taps + tap) * plan.channels + columns.first + lane] = x;
    }
  };
  if constexpr (K == kAnyTaps) {
    sum_any_taps<T>(call, first, last, columns, to);
  } else {
    TapGradient<T, K> gradient;
    for (std::int64_t t = first; t < last; ++t) {
      const int tile = static_cast<int>(t % call.tiling.tiles);
      const std::int64_t pair = t / call.tiling.tiles;
      if (!call.tiling.on_map(tile)) continue;
      const MapWindow where{plan.map, call.tiling, static_cast<int>(pair % plan.windows)};
      stage_halo<T, K>(scratch, reader<T>(call.in, pair / plan.windows, plan.vector), where, tile, columns);
      gradient.add(scratch, reader<T>(call.grad_out, pair / plan.windows, plan.vector), where, tile, columns);
    }
    gradient.store(scratch, to);
  }
}

}  // namespace flatten::cuda::general
