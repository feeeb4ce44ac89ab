// All gradients of a window in one launch and one block: backward_query.cuh's pass, then backward_key.cuh's.
//
// dS and dm go from the registers of the first to the fragments of the second, and grad_out of the whole
// window stays in shared memory for the taps, in raster order with a pixel of zeros behind.
#pragma once

#include "backward_key.cuh"
#include "backward_query.cuh"

namespace flatten::cuda::tensorcore {

template <int kHeadDim, int kTaps>
struct WindowGradientTraits {
  static constexpr int kStages = 1;  // several blocks, or at least many warps, hide what one waits for
  using Layout = BackwardLayout<kHeadDim, kStages>;
  using Rows = KeyGradientTraits<kHeadDim, kTaps>;

  static constexpr __host__ __device__ int shared_bytes(int channels, int groups, bool per_channel,
                                                        int keys) {
    const int slices = channels / kSliceChannels, warps = slices * groups;
    int work = Layout::tile_bytes(channels, groups) + (kTaps ? (keys + 1) * Rows::pixel_bytes(channels) : 0);
    const int sums = TapGradient<__nv_bfloat16, kTaps>::floats(warps) * 4;
    if (work < sums) work = sums;
    return Rows::taps_bytes(channels, per_channel) + Layout::fixed_bytes(channels, groups) + work;
  }
};

/// Adds the gradients of the taps over the patch of columns x0 and on, alone: the registers of key_pass hold
/// no sums of them beside all else.
template <typename T, int kHeadDim, int kTaps, int kStages, typename Grads>
__device__ __forceinline__ void tap_pass(const BackwardBlock<kHeadDim, kStages>& block,
                                         const KeyGradientParams& params, const Window& window, int x0,
                                         Grads& grads, TapGradient<T, kTaps>& taps) {
  const WindowGrid& grid = params.grid;
  const Lane& lane = block.lane;
  const int x = x0 + lane.g, column = window.column(grid, min(x, grid.window_w - 1));
  const char* value = static_cast<const char*>(params.value.data) + window.image * params.value.image +
                      block.first_channel() * 2;
  const uint32_t value_row = block.block_row(lane.index / 8, 0);
  for (int y = 0; y < grid.window_h; y += kStepRows) {
    unrolled<4>([&](auto r) {
      const bool inside = x < grid.window_w && y + r < grid.window_h;
      const int64_t token = window.row(grid, min(y + r, grid.window_h - 1)) + column;
      copy_async(block.tile + r * 512, value + token * params.value.token, inside ? 16 : 0);
    });
    copy_async_commit();
    PixelRows<kTaps> pixels;
    grads.point(y, pixels);
    copy_async_wait<0>();
    __syncwarp();
    taps.add_slice(pixels, value_row, lane);
    __syncwarp();
  }
}

/// grad_out of the window, whole.
struct ResidentGrads {
  const WindowGrid& grid;
  const Lane& lane;
  uint32_t pixels, zeros;  // at the slice's first channel
  int pixel_bytes, left;   // left: of the patch's input

  __device__ __forceinline__ ResidentGrads(const WindowGrid& grid, const Lane& lane, uint32_t shared,
                                           int pixel_bytes, int slice)
      : grid(grid), lane(lane), pixels(shared + slice * kSliceChannels * 2), pixel_bytes(pixel_bytes) {
    zeros = pixels + grid.window_h * grid.window_w * pixel_bytes;
    keep(pixels), keep(zeros);
  }

  /// Eight pixels of a row at once; the groups of warps share them.
  __device__ __forceinline__ void load(const TokenArray& grads, const Window& window, int slice, int group,
                                       int groups) {
    const int vector = lane.index / 8 * 16;
    const char* from = static_cast<const char*>(grads.data) + window.image * grads.image +
                       slice * kSliceChannels * 2 + vector;
    for (int x = group * 8 + lane.index % 8; x < grid.window_w; x += groups * 8) {
      const int column = window.column(grid, x);
      uint32_t to = pixels + x * pixel_bytes + vector;
      for (int y = 0; y < grid.window_h; ++y, to += grid.window_w * pixel_bytes) {
        copy_async<0, 0>(to, from + static_cast<int64_t>(window.row(grid, y) + column) * grads.token);
      }
    }
    copy_async(zeros + vector, from, lane.index % 8 == 0 && group == 0 ? 0 : -1);
    copy_async_commit();
  }

  __device__ __forceinline__ void begin_step(int) const {}
  template <int kTaps>
  __device__ __forceinline__ void point(int y, PixelRows<kTaps>& rows) const {
    rows.point_window(pixels, zeros, pixel_bytes, grid.window_w, grid.window_h, left, y - kTaps / 2, lane);
  }
};

template <typename T, int kHeadDim, int kTaps, int kMode>
__global__ void __launch_bounds__(kBackwardThreads)
    backward_window(const __grid_constant__ WindowGradientParams params) {
#if __CUDA_ARCH__ >= 800
  using Traits = WindowGradientTraits<kHeadDim, kTaps>;
  extern __shared__ __align__(128) unsigned char shared[];
  const KeyGradientParams& keys = params.key;
  const int channels = keys.channels, groups = keys.patches;
  unsigned char* tap_table = shared;
  const BackwardBlock<kHeadDim, Traits::kStages> block(
      shared + Traits::Rows::taps_bytes(channels, keys.per_channel), channels, groups);
  const Lane& lane = block.lane;
  const Window window(keys.grid, blockIdx.x), query_window(params.query.grid, blockIdx.x);
  ResidentGrads grads(keys.grid, lane, shared_address(block.rest), Traits::Rows::pixel_bytes(channels),
                      block.slice);
  if constexpr (kTaps > 0) grads.load(keys.grad_out, window, block.slice, block.group, groups);

  load_inverse_scale<T>(block.inverse_scale, params.query.focus, channels);
  const float* state = params.query.state + static_cast<int64_t>(blockIdx.x) * channels * (kHeadDim + 1);
  for (int c = threadIdx.x; c < channels; c += blockDim.x) block.mean[c] = state[channels * kHeadDim + c];
  const int tap_rows = Traits::Rows::tap_rows(channels, keys.per_channel);
  const int kernels = keys.per_channel ? channels : kHeadDim;
  if constexpr (kTaps > 0) {
    TapTable<kTaps>::template load<T, true>(tap_table, keys.weight, Floats{nullptr, false}, tap_rows,
                                            kernels);
  }
  const LaneTaps<kTaps> lane_taps(tap_table, tap_rows, block.slice * kSliceChannels % tap_rows, lane);
  if (block.group == 0) {
    StateGradient<T, kHeadDim> s;
    s.load_matrix(state, block.slice, lane);
    s.template pack<true>(block);
  }
  __syncthreads();
  if (block.group == 0) block.template pack_mean<T, true>();
  __syncthreads();

  SliceGroup group(block.exchange, block.group, groups, block.slice, block.slices);
  float scale_sum[8] = {};
  {
    StateGradient<T, kHeadDim> sum;
    query_pass<T, kHeadDim, kMode>(block, group, params.query, query_window, 0, params.query.queries, sum,
                                   scale_sum);
    float4* staging =
        reinterpret_cast<float4*>(block.tiles + block.slice * StateGradient<T, kHeadDim>::kBytes);
    for (int other = 1; other < groups; ++other) {
      __syncthreads();
      if (block.group == other) sum.send(staging, lane.index);
      __syncthreads();
      if (block.group == 0) sum.receive(staging, lane.index);
    }
    __syncthreads();
    if (block.group == 0) {
      sum.scale(params.query.inverse_keys);
      sum.template pack<false>(block);
      sum.store_mean(block.mean, block.slice, lane);
    }
  }
  __syncthreads();
  if (block.group == 0) block.template pack_mean<T, false>();
  __syncthreads();

  TapGradient<T, kTaps> taps;
  const int width = keys.grid.window_w, stride = groups * kPatchColumns;
  for (int x0 = block.group * kPatchColumns; x0 < width; x0 += stride) {
    grads.left = x0 - kTaps / 2;
    key_pass<T, kHeadDim, kTaps, kMode, false>(block, group, keys, window, x0, 0, keys.grid.window_h, grads,
                                               lane_taps, taps, scale_sum);
    group.barrier();
  }
  if (keys.scale_partials) {
    store_scale(keys.scale_partials + static_cast<int64_t>(blockIdx.x) * channels, block.scale_sums,
                block.inverse_scale, scale_sum, block.slice * kSliceChannels, block.group, groups, lane);
  }
  if constexpr (kTaps > 0) {
    if (!keys.tap_partials) return;
    for (int x0 = block.group * kPatchColumns; x0 < width; x0 += stride) {
      grads.left = x0 - kTaps / 2;
      tap_pass<T, kHeadDim, kTaps>(block, keys, window, x0, grads, taps);
    }
    taps.store(keys.tap_partials + static_cast<int64_t>(blockIdx.x) * TapGradient<T, kTaps>::kSums * kernels,
               reinterpret_cast<float*>(block.tiles), block.slices, groups, kernels, lane);
  }
#endif
}

}  // namespace flatten::cuda::tensorcore
