// dk, dv and the gradients of the taps: one block to a (strip of columns, run of rows, window), as
// forward_output.cuh.
//
//   dv = f w dS + mirrored taps over grad_out      r = (v dS^T + dm) f, from which dk (row_gradient.cuh)
// where dS and dm are the gradients of S and m over M, and T = w . r = f (v . (w dS) + w . dm).
#pragma once

#include "row_gradient.cuh"
#include "row_loader.cuh"
#include "state_gradient.cuh"
#include "tap_gradient.cuh"

namespace flatten::cuda::tensorcore {

template <int kHeadDim, int kTaps>
struct KeyGradientTraits {
  // One where memory or registers are short.
  static constexpr int kStages = kHeadDim >= 64 || kTaps == 7 ? 1 : 2;
  using Layout = BackwardLayout<kHeadDim, kStages>;
  static constexpr int kSlices = 1;  // slices of a warp, for RowLoader
  // Whether the taps' gradients are summed in the pass over the keys. With heads of 64 the 26 sums of 5 x 5
  // taps and bias would not fit in a lane's registers beside it, so they are summed in a pass of their own
  // afterwards.
  static constexpr bool kSumsTaps = sums_taps(kTaps);
  static constexpr bool kTapsAlong = kTaps == 3 || (kTaps == 5 && kHeadDim <= 32);
  static constexpr int kHalo = kTaps / 2;
  // The ring of grad_out in blocks of four pixel rows: what a step reads, and one block in flight. A pixel is
  // an odd number of 16-byte vectors: eight of them in a row lie in different banks.
  static constexpr int kReadBlocks = (kStepRows + 2 * kHalo + kStepRows - 1) / kStepRows;
  static constexpr int kRingBlocks = kReadBlocks + 1;
  static constexpr __host__ __device__ int pitch(int patches) { return patches * kPatchColumns + 2 * kHalo; }
  static constexpr __host__ __device__ int pixel_bytes(int channels) { return channels * 2 + 16; }

  static constexpr __host__ __device__ int tap_rows(int channels, bool per_channel) {
    return per_channel ? channels : kHeadDim < 32 ? 32 : kHeadDim;
  }
  static constexpr __host__ __device__ int taps_bytes(int channels, bool per_channel) {
    return TapTable<kTaps>::bytes(tap_rows(channels, per_channel));
  }
  static constexpr __host__ __device__ int ring_bytes(int channels, int patches) {
    return kTaps ? kRingBlocks * kStepRows * pitch(patches) * pixel_bytes(channels) : 0;
  }
  static constexpr __host__ __device__ int shared_bytes(int channels, int patches, bool per_channel) {
    const int warps = channels / kSliceChannels * patches;
    const int work = Layout::tile_bytes(channels, patches) + ring_bytes(channels, patches) +
                     taps_bytes(channels, per_channel);
    const int sums = kSumsTaps ? TapGradient<__nv_bfloat16, kTaps>::floats(warps) * 4 : 0;
    return Layout::fixed_bytes(channels, patches) + (work > sums ? work : sums);
  }
};

/// Computes the gradients of rows y0 to y_end of the patch that begins at column x0. All warps call
/// grads.begin_step(y) before a step, which waits for the grad_out of that step; grads.point(y, pixels) tells
/// where it lies. The block holds dS and dm. kSumTaps: also adds the gradients of the taps to `taps`.
template <typename T, int kHeadDim, int kTaps, bool kSumTaps, int kStages, bool kShort, typename Grads,
          int kTapsToSum, typename Sums>
__device__ __forceinline__ void key_pass(const BackwardBlock<kHeadDim, kStages, kShort>& block,
                                         SliceGroup& group, const KeyGradientParams& params,
                                         const Window& window, int x0, int y0, int y_end, Grads& grads,
                                         const LaneTaps<kTaps>& lane_taps, TapGradient<T, kTapsToSum>& taps,
                                         Sums& scale_sums) {
  using Layout = BackwardLayout<kHeadDim, kStages>;
  constexpr int kPartners = Layout::kPartners;
  const Lane& lane = block.lane;
  const WindowGrid& grid = params.grid;
  const float* inverse_scale = block.inverse_scale(block.slice) + 8 * lane.t;
  const float* mean = block.mean(block.slice) + 8 * lane.t;

  // k and v: pixels in column g of the patch, rows r of the step. Beyond the window the last k is repeated, v
  // is zero.
  const bool patch_inside = x0 < grid.window_w;
  int width = grid.window_w;
  keep(width);
  const int x = x0 + lane.g, token_x = window.column(grid, min(x, width - 1));
  int y_stop = x < width ? y_end : y0;  // the lane's rows end here
  if (grid.raster) y_stop = min(y_stop, (params.tokens - x + grid.map_w - 1) / grid.map_w);
  const auto base = [&](const TokenArray& x, int channel) { return block.base(x, window.image, channel); };
  const auto find = [&](int (&token)[4], int y) {
    int last_row = grid.window_h - 1;
    keep(last_row);
#pragma unroll
    for (int r = 0; r < 4; ++r)
      token[r] = min(window.row(grid, min(y + r, last_row)) + token_x, params.tokens - 1);
  };
  int token[4], stage = 0;
  const auto load = [&](int at, int y) {
    const char *key = base(params.key, 8 * lane.t), *value = base(params.value, 8 * lane.t);
    find(token, y);
    unrolled<4>([&](auto r) {
      copy_async<r * 512, 0>(block.tile + at, key + static_cast<int64_t>(token[r]) * params.key.token);
      copy_async(block.tile + at + Layout::kSecond + r * 512,
                 value + static_cast<int64_t>(token[r]) * params.value.token, y + r < y_stop ? 16 : 0);
    });
    copy_async_commit();
  };
  if (patch_inside) load(stage, y0);
  const Focus<T, 1, kRuntimeMode> focus(params.focus, inverse_scale, group, lane);
  for (int y = y0; y < y_end; y += kStepRows) {
    copy_async_wait<0>();
    grads.begin_step(y);
    if (!patch_inside) continue;

    const uint32_t key_tile = block.tile + stage;
    const auto bias = [&] {  // computed where it is used, so that it takes no registers in between
      int row = y;
      keep_if<kShort>(row);
      return LaneBias{params.focus.key_bias,  params.channels,
                      block.first_channel(),  row * grid.window_w + x0 + lane.g,
                      params.window_keys - 1, grid.window_w};
    };
    TileWords<1> own;
    float own_room;
    const Norms norms = focus.pack(key_tile, bias(), [&](const float (&powers)[1][4][8]) {
      own_room = pack_powers<T, kPartners>(own.words, powers, group, lane);
      if constexpr (kPartners > 1) store_tile(block.tile + Layout::kShared, own.words[0]);
    });
    const auto w = block.tiles_of_head(own);
    const bool own_inside = y + lane.t < y_stop;
    // In fp16 w carries the factor own_room, and r, dS and dm carry 1 / own_unscale.
    const float own_unroom = kNarrow<T> ? __fdividef(1.0f, own_room) : 1.0f;
    const float own_unscale = kNarrow<T> ? __fdividef(1.0f, block.template state_scale<T>()) : 1.0f;
    const float own_factor = own_inside ? phi_factor(norms) * own_unscale : 0.0f;
    constexpr bool kGatherAnew = kShort || kHeadDim > 32;  // the taps need the registers in between
    float factor[4];
    int out[4];  // tokens
#pragma unroll
    for (int r = 0; r < 4; ++r) out[r] = token[r];
    if (kStages > 1 && y + kStepRows < y_end) load(stage ^ Layout::kTile, y + kStepRows);

    // dv and the taps, two n-blocks at a time. dot[r] is the part of T that the lane's channels of token g +
    // 8r give.
    float dot[4];
    {
      float d[2][4];
      times<T, 1>(d, own, block.mean_block());
#pragma unroll
      for (int r = 0; r < 4; ++r) dot[r] = d[r / 2][r % 2 * 2] + d[r / 2][r % 2 * 2 + 1];
    }
    const uint32_t value_row = block.block_row(lane.index / 8, 0) + stage + Layout::kSecond;
    PixelRows<kTaps> pixels;
    if constexpr (kTaps > 0) {
      grads.point(y, pixels);
      if constexpr (kSumTaps) {
        if (params.tap_partials) {
          taps.add_slice(pixels, value_row, lane);
          pixels.advance(-64);
        }
      }
    }
    if (!kGatherAnew) quad_gather(factor, own_factor * own_unroom);
#pragma unroll 1
    for (int pair = 0; pair < 2; ++pair) {
      if (kGatherAnew) quad_gather(factor, own_factor * own_unroom);
      uint32_t word[2][4];
      unrolled<2>([&](auto half) {
        if constexpr (kPartners > 2) __syncwarp();  // one half after the other takes fewer registers
        const int b = 2 * pair + half;
        float o[2][4];
        times<T, kPartners>(o, w, block.row_block(b));
        uint32_t v[4];
        load_matrix_x4<0>(v, value_row ^ (b * 16));
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float* two = &o[r / 2][r % 2 * 2];
          const float2 v_pair = Pair<T>::unpack(v[r]);
          dot[r] = fmaf(v_pair.x, two[0], fmaf(v_pair.y, two[1], dot[r]));
          two[0] *= factor[r], two[1] *= factor[r];
        }
        if constexpr (kTaps > 0) {
          convolve<T, kTaps, half * 16>(o, pixels, lane_taps.address + b * lane_taps.step);
        }
#pragma unroll
        for (int r = 0; r < 4; ++r)
          word[half][r] = Pair<T>::pack(o[r / 2][r % 2 * 2], o[r / 2][r % 2 * 2 + 1]);
      });
      if (kShort) find(out, y);
      const bool odd = lane.t % 2;  // neighbouring lanes swap a word, so that they write whole sectors
      char* to_value =
          const_cast<char*>(base(params.grad_value, pair * 16 + lane.t % 2 * 8 + lane.t / 2 * 4));
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t other = shuffle_xor<1>(odd ? word[0][r] : word[1][r]);
        store_if(y + r < y_stop, to_value + static_cast<int64_t>(out[r]) * params.grad_value.token,
                 make_uint2(odd ? other : word[0][r], odd ? word[1][r] : other));
      }
      pixels.advance(32);
    }

    // dk.
    const auto plus = [](float2 a, float2 b) { return float2{a.x + b.x, 0.0f}; };
    const float total = group.exchange({quad_sum(dot, lane.t) * own_unroom, 0.0f}, lane.index, plus).x;
    if (kGatherAnew || kNarrow<T>) quad_gather(factor, own_factor);
    RowTerms terms(factor, own_factor, own_inside ? total : 0.0f, norms);
    const auto v = block.tiles_in_order(value_row);
    uint32_t k[4][4];
    unrolled<4>([&](auto r) { load_shared<r * 512>(k[r], key_tile); });
    const auto product = [&](auto b, float (&r)[2][4]) {
      const float2 m = *reinterpret_cast<const float2*>(mean + 2 * b);
      const float start[2][4] = {{m.x, m.y, m.x, m.y}, {m.x, m.y, m.x, m.y}};
      times<T, kPartners>(r, v, block.column_block(b), start);
    };
    gradient_rows<T, (kPartners <= 2)>(k, bias(), inverse_scale, params.focus, terms, scale_sums, product);
    char* to_key = const_cast<char*>(base(params.grad_key, 8 * lane.t));
    if (kShort) find(out, y);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (y + r < y_stop) {
        *reinterpret_cast<uint4*>(to_key + static_cast<int64_t>(out[r]) * params.grad_key.token) =
            make_uint4(k[r][0], k[r][1], k[r][2], k[r][3]);
      }
    }
    if constexpr (kStages > 1) {
      stage ^= Layout::kTile;
    } else if (y + kStepRows < y_end) {
      if (kPartners > 1) group.barrier();
      __syncwarp();
      load(stage, y + kStepRows);
    }
  }
}

/// The gradients of the taps alone, over the same pixels and with the same `grads`.
template <typename T, int kHeadDim, int kTaps, int kStages, bool kShort, typename Grads>
__device__ __forceinline__ void tap_pass(const BackwardBlock<kHeadDim, kStages, kShort>& block,
                                         const KeyGradientParams& params, const Window& window, int x0,
                                         int y0, int y_end, Grads& grads, TapGradient<T, kTaps>& taps) {
  const WindowGrid& grid = params.grid;
  const Lane& lane = block.lane;
  const bool patch_inside = x0 < grid.window_w;
  const int x = x0 + lane.g, column = window.column(grid, min(x, grid.window_w - 1));
  const char* value = static_cast<const char*>(params.value.data) + window.image * params.value.image +
                      block.first_channel() * 2;
  int tile = 0;
  const auto load = [&](int y) {
    unrolled<4>([&](auto r) {
      const bool inside = x < grid.window_w && y + r < y_end;
      const int64_t token = window.row(grid, min(y + r, grid.window_h - 1)) + column;
      copy_async(block.tile + tile + r * 512, value + token * params.value.token, inside ? 16 : 0);
    });
    copy_async_commit();
  };
  __syncwarp();
  if (patch_inside) load(y0);
  for (int y = y0; y < y_end; y += kStepRows) {
    copy_async_wait<0>();
    grads.begin_step(y);
    if (!patch_inside) continue;
    __syncwarp();
    const uint32_t value_row = block.block_row(lane.index / 8, 0) + tile;
    tile ^= BackwardLayout<kHeadDim, kStages>::kTile;
    if (y + kStepRows < y_end) load(y + kStepRows);
    PixelRows<kTaps> pixels;
    grads.point(y, pixels);
    taps.add_slice(pixels, value_row, lane);
  }
}

/// grad_out in a ring of rows.
template <typename Traits>
struct RingGrads {
  RowLoader<Traits> loader;
  uint32_t pixel;
  int pixel_bytes, row_bytes, y_end, matrix;
  // The block of the ring that holds the step's first row; begin_step moves it on.
  int block = Traits::kRingBlocks - 1;

  template <typename Block>
  __device__ __forceinline__ RingGrads(const KeyGradientParams& params, const Window& window, int x0, int y0,
                                       int y_end, const Block& block)
      : loader(params.grad_out, params.grid, window, params.channels, params.patches,
               shared_address(block.rest), x0, y_end, block.slice * kSliceChannels, block.group, block.lane),
        pixel_bytes(Traits::pixel_bytes(params.channels)),
        row_bytes(Traits::pitch(params.patches) * pixel_bytes),
        y_end(y_end),
        matrix(block.lane.index / 8) {
    pixel = shared_address(block.rest) + (block.group * kPatchColumns + block.lane.index % 8) * pixel_bytes +
            block.slice * kSliceChannels * 2;
    if constexpr (Traits::kHalo > 0) {
      for (int i = 0; i < Traits::kReadBlocks; ++i) loader.load_block(y0 - Traits::kHalo + i * kStepRows, i);
    }
  }

  __device__ __forceinline__ void begin_step(int y) {
    __syncthreads();  // now grad_out of this step is visible, and no warp reads the step before any more
    const int free = block;
    block = block + 1 < Traits::kRingBlocks ? block + 1 : 0;
    if (Traits::kHalo > 0 && y + kStepRows < y_end) {
      loader.load_block(y - Traits::kHalo + Traits::kReadBlocks * kStepRows, free);
    }
  }
  template <int kTaps>
  __device__ __forceinline__ void point(int, PixelRows<kTaps>& pixels) const {
    pixels.template point<Traits::kRingBlocks>(pixel, pixel_bytes, row_bytes, block, matrix);
  }
};

template <typename T, int kHeadDim, int kTaps>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    backward_key(const __grid_constant__ KeyGradientParams params) {
  using Traits = KeyGradientTraits<kHeadDim, kTaps>;
  constexpr bool kTapsAlong = Traits::kTapsAlong;
  extern __shared__ __align__(128) unsigned char shared[];
  const int channels = params.channels;
  const BackwardBlock<kHeadDim, Traits::kStages> block(shared, channels, params.patches);
  unsigned char* tap_table = block.rest + Traits::ring_bytes(channels, params.patches);
  const Lane& lane = block.lane;
  const WindowGrid& grid = params.grid;
  const Window window(grid, blockIdx.z);
  const int patch = block.group;
  const int x0 = blockIdx.x * params.patches * kPatchColumns, y0 = blockIdx.y * params.rows;
  const int y_end = min(y0 + params.rows, grid.window_h);
  RingGrads<Traits> grads(params, window, x0, y0, y_end, block);

  load_inverse_scale<T>(block, params.focus);
  const float* state = params.state_gradient + static_cast<int64_t>(blockIdx.z) * channels * (kHeadDim + 1);
  const int tap_rows = Traits::tap_rows(channels, params.per_channel);
  const int kernels = params.per_channel ? channels : kHeadDim;
  if constexpr (kTaps > 0) {
    TapTable<kTaps>::template load<T, true>(tap_table, params.weight, Floats{nullptr, false}, tap_rows,
                                            kernels);
  }
  const LaneTaps<kTaps> lane_taps(tap_table, tap_rows, block.slice * kSliceChannels % tap_rows, lane);
  load_state<T, false>(block, state);

  SliceGroup group(block.exchange, patch, block.slice, block.slices);
  TapGradient<T, kTapsAlong ? kTaps : 0> along;
  RegisterSums scale_sums(nullptr);
  key_pass<T, kHeadDim, kTaps, kTapsAlong>(block, group, params, window, x0 + patch * kPatchColumns, y0,
                                           y_end, grads, lane_taps, along, scale_sums);
  const int64_t row = (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  if (params.scale_partials) {
    const Lane anew;  // recomputed too, rather than held in registers all along
    const int thread = threadIdx.x, group = thread / channels,
              slice = (thread - group * channels) / kSliceChannels;
    store_scale(params.scale_partials + row * channels, block, scale_sums, slice, group, params.patches,
                anew);
  }
  if constexpr (Traits::kSumsTaps) {
    if (!params.tap_partials) return;
    const auto store = [&](const TapGradient<T, kTaps>& taps) {
      taps.store(params.tap_partials + row * TapGradient<T, kTaps>::kSums * kernels,
                 reinterpret_cast<float*>(block.tiles), block.slices, params.patches, kernels, lane);
    };
    if constexpr (kTapsAlong) {
      store(along);
    } else {
      __syncthreads();  // the ring and the tiles are free
      TapGradient<T, kTaps> behind;
      RingGrads<Traits> grads(params, window, x0, y0, y_end, block);
      tap_pass<T>(block, params, window, x0 + patch * kPatchColumns, y0, y_end, grads, behind);
      store(behind);
    }
  }
}

}  // namespace flatten::cuda::tensorcore
