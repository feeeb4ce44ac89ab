// All gradients of a window in one launch and one block: backward_query.cuh's pass, then backward_key.cuh's.
//
// dS and dm take the place of S and m between the two, and grad_out of the whole window stays in shared
// memory for the taps, in raster order with a pixel of zeros behind.
#pragma once

#include "backward_key.cuh"
#include "backward_query.cuh"

namespace flatten::cuda::tensorcore {

/// kWide: the block has so many channels that one group of warps takes all its threads, with few registers
/// each.
template <int kHeadDim, int kTaps, bool kWide>
struct WindowGradientTraits {
  // While one block waits, the other blocks and warps of the multiprocessor work.
  static constexpr int kStages = 1;
  using Layout = BackwardLayout<kHeadDim, kStages>;
  using Rows = KeyGradientTraits<kHeadDim, kTaps>;
  using Sums = std::conditional_t<kWide, SharedSums, RegisterSums>;

  /// Shared memory behind the block's own holds grad_out, the table of taps, and the sums for scale.
  static constexpr __host__ __device__ int grad_bytes(int channels, int keys) {
    return kTaps ? (keys + 1) * Rows::pixel_bytes(channels) : 0;
  }
  static constexpr __host__ __device__ int shared_bytes(int channels, int groups, bool per_channel,
                                                        int keys) {
    const int warps = channels / kSliceChannels * groups;
    const int work = Layout::tile_bytes(channels, groups) + grad_bytes(channels, keys) +
                     Rows::taps_bytes(channels, per_channel) + (kWide ? SharedSums::bytes(channels) : 0);
    const int sums = TapGradient<__nv_bfloat16, kTaps>::floats(warps) * 4;
    return Layout::fixed_bytes(channels, groups) + (work > sums ? work : sums);
  }
};

/// The whole window's grad_out, with a pixel of zeros behind it.
template <typename Layout, bool kShort>
struct ResidentGrads {
  const KeyGradientParams& params;
  const Lane& lane;
  uint32_t shared;
  int slice, groups;
  int left = 0;  // leftmost column of the patch's input

  /// Eight pixels of a row at once; the groups of warps share them.
  __device__ __forceinline__ void load(const Window& window, int group) {
    const WindowGrid& grid = params.grid;
    const uint32_t pixels = this->pixels();
    const int pixel_bytes = this->pixel_bytes(), vector = lane.index / 8 * 16;
    const char* from = static_cast<const char*>(params.grad_out.data) + window.image * params.grad_out.image +
                       slice * kSliceChannels * 2 + vector;
    for (int x = group * 8 + lane.index % 8; x < grid.window_w; x += groups * 8) {
      const int column = window.column(grid, x);
      uint32_t to = pixels + x * pixel_bytes + vector;
      for (int y = 0; y < grid.window_h; ++y, to += grid.window_w * pixel_bytes) {
        const int64_t token = window.row(grid, y) + column;
        copy_async<0, 0>(to, from + token * params.grad_out.token);
      }
    }
    copy_async(zeros(pixels, pixel_bytes) + vector, from, lane.index % 8 == 0 && group == 0 ? 0 : -1);
    copy_async_commit();
  }

  __device__ __forceinline__ void begin_step(int) const {}
  template <int kTaps>
  __device__ __forceinline__ void point(int y, PixelRows<kTaps>& rows) const {
    const WindowGrid& grid = params.grid;
    const uint32_t pixels = this->pixels();
    const int pixel_bytes = this->pixel_bytes();
    rows.point({pixels, zeros(pixels, pixel_bytes), pixel_bytes, grid.window_w * pixel_bytes, grid.window_w,
                grid.window_h},
               left, y - kTaps / 2, lane);
  }

 private:
  // These are computed where they are used, so that registers hold none of them in between.
  __device__ __forceinline__ uint32_t pixels() const {  // address of the slice's first channel
    int slice = this->slice, channels = params.channels;
    keep_if<kShort>(slice), keep_if<kShort>(channels);
    return shared + Layout::fixed_bytes(channels, groups) + Layout::tile_bytes(channels, groups) +
           slice * kSliceChannels * 2;
  }
  __device__ __forceinline__ int pixel_bytes() const {
    int channels = params.channels;
    keep_if<kShort>(channels);
    return KeyGradientTraits<32, 0>::pixel_bytes(channels);
  }
  __device__ __forceinline__ uint32_t zeros(uint32_t pixels, int pixel_bytes) const {
    return pixels + params.grid.window_h * pixel_bytes * params.grid.window_w;
  }
};

/// The parts of the kernel, one after the other. Each makes its own view of the block and the window, so that
/// one part's addresses take no registers in another.
template <typename T, int kHeadDim, int kTaps, bool kWide>
class WindowGradient {
  using Traits = WindowGradientTraits<kHeadDim, kTaps, kWide>;
  using Block = BackwardBlock<kHeadDim, Traits::kStages, kWide>;
  using Grads = ResidentGrads<typename Traits::Layout, kWide>;

 public:
  using Sums = typename Traits::Sums;

  __device__ __forceinline__ WindowGradient(const WindowGradientParams& params, unsigned char* shared)
      : params_(params), keys_(params.key), shared_(shared) {}

  /// Brings the data that all parts need to shared memory. Copies of grad_out may still be under way
  /// afterwards.
  __device__ __forceinline__ void load() const {
    const Block block = this->block();
    if constexpr (kTaps > 0) {
      grads(block).load(window(keys_.grid), block.group);
      TapTable<kTaps>::template load<T, true>(tap_table(block), keys_.weight, Floats{nullptr, false},
                                              tap_rows(), kernels());
    }
    load_inverse_scale<T>(block, params_.query.focus);
    const int64_t state_size = static_cast<int64_t>(channels()) * (kHeadDim + 1);
    load_state<T, true>(block, params_.query.state + blockIdx.x * state_size);
  }

  /// Clears the sums for scale.
  __device__ __forceinline__ Sums sums() const {
    return Sums(tap_table(block()) + Traits::Rows::taps_bytes(channels(), keys_.per_channel));
  }

  /// Computes dq. Leaves dS and dm where S and m were.
  __device__ __forceinline__ void queries(Sums& scale_sums) const {
    StateGradient<T, kHeadDim> sum;
    {
      const Block block = this->block();
      SliceGroup group = this->group(block);
      query_pass<T>(block, group, params_.query, window(params_.query.grid), 0, params_.query.queries, sum,
                    scale_sums);
    }
    const Block block = this->block();
    sum.finish(params_.query.inverse_keys * block.template state_scale<T>());
    sum.add_groups(block);
    __syncthreads();
    const float factor =
        block.template agree_on_scale<T>(kNarrow<T> && block.group == 0 ? sum.largest() : 0.0f);
    if (block.group == 0) {
      sum.pack(block, factor);
      sum.store_mean(block.mean(block.slice), block.lane, factor);
    }
    __syncthreads();
    if (block.group == 0) block.template pack_mean<T, false>();
    __syncthreads();
  }

  /// Computes dk, dv, and the partial gradient of scale.
  __device__ __forceinline__ void keys(Sums& scale_sums) const {
    {
      const Block block = this->block();
      SliceGroup group = this->group(block);
      const LaneTaps<kTaps> lane_taps(tap_table(block), tap_rows(), block.slice * kSliceChannels % tap_rows(),
                                      block.lane);
      TapGradient<T, 0> none;
      for_each_patch(block, [&](const Window& window, int x0, Grads& grads) {
        key_pass<T, kHeadDim, kTaps, false>(block, group, keys_, window, x0, 0, keys_.grid.window_h, grads,
                                            lane_taps, none, scale_sums);
        group.barrier();
      });
    }
    if (keys_.scale_partials) {
      const Block block = this->block();
      store_scale(keys_.scale_partials + static_cast<int64_t>(blockIdx.x) * channels(), block, scale_sums,
                  block.slice, block.group, groups(), block.lane);
    }
  }

  /// Computes the partial gradients of the taps.
  __device__ __forceinline__ void taps() const {
    if (!keys_.tap_partials) return;
    const Block block = this->block();
    TapGradient<T, kTaps> sums;
    for_each_patch(block, [&](const Window& window, int x0, Grads& grads) {
      tap_pass<T>(block, keys_, window, x0, 0, keys_.grid.window_h, grads, sums);
    });
    const int64_t row = static_cast<int64_t>(blockIdx.x) * TapGradient<T, kTaps>::kSums;
    sums.store(keys_.tap_partials + row * kernels(), reinterpret_cast<float*>(block.tiles), block.slices,
               groups(), kernels(), block.lane);
  }

 private:
  __device__ __forceinline__ int channels() const { return keys_.channels; }
  __device__ __forceinline__ int groups() const { return kWide ? 1 : keys_.patches; }  // groups of warps

  __device__ __forceinline__ int tap_rows() const {
    return Traits::Rows::tap_rows(channels(), keys_.per_channel);
  }
  __device__ __forceinline__ int kernels() const { return keys_.per_channel ? channels() : kHeadDim; }

  __device__ __forceinline__ Block block() const { return Block(shared_, channels(), groups()); }
  __device__ __forceinline__ unsigned char* tap_table(const Block& block) const {
    return block.rest + Traits::grad_bytes(channels(), keys_.grid.window_h * keys_.grid.window_w);
  }
  __device__ __forceinline__ SliceGroup group(const Block& block) const {
    return SliceGroup(block.exchange, block.group, block.slice, block.slices);
  }
  static __device__ __forceinline__ Window window(const WindowGrid& grid) {
    int index = blockIdx.x;
    keep(index);
    return Window(grid, index);
  }
  __device__ __forceinline__ Grads grads(const Block& block) const {
    return {keys_, block.lane, shared_address(shared_), block.slice, groups()};
  }

  /// Calls pass(window, x0, grads) for each patch that the warp's group has.
  template <typename Pass>
  __device__ __forceinline__ void for_each_patch(const Block& block, Pass pass) const {
    Grads grads = this->grads(block);
    for (int x0 = block.group * kPatchColumns; x0 < keys_.grid.window_w; x0 += groups() * kPatchColumns) {
      grads.left = x0 - kTaps / 2;
      pass(window(keys_.grid), x0, grads);
    }
  }

  const WindowGradientParams& params_;
  const KeyGradientParams& keys_;
  unsigned char* shared_;
};

/// kThreads: the most threads a block has.
template <typename T, int kHeadDim, int kTaps, int kThreads>
__global__ void __launch_bounds__(kThreads)
    backward_window(const __grid_constant__ WindowGradientParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr bool kWide = kThreads > kBackwardThreads;
  const WindowGradient<T, kHeadDim, kTaps, kWide> gradient(params, shared);
  gradient.load();
  auto scale_sums = gradient.sums();
  gradient.queries(scale_sums);
  gradient.keys(scale_sums);
  if constexpr (kTaps > 0) gradient.taps();
}

}  // namespace flatten::cuda::tensorcore
