// All gradients of a window in one launch and one block: backward_query.cuh's pass, then backward_key.cuh's.
//
// dS and dm take the place of S and m between the two, and grad_out of the whole window stays in shared
// memory for the taps, in raster order with a pixel of zeros behind.
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

/// The parts of the kernel, one after the other. Each makes a block and a window of its own: what it knows of
/// them takes no registers in another.
template <typename T, int kHeadDim, int kTaps, int kMode, bool kOneGroup>
class WindowGradient {
 public:
  __device__ __forceinline__ WindowGradient(const WindowGradientParams& params, unsigned char* shared)
      : params_(params), keys_(params.key), shared_(shared) {}

  /// Brings what all parts need to shared memory. grad_out may still be on its way.
  __device__ __forceinline__ void load() const {
    const Block block = this->block();
    if constexpr (kTaps > 0) {
      grads(block).load(keys_.grad_out, window(keys_.grid), block.slice, block.group, groups());
      TapTable<kTaps>::template load<T, true>(shared_, keys_.weight, Floats{nullptr, false}, tap_rows(),
                                              kernels());
    }
    load_inverse_scale<T>(block.inverse_scale, params_.query.focus, channels());
    const int64_t state_size = static_cast<int64_t>(channels()) * (kHeadDim + 1);
    load_state<T, true>(block, params_.query.state + blockIdx.x * state_size);
  }

  /// dq. Leaves dS and dm where S and m were.
  __device__ __forceinline__ void queries(float (&scale_sum)[8]) const {
    const Block block = this->block();
    SliceGroup group = this->group(block);
    StateGradient<T, kHeadDim> sum;
    query_pass<T, kHeadDim, kMode>(block, group, params_.query, window(params_.query.grid), 0,
                                   params_.query.queries, sum, scale_sum);
    sum.add_groups(block);
    __syncthreads();
    if (block.group == 0) {
      sum.scale(params_.query.inverse_keys);
      sum.pack(block);
      sum.store_mean(block.mean, block.slice, block.lane);
    }
    __syncthreads();
    if (block.group == 0) block.template pack_mean<T, false>();
    __syncthreads();
  }

  /// dk, dv, and the partial gradient of scale.
  __device__ __forceinline__ void keys(float (&scale_sum)[8]) const {
    const Block block = this->block();
    SliceGroup group = this->group(block);
    const LaneTaps<kTaps> lane_taps(shared_, tap_rows(), block.slice * kSliceChannels % tap_rows(),
                                    block.lane);
    TapGradient<T, 0> none;
    for_each_patch(block, [&](const Window& window, int x0, ResidentGrads& grads) {
      key_pass<T, kHeadDim, kTaps, kMode, false>(block, group, keys_, window, x0, 0, keys_.grid.window_h,
                                                 grads, lane_taps, none, scale_sum);
      group.barrier();
    });
    if (keys_.scale_partials) {
      store_scale(keys_.scale_partials + static_cast<int64_t>(blockIdx.x) * channels(), block.scale_sums,
                  block.inverse_scale, scale_sum, block.slice * kSliceChannels, block.group, groups(),
                  block.lane);
    }
  }

  /// The partial gradients of the taps.
  __device__ __forceinline__ void taps() const {
    if (!keys_.tap_partials) return;
    const Block block = this->block();
    TapGradient<T, kTaps> sums;
    for_each_patch(block, [&](const Window& window, int x0, ResidentGrads& grads) {
      tap_pass<T>(block, keys_, window, x0, 0, keys_.grid.window_h, grads, sums);
    });
    const int64_t row = static_cast<int64_t>(blockIdx.x) * TapGradient<T, kTaps>::kSums;
    sums.store(keys_.tap_partials + row * kernels(), reinterpret_cast<float*>(block.tiles), block.slices,
               groups(), kernels(), block.lane);
  }

 private:
  __device__ __forceinline__ int channels() const { return keys_.channels; }
  __device__ __forceinline__ int groups() const { return kOneGroup ? 1 : keys_.patches; }  // of warps

  using Traits = WindowGradientTraits<kHeadDim, kTaps>;
  using Block = BackwardBlock<kHeadDim, Traits::kStages>;

  __device__ __forceinline__ int tap_rows() const {
    return Traits::Rows::tap_rows(channels(), keys_.per_channel);
  }
  __device__ __forceinline__ int kernels() const { return keys_.per_channel ? channels() : kHeadDim; }

  __device__ __forceinline__ Block block() const {
    return Block(shared_ + Traits::Rows::taps_bytes(channels(), keys_.per_channel), channels(), groups());
  }
  __device__ __forceinline__ SliceGroup group(const Block& block) const {
    return SliceGroup(block.exchange, block.group, groups(), block.slice, block.slices);
  }
  static __device__ __forceinline__ Window window(const WindowGrid& grid) {
    int index = blockIdx.x;
    keep(index);
    return Window(grid, index);
  }
  __device__ __forceinline__ ResidentGrads grads(const Block& block) const {
    return ResidentGrads(keys_.grid, block.lane, shared_address(block.rest),
                         Traits::Rows::pixel_bytes(channels()), block.slice);
  }

  /// pass(window, x0, grads) for the patches that the warp's group has.
  template <typename Pass>
  __device__ __forceinline__ void for_each_patch(const Block& block, Pass pass) const {
    const Window window = this->window(keys_.grid);
    ResidentGrads grads = this->grads(block);
    for (int x0 = block.group * kPatchColumns; x0 < keys_.grid.window_w; x0 += groups() * kPatchColumns) {
      grads.left = x0 - kTaps / 2;
      pass(window, x0, grads);
    }
  }

  const WindowGradientParams& params_;
  const KeyGradientParams& keys_;
  unsigned char* shared_;
};

/// kThreads: of a block, at most.
template <typename T, int kHeadDim, int kTaps, int kMode, int kThreads>
__global__ void __launch_bounds__(kThreads)
    backward_window(const __grid_constant__ WindowGradientParams params) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr bool kOneGroup = kThreads > kBackwardThreads;  // of so many channels
  const WindowGradient<T, kHeadDim, kTaps, kMode, kOneGroup> gradient(params, shared);
  float scale_sum[8] = {};
  gradient.load();
  gradient.queries(scale_sum);
  gradient.keys(scale_sum);
  if constexpr (kTaps > 0) gradient.taps();
#endif
}

}  // namespace flatten::cuda::tensorcore
