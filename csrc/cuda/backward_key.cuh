// dk and dv: one block to a (strip of columns, run of rows, window), as forward_output.cuh.
//
//   dv = K dS + mirrored taps over grad_out      r = (V dS^T + dm) f, from which dk (row_gradient.cuh)
// where dS and dm are the gradients of S and m over M. The ring of rows holds grad_out.
#pragma once

#include "forward_output.cuh"
#include "row_gradient.cuh"

namespace flatten::cuda::tensorcore {

template <typename T, int kHeadDim, int kTaps>
struct KeyGradientTraits : OutputTraits<T, kHeadDim, kTaps> {
  using Base = OutputTraits<T, kHeadDim, kTaps>;
  static_assert(kHeadDim == 32, "one slice to a head");
  static constexpr int kTile = Base::kQueryBytes;
  static constexpr int kFragments =
      2 * Base::kBlocks * Base::kSlices * 512;  // of a head: dS and its transpose
  static constexpr __host__ __device__ int tile_bytes(int channels, int patches) {
    return channels / kHeadDim * patches * 3 * kTile;  // of a warp: two stages of k, one of v
  }
  static int shared_bytes(int channels, int patches, bool per_channel) {
    return Base::taps_bytes(channels, per_channel) + channels / kHeadDim * kFragments + channels * 12 +
           Base::exchange_bytes(channels, patches) + tile_bytes(channels, patches) +
           Base::ring_bytes(channels, patches);
  }
};

template <typename T, int kHeadDim, int kTaps, int kMode>
__global__ void __launch_bounds__(kBackwardThreads)
    backward_key(const __grid_constant__ KeyGradientParams params) {
#if __CUDA_ARCH__ >= 800
  using Traits = KeyGradientTraits<T, kHeadDim, kTaps>;
  constexpr int kSlices = Traits::kSlices, kBlocks = Traits::kBlocks;
  extern __shared__ __align__(128) unsigned char shared[];
  const Lane lane;
  const int channels = params.channels, heads = channels / kHeadDim;
  const int head = threadIdx.x / 32 % heads, patch = threadIdx.x / 32 / heads;
  const int head_channel = head * kHeadDim;
  const WindowGrid& grid = params.grid;
  const Window window(grid, blockIdx.z);
  const int x0 = blockIdx.x * params.patches * kPatchColumns, y0 = blockIdx.y * params.rows;
  const int y_end = min(y0 + params.rows, grid.window_h);

  // Shared memory: taps, fragments, 1 / scale, dm, sums for scale, exchange, tiles of k and v, ring of
  // grad_out.
  unsigned char* taps = shared;
  uint4* fragments = reinterpret_cast<uint4*>(taps + Traits::taps_bytes(channels, params.per_channel));
  float* inverse_scale = reinterpret_cast<float*>(fragments + heads * (Traits::kFragments / 16));
  float* mean = inverse_scale + channels;
  float* scale_sums = mean + channels;
  unsigned char* exchange = reinterpret_cast<unsigned char*>(scale_sums + channels);
  unsigned char* tiles = exchange + Traits::exchange_bytes(channels, params.patches);
  const uint32_t ring = shared_address(tiles + Traits::tile_bytes(channels, params.patches));
  fragments += head * (Traits::kFragments / 16) + lane.index;
  const uint4* transposed = fragments + kBlocks * kSlices * 32;

  RowLoader<Traits> grads(params.grad_out, grid, window, channels, params.patches, ring, x0, y_end,
                          head_channel, patch, lane);
  if constexpr (kTaps > 0) {
    for (int i = 0; i < Traits::kReadBlocks; ++i) grads.load_block(y0 - Traits::kHalo + i * kStepRows, i);
  }

  // ---- k and v: pixels in column g of the patch, rows r of the step.
  const int x = x0 + patch * kPatchColumns + lane.g;
  const bool patch_inside = x0 + patch * kPatchColumns < grid.window_w;
  const int token_x = window.column(grid, min(x, grid.window_w - 1));
  const auto base = [&](const TokenArray& tokens, int channel) {
    return static_cast<const char*>(tokens.data) + window.image * tokens.image + (head_channel + channel) * 2;
  };
  const char *key = base(params.key, 8 * lane.t), *value = base(params.value, 8 * lane.t);
  uint32_t key_tile = shared_address(tiles) + threadIdx.x / 32 * 3 * Traits::kTile + lane.index * 16;
  int other_tile = Traits::kTile;
  const uint32_t value_tile = key_tile + 2 * Traits::kTile;
  using KeyFocus = Focus<T, kSlices, kMode>;
  int token[4];
  const auto load = [&](uint32_t tile, int y) {
    unrolled<4>([&](auto r) {
      token[r] = min(window.row(grid, min(y + r, grid.window_h - 1)) + token_x, params.tokens - 1);
      copy_async<KeyFocus::offset(0, r), 0>(tile, key + static_cast<int64_t>(token[r]) * params.key.token);
      copy_async<KeyFocus::offset(0, r), 0>(value_tile,
                                            value + static_cast<int64_t>(token[r]) * params.value.token);
    });
    copy_async_commit();
  };
  load(key_tile, y0);
  int y_stop = x < grid.window_w ? y_end : y0;  // the lane's rows
  if (grid.raster) y_stop = min(y_stop, (params.tokens - x + grid.map_w - 1) / grid.map_w);

  load_inverse_scale<T>(inverse_scale, params.focus, channels);
  const float* window_state =
      params.state_gradient + static_cast<int64_t>(blockIdx.z) * channels * (kHeadDim + 1);
  const float* s = window_state + head_channel * kHeadDim;
  for (int c = threadIdx.x; c < channels; c += blockDim.x) mean[c] = window_state[channels * kHeadDim + c];
  const int tap_rows = Traits::tap_rows(channels, params.per_channel);
  if constexpr (kTaps > 0) {
    TapTable<kTaps>::template load<T, true>(taps, params.weight, Floats{nullptr, false}, tap_rows,
                                            params.per_channel ? channels : kHeadDim);
  }
  const LaneTaps<kTaps> lane_taps(taps, tap_rows, params.per_channel ? head_channel : 0, lane);
  if (patch == 0) {
    pack_matrix<T, kSlices, false>(fragments, lane, [&](int k, int n) { return s[k * kHeadDim + n]; });
    pack_matrix<T, kSlices, true>(fragments + kBlocks * kSlices * 32, lane,
                                  [&](int k, int n) { return s[n * kHeadDim + k]; });
  }

  SliceGroup group(exchange, patch, params.patches, head, heads);
  const KeyFocus focus(params.focus, inverse_scale + head_channel + 8 * lane.t, group, lane);
  const int pixel_bytes = Traits::pixel_bytes(channels),
            row_bytes = Traits::pitch(params.patches) * pixel_bytes;
  const uint32_t pixel = ring + (patch * kPatchColumns + lane.index % 8) * pixel_bytes + head_channel * 2;
  char* to_key = const_cast<char*>(base(params.grad_key, 8 * lane.t));
  char* to_value = const_cast<char*>(base(params.grad_value, lane.t % 2 * 8 + lane.t / 2 * 4));
  float scale_sum[kSlices][8] = {};
  int block = 0;  // of the ring, where the step's first row is
  for (int y = y0; y < y_end; y += kStepRows, block = block + 1 < Traits::kRingBlocks ? block + 1 : 0) {
    copy_async_wait<0>();
    __syncthreads();  // grad_out of this step is visible, and nobody reads the rows of the step before
    if (kTaps > 0 && y + kStepRows < y_end) {
      grads.load_block(y - Traits::kHalo + Traits::kReadBlocks * kStepRows,
                       block ? block - 1 : Traits::kRingBlocks - 1);
    }
    if (!patch_inside) continue;

    const LaneBias bias{params.focus.key_bias,     channels,
                        head_channel + 8 * lane.t, y * grid.window_w + x,
                        params.window_keys - 1,    grid.window_w};
    TileWords<kSlices> k, v;
    float factor[4];  // 0 for what is not there
    Norms norms;
    focus(key_tile, bias, [&](const float (&powers)[kSlices][4][8], const Norms& own) {
      norms = own;
      quad_gather(factor, phi_factor(own));
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if (y + r >= y_stop) factor[r] = 0.0f;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          k[0][r][w] = Pair<T>::pack(powers[0][r][2 * w] * factor[r], powers[0][r][2 * w + 1] * factor[r]);
        }
      }
    });
    unrolled<4>([&](auto r) { load_shared<KeyFocus::offset(0, r)>(v[0][r], value_tile); });
    int out[4];  // tokens
#pragma unroll
    for (int r = 0; r < 4; ++r) out[r] = token[r];
    if (y + kStepRows < y_end) load(key_tile + other_tile, y + kStepRows);

    // dk: r, first for its product with w.
    const float* m = mean + head_channel + 8 * lane.t;
    const auto r_block = [&](int b, float (&r)[2][4]) {
      times<T, kSlices>(r, v, transposed + b * kSlices * 32);
#pragma unroll
      for (int i = 0; i < 8; ++i) r[i / 4][i % 4] += m[b * 2 + i % 2];
    };
    float dot[4] = {};
    unrolled<kBlocks>([&](auto b) {
      float d[2][4];
      r_block(b, d);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float2 w = Pair<T>::unpack(k[0][r][b]);
        dot[r] = fmaf(w.x, d[r / 2][r % 2 * 2], fmaf(w.y, d[r / 2][r % 2 * 2 + 1], dot[r]));
      }
    });
    const auto plus = [](float2 a, float2 b) { return float2{a.x + b.x, 0.0f}; };
    const RowTerms terms(group.exchange({quad_sum(dot, lane.t), 0.0f}, lane.index, plus).x, norms);
    gradient_rows<T, kSlices, kMode>(
        key_tile, bias, inverse_scale + head_channel + 8 * lane.t, params.focus, terms, scale_sum,
        [&](int b, float (&r)[2][4]) {
          r_block(b, r);
#pragma unroll
          for (int i = 0; i < 8; ++i) r[i / 4][i % 4] *= factor[i / 2];
        },
        [&](int, int r, uint4 gradient) {
          if (y + r >= y_stop) return;
          *reinterpret_cast<uint4*>(to_key + static_cast<int64_t>(out[r]) * params.grad_key.token) = gradient;
        });

    // dv, two n-blocks at a time.
    PixelRows<kTaps> pixels;
    if constexpr (kTaps > 0) {
      pixels.template point<Traits::kRingBlocks>(pixel, pixel_bytes, row_bytes, block, lane.index / 8);
    }
#pragma unroll 1
    for (int pair = 0; pair < kBlocks / 2; ++pair) {
      uint32_t word[2][4];
      unrolled<2>([&](auto half) {
        float o[2][4];
        times<T, kSlices>(o, k, fragments + (2 * pair + half) * kSlices * 32);
        if constexpr (kTaps > 0) {
          convolve<T, kTaps, half * 16>(o, pixels, lane_taps.address + (2 * pair + half) * lane_taps.step);
        }
#pragma unroll
        for (int r = 0; r < 4; ++r)
          word[half][r] = Pair<T>::pack(o[r / 2][r % 2 * 2], o[r / 2][r % 2 * 2 + 1]);
      });
      const bool odd = lane.t % 2;  // neighbours swap a word, for whole sectors
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t other = shuffle_xor<1>(odd ? word[0][r] : word[1][r]);
        store_if(y + r < y_stop,
                 to_value + static_cast<int64_t>(out[r]) * params.grad_value.token + pair * 32,
                 make_uint2(odd ? other : word[0][r], odd ? word[1][r] : other));
      }
      pixels.advance(32);
    }
    key_tile += other_tile;
    other_tile = -other_tile;
  }
  if (params.scale_partials) {
    const int64_t row = (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    store_scale<kSlices>(params.scale_partials + row * channels, scale_sums, inverse_scale, scale_sum,
                         head_channel, patch, params.patches, lane);
  }
#endif
}

}  // namespace flatten::cuda::tensorcore
