// A window in one launch and one block: S never leaves the block, q, k and v are read once.
//
// A warp owns 32 channels: of Q and K for the norms, of V for the products and the taps. It multiplies V^T K,
// not K^T V, because the accumulators of that are B fragments of Q S already: rows (output channels) are
// columns there, pairs of adjacent K channels lie in one lane. K and Q are mapped in fragments (features.cuh)
// and put back to the warp's tile; ldmatrix reads them from there in the order of their channels, and, where
// two warps share a head of 64, from both warps' tiles. V of the whole window stays in shared memory for the
// taps, in raster order with a pixel of zeros behind; lanes outside of the window read that one.
#pragma once

#include "forward_output.cuh"
#include "forward_state.cuh"
#include "params.h"
#include "range.cuh"
#include "tap_product.cuh"

namespace flatten::cuda::tensorcore {

template <typename T, int kHeadDim>
struct WindowTraits {
  static constexpr int kPartners = kHeadDim <= 32 ? 1 : kHeadDim / 32;  // warps of a head
  static constexpr int kHeads = kHeadDim == 16 ? 2 : 1;                 // of a warp
  static constexpr int kStateBytes = (4 + kHeads) * kPartners * 512;    // of a warp
  static constexpr int kStagingBytes = kTileTokens * 32;                // of a warp

  /// Where the window's rows and columns lie: tokens of the rows' first pixels, then what a column adds;
  /// kMaxSide numbers each. Rows and columns past the end repeat the last one.
  static constexpr int kMaxSide = 64;  // the longer side of 256 pixels, the shorter at least 4
  static constexpr int kPlaceBytes = 2 * kMaxSide * 4;

  /// An odd number of 16-byte vectors: the eight rows of an ldmatrix block lie in different banks.
  static constexpr __host__ __device__ int pixel_bytes(int channels) { return channels * 2 + 16; }
  static constexpr __host__ __device__ int tap_rows(int channels, bool per_channel) {
    return per_channel ? channels : kHeadDim < 32 ? 32 : kHeadDim;
  }
  static constexpr __host__ __device__ int shared_bytes(int taps_bytes, int channels, int keys) {
    const int warps = channels / kSliceChannels;
    return taps_bytes + ScaleTable::bytes(channels) + kPlaceBytes + SliceGroup::shared_bytes(1, warps) +
           warps * (kTileBytes + kStagingBytes + kStateBytes) + (keys + 1) * pixel_bytes(channels);
  }
};

/// Fragments of the tiles of a head's warps by ldmatrix: [p][i][j], 16 tokens from 16i on of partner p's
/// tile, channels 16j .. 16j + 15; block of tokens 0-7, then 8-15, then the same of the next eight channels.
template <int kPartners>
using HeadFragments = uint32_t[kPartners][2][2][4];

template <int kPartners, bool kTransposed>
__device__ __forceinline__ void load_head(HeadFragments<kPartners>& x, uint32_t near) {
  const uint32_t far = near ^ 32;
  unrolled<kPartners * 4>([&](auto at) {
    constexpr int p = at / 4, i = at / 2 % 2, j = at % 2;
    constexpr int kOffset = p * kTileBytes + i * (kTileBytes / 2);
    if constexpr (kTransposed) {
      load_matrix_x4_transposed<kOffset>(x[p][i][j], j ? far : near);
    } else {
      load_matrix_x4<kOffset>(x[p][i][j], j ? far : near);
    }
  });
}

/// A warp's part of S and m as it accumulates: V^T K for its 32 channels of V and all of the head's K. Tile
/// i, n-block c, c[2h + e]: V channel 16i + 8h + g, K channel 8c + 2t + e of partner p.
template <typename T, int kHeadDim>
struct WindowState {
  static constexpr int kPartners = kHeadDim <= 32 ? 1 : kHeadDim / 32;
  float s[kPartners][4][2][4] = {};
  float m[kPartners][4][4] = {};

  /// Adds tokens 16 half .. 16 half + 15 of a step.
  __device__ __forceinline__ void add(const HeadFragments<kPartners>& k, int half,
                                      const uint32_t (&v)[2][4]) {
    const uint32_t one = Pair<T>::pack(1.0f, 1.0f);
#pragma unroll
    for (int p = 0; p < kPartners; ++p) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint32_t b0 = k[p][half][c / 2][c % 2 * 2], b1 = k[p][half][c / 2][c % 2 * 2 + 1];
        mma<T>(m[p][c], one, one, one, one, b0, b1, m[p][c]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma<T>(s[p][c][i], v[i][0], v[i][1], v[i][2], v[i][3], b0, b1, s[p][c][i]);
        }
      }
    }
  }

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < kPartners * 4; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[i / 4][i % 4][0][e] *= factor;
        s[i / 4][i % 4][1][e] *= factor;
        m[i / 4][i % 4][e] *= factor;
      }
    }
  }

  __device__ __forceinline__ float largest() const {
    float x = 0.0f;
#pragma unroll
    for (int i = 0; i < kPartners * 4; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        x = fmaxf(x, fmaxf(fabsf(s[i / 4][i % 4][0][e]), fabsf(s[i / 4][i % 4][1][e])));
        x = fmaxf(x, fabsf(m[i / 4][i % 4][e]));
      }
    }
    return x;
  }

  /// Leaves S and m of the window for the backward pass (launch.h).
  __device__ void store(float* state, int channels, int warp, float scale, const Lane& lane) const {
    const int first =
        warp / kPartners * kPartners * kSliceChannels;  // channel of the head, or of its two heads
#pragma unroll
    for (int p = 0; p < kPartners; ++p) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int k = first + p * kSliceChannels + 8 * c + 2 * lane.t + e;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (kHeadDim == 16 && c / 2 != i) continue;  // K of the other head
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int v = (warp * kSliceChannels + 16 * i + 8 * h + lane.g) % kHeadDim;
              state[static_cast<int64_t>(k) * kHeadDim + v] = s[p][c][i][2 * h + e] * scale;
            }
          }
          if (warp % kPartners == 0 && lane.g == 0) {
            state[static_cast<int64_t>(channels) * kHeadDim + k] = m[p][c][e] * scale;
          }
        }
      }
    }
  }
};

/// S and m as B fragments in shared memory, every lane's own: word c of lane (g, t) pairs rows (K channels)
/// 8c + 2t and 8c + 2t + 1. Vector b * kPartners + p: of n-block b = 2i + h the V channels 16i + 8h + g as
/// columns; behind them for each head m, even columns the rounded mean, odd columns what rounding cut off.
template <typename T, int kHeadDim>
__device__ __forceinline__ void pack_window_state(uint32_t fragments, const WindowState<T, kHeadDim>& state,
                                                  float scale, const Lane& lane) {
  using Traits = WindowTraits<T, kHeadDim>;
  unrolled<Traits::kPartners>([&](auto p) {
    uint32_t mean[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float x = state.m[p][c][0] * scale, y = state.m[p][c][1] * scale;
      const uint32_t upper = Pair<T>::pack(x, y);
      const float2 cut = Pair<T>::unpack(upper);
      mean[c] = lane.g % 2 ? Pair<T>::pack(x - cut.x, y - cut.y) : upper;
    }
    unrolled<4 + Traits::kHeads>([&](auto b) {
      constexpr int head = b < 4 ? b / 2 : b - 4;  // of two, for head dimension 16
      uint32_t x[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float* pair = &state.s[p][c][b / 2 % 2][b % 2 * 2];
        x[c] = b < 4 ? Pair<T>::pack(pair[0] * scale, pair[1] * scale) : mean[c];
        if (kHeadDim == 16 && c / 2 != head) x[c] = 0;  // what mixes the warp's two heads is dropped
      }
      store_shared<(b * Traits::kPartners + p) * 512>(fragments, x);
    });
  });
}

template <typename T, int kHeadDim, int kTaps, int kMode>
__global__ void __launch_bounds__(max_threads(kHeadDim, kTaps))
    forward_window(const __grid_constant__ WindowParams params) {
  using Traits = WindowTraits<T, kHeadDim>;
  constexpr int kPartners = Traits::kPartners, kHalo = kTaps / 2;
  extern __shared__ __align__(128) unsigned char shared[];
  const Lane lane;
  const int channels = params.channels, warps = channels / kSliceChannels, warp = threadIdx.x / 32;
  const int warp_channel = warp * kSliceChannels;
  const WindowGrid& grid = params.grid;
  const Window window(grid, blockIdx.x);
  const int keys = grid.window_h * grid.window_w;
  const int patches = (grid.window_w + kPatchColumns - 1) / kPatchColumns;

  // Shared memory: taps, the scale, rows and columns, exchange of norms, the warps' tiles of K and Q,
  // fragments of S and m, staging; V.
  const int tap_rows = Traits::tap_rows(channels, params.per_channel);
  unsigned char* taps = shared;
  const ScaleTable table{taps + TapTable<kTaps>::bytes(tap_rows), channels};
  int* const rows = reinterpret_cast<int*>(table.data + ScaleTable::bytes(channels));
  int* const columns = rows + Traits::kMaxSide;
  unsigned char* exchange = reinterpret_cast<unsigned char*>(columns + Traits::kMaxSide);
  const uint32_t tiles = shared_address(exchange + SliceGroup::shared_bytes(1, warps));
  const uint32_t states = tiles + warps * kTileBytes, staging = states + warps * Traits::kStateBytes;
  const int pixel_bytes = Traits::pixel_bytes(channels);
  uint32_t own_tile = tiles + warp * kTileBytes + tile_offset(lane.g, lane.t);  // the lane's vectors
  // The head's tiles, for ldmatrix.
  uint32_t head_tiles =
      tiles + warp / kPartners * kPartners * kTileBytes + tile_offset(lane.index % 16, lane.index / 16);
  uint32_t own_state = states + warp * Traits::kStateBytes + lane.index * 16;
  uint32_t pixels_begin = staging + warps * Traits::kStagingBytes + warp_channel * 2;
  const int row_bytes = grid.window_w * pixel_bytes;
  uint32_t zeros = pixels_begin + keys * pixel_bytes;
  keep(own_tile), keep(head_tiles), keep(own_state), keep(pixels_begin), keep(zeros);

  for (int i = threadIdx.x; i < Traits::kMaxSide; i += blockDim.x) {
    rows[i] = window.row(grid, min(i, grid.window_h - 1));
    columns[i] = window.column(grid, min(i, grid.window_w - 1));
  }
  __syncthreads();

  // ---- V: the warp brings its own channels of the window, eight pixels of a row at once, to slots in raster
  // order; then the pixel of zeros.
  {
    const int vector = lane.index / 8 * 16;
    const char* value = static_cast<const char*>(params.value.data) + window.image * params.value.image +
                        warp_channel * 2 + vector;
    int value_bytes = params.value.token, height = grid.window_h, row_step = row_bytes;
    keep(value), keep(value_bytes), keep(height), keep(row_step);
    for (int x = lane.index % 8; x < patches * kPatchColumns; x += kPatchColumns) {
      const int bytes = x < grid.window_w ? 16 : -1;
      const char* column = advance(value, columns[x], value_bytes);
      uint32_t to = pixels_begin + x * pixel_bytes + vector;
#pragma unroll 2
      for (int y = 0; y < height; ++y, to += row_step) {
        copy_async(to, advance(column, rows[y], value_bytes), bytes);
      }
    }
    copy_async(zeros + vector, value, lane.index % 8 == 0 ? 0 : -1);
    copy_async_commit();
  }

  // ---- K, Q and out: a step is 8 x 4 pixels, n in column n % 8 and row n / 8; those outside of the window
  // repeat its last ones. A lane brings and writes n = lane / 2 (TileCopy) and n + 16.
  const int n = TileCopy::token();
  const auto base = [&](const TokenArray& tokens) {
    return static_cast<const char*>(tokens.data) + window.image * tokens.image + warp_channel * 2 +
           TileCopy::byte();
  };
  const char *key = base(params.key), *query = base(params.query), *out = base(params.out);
  const TileCopy copy(tiles + warp * kTileBytes);
  int token[2];
  const auto load = [&](const char* from, int token_bytes, int x, int y) {
    const int column = columns[x + n % 8];
#pragma unroll
    for (int i = 0; i < 2; ++i) token[i] = rows[y + n / 8 + 2 * i] + column;
    const char* const rows[2] = {advance(from, token[0], token_bytes), advance(from, token[1], token_bytes)};
    copy.operator()<1>(rows);
    copy_async_commit();
  };
  const auto next_step = [&](int& x, int& y) {
    x += kPatchColumns;
    if (x >= grid.window_w) x = 0, y += kStepRows;
  };

  load(key, params.key.token, 0, 0);
  table.load<T>(params.focus);
  if constexpr (kTaps > 0) {
    TapTable<kTaps>::template load<T>(taps, params.weight, params.bias, tap_rows,
                                      params.per_channel ? channels : kHeadDim);
  }
  __syncthreads();
  SliceGroup group(exchange, 0, warp, warps);
  const FeatureMap<T, 1, kMode, kPartners> features(params.focus, table, warp_channel, group, lane);
  // What a warp wrote to its tile, the warps of its head are to read; or have read.
  const auto meet = [&] {
    if constexpr (kPartners > 1) {
      group.barrier();
    } else {
      __syncwarp();
    }
  };

  // ---- S and m.
  WindowState<T, kHeadDim> state;
  RunningScale scale;
  for (int x = 0, y = 0; y < grid.window_h;) {
    copy_async_wait<0>();  // also V, the first time
    __syncwarp();
    uint32_t words[1][4][4];
    const LaneBias bias{params.focus.key_bias,          channels, warp_channel + 8 * lane.t,
                        y * grid.window_w + x + lane.g, keys - 1, grid.window_w};
    const bool present = x + lane.g < grid.window_w && y + lane.t < grid.window_h;
    const float change = features.keys(words, bias, present, scale, own_tile);
    if (kNarrow<T> && change != 1.0f) state.scale(change);
    unrolled<4>([&](auto r) { store_shared<r * 512>(own_tile, words[0][r]); });
    meet();
    HeadFragments<kPartners> k;
    load_head<kPartners, true>(k, head_tiles);
    if constexpr (kPartners > 1) meet();
    const int slot_x = x + lane.index % 8;
    int slot = (y + lane.index / 16) * grid.window_w + slot_x;
    next_step(x, y);
    if (y < grid.window_h) {
      load(key, params.key.token, x, y);
    } else {
      load(query, params.query.token, 0, 0);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half, slot += 2 * grid.window_w) {
      // ldmatrix blocks: the step's row 2 half at channels 0-7 and 8-15, then the row below. Behind a row any
      // number does, since K is 0 there: the next row's first pixel, which lies in a bank of its own.
      const uint32_t address = pixels_begin + min(slot, keys) * pixel_bytes + lane.index / 8 % 2 * 16;
      uint32_t v[2][4];
      load_matrix_x4_transposed<0>(v[0], address);
      load_matrix_x4_transposed<32>(v[1], address);
      state.add(k, half, v);
    }
  }
  float mean = 1.0f / keys;
  if constexpr (kNarrow<T>) mean /= scale.value;
  if (params.state) {
    state.store(params.state + static_cast<int64_t>(blockIdx.x) * channels * (kHeadDim + 1), channels, warp,
                mean, lane);
  }
  float state_scale = scale_for_rounding<T>(state.largest() * mean);
  pack_window_state<T, kHeadDim>(own_state, state, state_scale * mean, lane);

  const int tap_channel = warp_channel % tap_rows;
  const LaneTaps<kTaps> lane_taps(taps, tap_rows, tap_channel, lane);
  uint32_t biases =
      shared_address(taps) + TapTable<kTaps>::bias_offset(tap_rows) + (tap_channel + 2 * lane.t) * 4;
  const Staging turn(staging + warp * Traits::kStagingBytes, lane);
  float eps = params.eps * state_scale;
  keep(biases);
  for (int x = 0, y = 0; y < grid.window_h;) {
    copy_async_wait<0>();
    __syncwarp();
    Words<1> words;
    float normalizer[Traits::kHeads][4];  // the denominator's other part; then 1 / (Q . m + eps)
    features.queries(words, normalizer[0], eps, own_tile);
    unrolled<4>([&](auto r) { store_shared<r * 512>(own_tile, words[0][r]); });
    meet();
    HeadFragments<kPartners> q;
    load_head<kPartners, false>(q, head_tiles);
    if constexpr (kPartners > 1) meet();
    char* to[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) to[i] = const_cast<char*>(advance(out, token[i], params.out.token));
    const int limit = x + n % 8 < grid.window_w ? grid.window_h - y - n / 8 : 0;

    // d = Q times the fragments of a block.
    const auto times_state = [&](float (&d)[2][4], auto block) {
      const float zero[4] = {};
      unrolled<kPartners>([&](auto p) {
        uint32_t f[4];
        load_shared<(block * kPartners + p) * 512>(f, own_state);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t (&a)[2][4] = q[p][i];
          const float (&sum)[4] = p ? static_cast<const float (&)[4]>(d[i]) : zero;
          mma<T>(d[i], a[0][0], a[0][1], a[0][2], a[0][3], f[0], f[1], sum);
          mma<T>(d[i], a[1][0], a[1][1], a[1][2], a[1][3], f[2], f[3], d[i]);
        }
      });
    };
    invert_denominators<4>(normalizer, times_state);

    PixelRows<kTaps> pixels;
    if constexpr (kTaps > 0) {
      pixels.point({pixels_begin, zeros, pixel_bytes, row_bytes, grid.window_w, grid.window_h}, x - kHalo,
                   y - kHalo, lane);
    }
    next_step(x, y);
    if (y < grid.window_h) load(query, params.query.token, x, y);

    uint32_t weights = lane_taps.address;
    unrolled<2>([&](auto pair) {
      write_pair<T, pair>(times_state, normalizer[Traits::kHeads == 2 ? pair : 0], pixels, weights,
                          lane_taps.step, biases, turn, limit, to);
    });
  }
}

}  // namespace flatten::cuda::tensorcore
