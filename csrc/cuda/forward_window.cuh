// A window in one launch and one block: S never leaves the registers, q, k and v are read once.
//
// A warp owns 32 channels: of Q and K for the norms, of V for the products and the taps. It multiplies V^T K,
// not K^T V, because the accumulators of that are B fragments of Q S already: rows (output channels) are
// columns there, pairs of adjacent K channels lie in one lane. Head dimension 64: two warps share a head and
// exchange their fragments of K and Q through shared memory. V of the whole window stays in shared memory for
// the taps, in raster order with a pixel of zeros behind; lanes outside of the window read that one.
#pragma once

#include "forward_output.cuh"
#include "forward_state.cuh"
#include "tap_product.cuh"
#include "window_params.h"

namespace flatten::cuda::tensorcore {

template <typename T, int kHeadDim>
struct WindowTraits {
  static constexpr int kPartners = kHeadDim <= 32 ? 1 : kHeadDim / 32;  // warps of a head
  static constexpr int kHeads = kHeadDim == 16 ? 2 : 1;                 // of a warp
  static constexpr int kTileBytes = Focus<T, 1, kAnyPower>::kTileBytes;
  static constexpr int kFragmentBytes = kPartners > 1 ? 4 * 512 : 0;  // of a warp
  static constexpr int kStateBytes = (4 + kHeads) * kPartners * 512;  // of a warp

  /// An odd number of 16-byte vectors: the eight rows of an ldmatrix block lie
  /// in different banks.
  static constexpr __host__ __device__ int pixel_bytes(int channels) { return channels * 2 + 16; }
  static constexpr __host__ __device__ int tap_rows(int channels, bool per_channel) {
    return per_channel ? channels : kHeadDim < 32 ? 32 : kHeadDim;
  }
  static constexpr __host__ __device__ int shared_bytes(int taps_bytes, int channels, int keys) {
    const int warps = channels / kSliceChannels;
    return taps_bytes + channels * 4 + SliceGroup::shared_bytes(1, warps) +
           warps * (kTileBytes + kFragmentBytes + kStateBytes) + (keys + 1) * pixel_bytes(channels);
  }
};

/// The fragment registers [4][4] that the warps of a head hold of K or Q, in
/// the order of its channels.
template <int kPartners>
__device__ __forceinline__ void share_fragments(uint32_t (&all)[kPartners][4][4], const uint32_t (&own)[4][4],
                                                unsigned char* shared, int warp, SliceGroup& group,
                                                const Lane& lane) {
  if constexpr (kPartners == 1) {
#pragma unroll
    for (int i = 0; i < 16; ++i) all[0][i / 4][i % 4] = own[i / 4][i % 4];
  } else {
    uint4* buffer = reinterpret_cast<uint4*>(shared);
    group.barrier();  // the partners have read what was here
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      buffer[(warp * 4 + r) * 32 + lane.index] = make_uint4(own[r][0], own[r][1], own[r][2], own[r][3]);
    }
    group.barrier();
#pragma unroll
    for (int p = 0; p < kPartners; ++p) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint4 x = buffer[((warp / kPartners * kPartners + p) * 4 + r) * 32 + lane.index];
        all[p][r][0] = x.x, all[p][r][1] = x.y, all[p][r][2] = x.z, all[p][r][3] = x.w;
      }
    }
  }
}

/// A warp's part of S and m as it accumulates: V^T K for its 32 channels of V
/// and all of the head's K. Tile i, word w, c[2h + e]: V channel 16i + 8h + g,
/// K channel 8t + 2w + e of partner p.
template <typename T, int kHeadDim>
struct WindowState {
  static constexpr int kPartners = kHeadDim <= 32 ? 1 : kHeadDim / 32;
  float s[kPartners][4][2][4] = {};
  float m[kPartners][4][4] = {};

  __device__ __forceinline__ void add(const uint32_t (&k)[kPartners][4][4], int half,
                                      const uint32_t (&v)[2][4]) {
    const uint32_t one = Pair<T>::pack(1.0f, 1.0f);
#pragma unroll
    for (int p = 0; p < kPartners; ++p) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t b0 = k[p][2 * half][w], b1 = k[p][2 * half + 1][w];
        mma<T>(m[p][w], one, one, one, one, b0, b1, m[p][w]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma<T>(s[p][w][i], v[i][0], v[i][1], v[i][2], v[i][3], b0, b1, s[p][w][i]);
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
    const int head = warp * kSliceChannels / kHeadDim;  // the first of two for head dimension 16
#pragma unroll
    for (int p = 0; p < kPartners; ++p) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int k = (kPartners > 1 ? head * kHeadDim + p * 32 : warp * 32) + 8 * lane.t + 2 * w + e;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int v = (warp * kSliceChannels + 16 * i + 8 * h + lane.g) % kHeadDim;
              float x = s[p][w][i][2 * h + e] * scale;
              // Head dimension 16: one i of the two, but an index known only at run time would cost a stack.
              if constexpr (kHeadDim == 16) asm volatile("" : "+f"(x));
              if (kHeadDim > 16 || lane.t / 2 == i) state[static_cast<int64_t>(k) * kHeadDim + v] = x;
            }
          }
          if (warp % kPartners == 0 && lane.g == 0) {
            state[static_cast<int64_t>(channels) * kHeadDim + k] = m[p][w][e] * scale;
          }
        }
      }
    }
  }
};

/// fp16: a power of two that brings the warp's largest number near the top of
/// the range. bf16 has fp32's range.
template <typename T>
__device__ __forceinline__ float scale_for_rounding(float largest) {
  if constexpr (!std::is_same_v<T, __half>) return 1.0f;
  const unsigned exponent = __reduce_max_sync(kAllLanes, __float_as_uint(largest)) >> 23;
  return __uint_as_float(min(127 + 12 + 127 - exponent, 254u) << 23);
}

/// S and m as B fragments in shared memory, every lane's own: word w of lane
/// (g, t) pairs rows (K channels) 8t + 2w and 8t + 2w + 1. Vector b * kPartners
/// + p: of n-block b = 2i + h the V channels 16i + 8h + g as columns; behind
/// them for each head m, even columns the rounded mean, odd columns what
/// rounding cut off.
template <typename T, int kHeadDim>
__device__ __forceinline__ void pack_window_state(uint4* fragments, const WindowState<T, kHeadDim>& state,
                                                  float scale, const Lane& lane) {
  using Traits = WindowTraits<T, kHeadDim>;
#pragma unroll
  for (int p = 0; p < Traits::kPartners; ++p) {
    uint32_t mean[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float x = state.m[p][w][0] * scale, y = state.m[p][w][1] * scale;
      const uint32_t upper = Pair<T>::pack(x, y);
      const float2 cut = Pair<T>::unpack(upper);
      mean[w] = lane.g % 2 ? Pair<T>::pack(x - cut.x, y - cut.y) : upper;
    }
#pragma unroll
    for (int b = 0; b < 4 + Traits::kHeads; ++b) {
      uint32_t x[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float* c = &state.s[p][w][b / 2 % 2][b % 2 * 2];
        x[w] = b < 4 ? Pair<T>::pack(c[0] * scale, c[1] * scale) : mean[w];
      }
      // Head dimension 16: what mixes the warp's two heads is dropped.
      const bool own = kHeadDim > 16 || lane.t / 2 == (b < 4 ? b / 2 : b - 4);
      fragments[(b * Traits::kPartners + p) * 32] = own ? make_uint4(x[0], x[1], x[2], x[3]) : uint4{};
    }
  }
}

template <typename T, int kHeadDim, int kTaps, int kMode>
__global__ void __launch_bounds__(max_threads(kHeadDim, kTaps))
    forward_window(const __grid_constant__ WindowParams params) {
#if __CUDA_ARCH__ >= 800
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

  // Shared memory: taps, 1 / scale, exchange of norms, the warps' tiles of K
  // and Q, fragments of these, fragments of S and m; V.
  const int tap_rows = Traits::tap_rows(channels, params.per_channel);
  unsigned char* taps = shared;
  float* inverse_scale = reinterpret_cast<float*>(taps + TapTable<kTaps>::bytes(tap_rows));
  unsigned char* exchange = reinterpret_cast<unsigned char*>(inverse_scale + channels);
  unsigned char* tiles = exchange + SliceGroup::shared_bytes(1, warps);
  unsigned char* fragments = tiles + warps * Traits::kTileBytes;
  const int pixel_bytes = Traits::pixel_bytes(channels);
  uint4* own_state =
      reinterpret_cast<uint4*>(fragments + warps * Traits::kFragmentBytes + warp * Traits::kStateBytes) +
      lane.index;
  uint32_t pixels_begin =
      shared_address(fragments + warps * (Traits::kFragmentBytes + Traits::kStateBytes)) + warp_channel * 2;
  uint32_t own_tile = shared_address(tiles) + warp * Traits::kTileBytes + lane.index * 16;
  const int row_bytes = grid.window_w * pixel_bytes;
  uint32_t zeros = pixels_begin + keys * pixel_bytes;
  keep(pixels_begin), keep(own_tile), keep(zeros);

  // ---- V: the warp brings its own channels of the window, eight pixels of a
  // row at once, to slots in raster order; then the pixel of zeros.
  {
    const int vector = lane.index / 8 * 16;
    const char* value = static_cast<const char*>(params.value.data) + window.image * params.value.image +
                        warp_channel * 2 + vector;
    for (int x = lane.index % 8; x < patches * kPatchColumns; x += kPatchColumns) {
      const bool inside = x < grid.window_w;
      const int column = window.column(grid, inside ? x : 0);
      uint32_t to = pixels_begin + x * pixel_bytes + vector;
      for (int y = 0; y < grid.window_h; ++y, to += row_bytes) {
        const int token = window.row(grid, y) + column;
        copy_async(to, value + static_cast<int64_t>(token) * params.value.token, inside ? 16 : -1);
      }
    }
    copy_async(zeros + vector, value, lane.index % 8 == 0 ? 0 : -1);
    copy_async_commit();
  }

  // ---- K and Q: a step is 8 x 4 pixels, lane g in column g, token r in row r;
  // those outside of the window repeat its last ones.
  const int first_channel = warp_channel + 8 * lane.t;
  const char* key =
      static_cast<const char*>(params.key.data) + window.image * params.key.image + first_channel * 2;
  const char* query =
      static_cast<const char*>(params.query.data) + window.image * params.query.image + first_channel * 2;
  using TileFocus = Focus<T, 1, kMode>;
  int token[4];
  const auto load = [&](const char* from, int token_bytes, int x, int y) {
    const int column = window.column(grid, min(x + lane.g, grid.window_w - 1));
    unrolled<4>([&](auto r) {
      token[r] = window.row(grid, min(y + r, grid.window_h - 1)) + column;
      copy_async<TileFocus::offset(0, r), 0>(own_tile, from + static_cast<int64_t>(token[r]) * token_bytes);
    });
    copy_async_commit();
  };
  const auto next_step = [&](int& x, int& y) {
    x += kPatchColumns;
    if (x >= grid.window_w) x = 0, y += kStepRows;
  };

  load(key, params.key.token, 0, 0);
  load_inverse_scale<T>(inverse_scale, params.focus, channels);
  if constexpr (kTaps > 0) {
    TapTable<kTaps>::template load<T>(taps, params.weight, params.bias, tap_rows,
                                      params.per_channel ? channels : kHeadDim);
  }
  __syncthreads();
  SliceGroup group(exchange, 0, 1, warp, warps);
  const TileFocus focus(params.focus, inverse_scale + first_channel, group, lane);

  // ---- S and m.
  WindowState<T, kHeadDim> state;
  RunningScale scale;
  for (int x = 0, y = 0; y < grid.window_h;) {
    uint32_t k[4][4];
    float change = 1.0f;
    const LaneBias bias{params.focus.key_bias,          channels, first_channel,
                        y * grid.window_w + x + lane.g, keys - 1, grid.window_w};
    copy_async_wait<0>();  // also V, the first time
    focus(own_tile, bias, [&](const float (&powers)[1][4][8], const Norms& norms) {
      float own_factor = phi_factor(norms);
      if (x + lane.g >= grid.window_w || y + lane.t >= grid.window_h) own_factor = 0.0f;
      float factor[4];
      quad_gather(factor, own_factor);
      if constexpr (std::is_same_v<T, __half>) {
        change = scale.make_room(powers[0], factor);
#pragma unroll
        for (int r = 0; r < 4; ++r) factor[r] *= scale.value;
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          k[r][w] = transpose8x8(
              Pair<T>::pack(powers[0][r][2 * w] * factor[r], powers[0][r][2 * w + 1] * factor[r]));
        }
      }
    });
    if (std::is_same_v<T, __half> && change != 1.0f) state.scale(change);
    __syncwarp();  // V is visible to the whole warp
    uint32_t all[kPartners][4][4];
    share_fragments(all, k, fragments, warp, group, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // ldmatrix blocks: the step's row 2 half at channels 0-7 and 8-15, then
      // the row below. Behind a row any number does, since K is 0 there: the
      // next row's first pixel, which lies in a bank of its own.
      const int slot = min((y + 2 * half + lane.index / 16) * grid.window_w + x + lane.index % 8, keys);
      const uint32_t address = pixels_begin + slot * pixel_bytes + lane.index / 8 % 2 * 16;
      uint32_t v[2][4];
      load_matrix_x4_transposed<0>(v[0], address);
      load_matrix_x4_transposed<32>(v[1], address);
      state.add(all, half, v);
    }
    next_step(x, y);
    if (y < grid.window_h) {
      load(key, params.key.token, x, y);
    } else {
      load(query, params.query.token, 0, 0);
    }
  }
  float mean = 1.0f / keys;
  if constexpr (std::is_same_v<T, __half>) mean /= scale.value;
  if (params.state) {
    state.store(params.state + static_cast<int64_t>(blockIdx.x) * channels * (kHeadDim + 1), channels, warp,
                mean, lane);
  }
  const float state_scale = scale_for_rounding<T>(state.largest() * mean);
  pack_window_state<T, kHeadDim>(own_state, state, state_scale * mean, lane);

  const int tap_channel = warp_channel % tap_rows;
  const LaneTaps<kTaps> lane_taps(taps, tap_rows, tap_channel, lane);
  const float* bias = reinterpret_cast<const float*>(taps + TapTable<kTaps>::bias_offset(tap_rows)) +
                      tap_channel + 2 * lane.t;
  const int matrix = lane.index / 8;
  char* out = static_cast<char*>(const_cast<void*>(params.out.data)) + window.image * params.out.image +
              (warp_channel + lane.t % 2 * 8 + lane.t / 2 * 4) * 2;
  for (int x = 0, y = 0; y < grid.window_h;) {
    uint32_t q[4][4];
    float eps[4];
    copy_async_wait<0>();
    focus(own_tile, [&](const float (&powers)[1][4][8], const Norms& norms) {
      quad_gather(eps, __fdividef(params.eps * state_scale, phi_factor(norms)));
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float room = room_for_query<T, 1>(powers, r);
        eps[r] *= room;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          q[r][w] = Pair<T>::pack(powers[0][r][2 * w] * room, powers[0][r][2 * w + 1] * room);
        }
      }
    });
    uint32_t all[kPartners][4][4];
    share_fragments(all, q, fragments, warp, group, lane);
    char* to[4];
    bool inside[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      to[r] = out + static_cast<int64_t>(token[r]) * params.out.token;
      inside[r] = x + lane.g < grid.window_w && y + r < grid.window_h;
    }

    const float zero[4] = {};
    const auto times = [&](float (&d)[2][4], int block) {
#pragma unroll
      for (int p = 0; p < kPartners; ++p) {
        const uint4 f = own_state[(block * kPartners + p) * 32];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t (&upper)[4] = all[p][2 * i], (&lower)[4] = all[p][2 * i + 1];
          const float (&sum)[4] = p ? static_cast<const float (&)[4]>(d[i]) : zero;
          mma<T>(d[i], upper[0], lower[0], upper[1], lower[1], f.x, f.y, sum);
          mma<T>(d[i], upper[2], lower[2], upper[3], lower[3], f.z, f.w, d[i]);
        }
      }
    };
    float normalizer[Traits::kHeads][4];  // 1 / (Q . m + eps)
#pragma unroll
    for (int head = 0; head < Traits::kHeads; ++head) {
      float d[2][4];
      times(d, 4 + head);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        normalizer[head][r] = __fdividef(1.0f, d[r / 2][r % 2 * 2] + d[r / 2][r % 2 * 2 + 1] + eps[r]);
      }
    }

    PixelRows<kTaps> pixels;
    if constexpr (kTaps > 0) {
      const int left = x - kHalo + lane.index % 8, top = y - kHalo;
      const auto column = [&](int at, uint32_t& pixel,
                              int& step) {  // and the step to the row below
        const bool inside = static_cast<unsigned>(at) < static_cast<unsigned>(grid.window_w);
        pixel = inside ? pixels_begin + top * row_bytes + at * pixel_bytes : zeros;
        step = inside ? row_bytes : 0;
      };
      const auto inside_rows = [&](int row) {
        return static_cast<unsigned>(row) < static_cast<unsigned>(grid.window_h);
      };
      uint32_t pixel;
      int step;
      column(left + min(matrix, kTaps - 1), pixel, step);
#pragma unroll
      for (int j = 0; j < PixelRows<kTaps>::kRows; ++j, pixel += step) {
        pixels.row[j] = inside_rows(top + j) ? pixel : zeros;
        keep(pixels.row[j]);
      }
      column(left + 4, pixel, step);
      pixels.fifth[0] = inside_rows(top + matrix) ? pixel + matrix * step : zeros;
      pixels.fifth[1] = inside_rows(top + matrix + 4) ? pixel + (matrix + 4) * step : zeros;
    }
    next_step(x, y);
    if (y < grid.window_h) load(query, params.query.token, x, y);

    // Two n-blocks, 16 channels, at a time; a loop, so that only one pair's
    // fragments are in flight.
#pragma unroll 1
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t word[2][4];  // channels 2t, 2t + 1 of either block, by pixel row
      unrolled<2>([&](auto half) {
        float o[2][4];
        times(o, 2 * pair + half);
        const float2 start = kTaps ? *reinterpret_cast<const float2*>(bias + pair * 16 + half * 8) : float2{};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float n = Traits::kHeads == 2 && pair ? normalizer[Traits::kHeads - 1][r] : normalizer[0][r];
          float* two = &o[r / 2][r % 2 * 2];
          two[0] = fmaf(two[0], n, start.x);
          two[1] = fmaf(two[1], n, start.y);
        }
        if constexpr (kTaps > 0) {
          convolve<T, kTaps, half * 16>(o, pixels, lane_taps.address + (2 * pair + half) * lane_taps.step);
        }
#pragma unroll
        for (int r = 0; r < 4; ++r)
          word[half][r] = Pair<T>::pack(o[r / 2][r % 2 * 2], o[r / 2][r % 2 * 2 + 1]);
      });
      // Neighbours swap a word, so that the quad writes 32 adjacent bytes, a
      // whole sector.
      const bool odd = lane.t % 2;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? word[0][r] : word[1][r], 1);
        const uint2 two = make_uint2(odd ? other : word[0][r], odd ? word[1][r] : other);
        if (inside[r]) *reinterpret_cast<uint2*>(to[r]) = two;
        to[r] += 32;
      }
      pixels.advance(32);
    }
  }
#endif
}

}  // namespace flatten::cuda::tensorcore
