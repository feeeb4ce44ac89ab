// out = Q S / (Q . m + eps) + taps over V: one block to a (strip of columns, run of rows, window).
//
// A warp owns 8 x 4 pixels of a step and one head (head_dim 16: a pair of heads, S block-diagonal). The block
// walks down its strip four rows a step, over a ring of rows of V in shared memory that cp.async keeps one
// step ahead; a row is read once per strip, plus its halo.
//   Q: global memory -> registers -> focus.cuh -> A fragments as they are; the norm factor only scales eps.
//   S: B fragments in shared memory, rows in the channel order of the fragments of Q.
//   taps: m16n8k16 over two taps x 8 channels against diagonal B fragments; an A fragment is two pixel rows
//   of
//         8 x 8 (pixels, channels) at a shift of dx, loaded once by ldmatrix for all dy.
#pragma once

#include "focus.cuh"
#include "row_loader.cuh"
#include "tap_product.cuh"
#include "windows.cuh"

namespace flatten::cuda::tensorcore {

template <typename T, int kHeadDim, int kTaps>
struct OutputTraits {
  static constexpr int kSlices = kHeadDim <= 32 ? 1 : kHeadDim / 32;
  static constexpr int kWarpChannels = kSlices * kSliceChannels;
  static constexpr int kHeads = kHeadDim == 16 ? 2 : 1;  // of a warp
  static constexpr int kBlocks = kWarpChannels / 8;      // n-blocks of its output

  // B fragments of one warp's channels: S, then m (columns of its upper and lower half) per head.
  static constexpr int kStateFragments = (kBlocks + kHeads) * kSlices;
  static constexpr __host__ __device__ int state_bytes(int channels) {
    return channels / kWarpChannels * kStateFragments * 512;
  }

  static constexpr __host__ __device__ int tap_rows(int channels, bool per_channel) {
    return per_channel ? channels : kWarpChannels;
  }
  static constexpr __host__ __device__ int taps_bytes(int channels, bool per_channel) {
    return TapTable<kTaps>::bytes(tap_rows(channels, per_channel));
  }

  // The ring of V in blocks of four pixel rows: what a step reads, and one block in flight. A pixel is an odd
  // number of 16-byte vectors: eight of them in a row lie in different banks.
  static constexpr int kHalo = kTaps / 2;
  static constexpr int kReadBlocks = (kStepRows + 2 * kHalo + kStepRows - 1) / kStepRows;
  static constexpr int kRingBlocks = kReadBlocks + 1;
  static constexpr __host__ __device__ int pitch(int patches) { return patches * kPatchColumns + 2 * kHalo; }
  static constexpr __host__ __device__ int pixel_bytes(int channels) { return channels * 2 + 16; }
  static constexpr __host__ __device__ int ring_bytes(int channels, int patches) {
    return kTaps ? kRingBlocks * kStepRows * pitch(patches) * pixel_bytes(channels) : 0;
  }

  static constexpr int kQueryBytes = Focus<T, kSlices, kAnyPower>::kTileBytes;  // of a warp
  static constexpr __host__ __device__ int query_bytes(int channels, int patches) {
    return channels / kWarpChannels * patches * kQueryBytes;
  }
  static constexpr __host__ __device__ int exchange_bytes(int channels, int patches) {
    return SliceGroup::shared_bytes(patches, channels / kWarpChannels);
  }
  static int shared_bytes(int channels, int patches, bool per_channel) {
    return state_bytes(channels) + taps_bytes(channels, per_channel) + channels * 4 +
           exchange_bytes(channels, patches) + query_bytes(channels, patches) + ring_bytes(channels, patches);
  }
};

/// fp16: a power of two that brings the largest number of a warp's S and m near the top of the range, so that
/// none overflows and the least vanish. bf16 has fp32's range.
template <typename T, int kChannels, int kHeadDim>
__device__ __forceinline__ float scale_of_state(const float* s, const float* m, int lane) {
  if constexpr (!std::is_same_v<T, __half>) return 1.0f;
  float largest = 0.0f;
  for (int i = lane; i < kChannels * kHeadDim; i += 32) largest = fmaxf(largest, fabsf(s[i]));
  for (int i = lane; i < kChannels; i += 32) largest = fmaxf(largest, fabsf(m[i]));
  const unsigned exponent = __reduce_max_sync(kAllLanes, __float_as_uint(largest)) >> 23;
  return __uint_as_float(min(127 + 12 + 127 - exponent, 254u) << 23);  // 2^(12 - exponent)
}

/// Packs a warp's S and m, times `scale`, to B fragments (the lane's own, 32 vectors apart): word w of lane
/// (g, t) pairs rows 8t + 2w and 8t + 2w + 1, column g.
template <typename T, int kHeadDim, int kTaps>
__device__ __forceinline__ void pack_state(uint4* fragments, const float* s, const float* m, float scale,
                                           const Lane& lane) {
  using Traits = OutputTraits<T, kHeadDim, kTaps>;
  const auto pack = [&](const float (&v)[8]) {
    return make_uint4(Pair<T>::pack(v[0] * scale, v[1] * scale), Pair<T>::pack(v[2] * scale, v[3] * scale),
                      Pair<T>::pack(v[4] * scale, v[5] * scale), Pair<T>::pack(v[6] * scale, v[7] * scale));
  };
#pragma unroll
  for (int slice = 0; slice < Traits::kSlices; ++slice) {
    const int row = slice * kSliceChannels + 8 * lane.t;
    const float* from = s + row * kHeadDim + lane.g;
#pragma unroll 4
    for (int b = 0; b < Traits::kBlocks; ++b) {
      float v[8] = {};
      if (kHeadDim > 16 || lane.t / 2 == b / 2) {
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = from[i * kHeadDim + b * 8 % kHeadDim];
      }
      fragments[(b * Traits::kSlices + slice) * 32] = pack(v);
    }
    float means[8], parts[8];
    load8(means, m + row);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float upper = Pair<T>::unpack(Pair<T>::pack(means[i] * scale, 0.0f)).x / scale;
      parts[i] = lane.g % 2 ? means[i] - upper : upper;
    }
#pragma unroll
    for (int head = 0; head < Traits::kHeads; ++head) {
      const bool own = kHeadDim > 16 || lane.t / 2 == head;
      fragments[((Traits::kBlocks + head) * Traits::kSlices + slice) * 32] = own ? pack(parts) : uint4{};
    }
  }
}

/// fp16: what a query's powers are multiplied by, so that their largest is near the top of the range: Q S and
/// Q . m share the factor. bf16 has fp32's range.
template <typename T, int kSlices>
__device__ __forceinline__ float room_for_query(const float (&powers)[kSlices][4][8], int r) {
  if constexpr (!std::is_same_v<T, __half>) return 1.0f;
  float largest = 0.0f;
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(powers[s][r][i]));
  }
  return fminf(__fdividef(0x1p13f, quad_max(largest)), 0x1p100f);
}

template <typename T, int kHeadDim, int kTaps, int kMode>
__global__ void __launch_bounds__(max_threads(kHeadDim, kTaps), 1)
    forward_output(const __grid_constant__ OutputParams params) {
#if __CUDA_ARCH__ >= 800
  using Traits = OutputTraits<T, kHeadDim, kTaps>;
  extern __shared__ __align__(128) unsigned char shared[];
  const Lane lane;
  const int channels = params.channels, warps = channels / Traits::kWarpChannels;
  const int warp = threadIdx.x / 32 % warps, patch = threadIdx.x / 32 / warps;
  const int warp_channel = warp * Traits::kWarpChannels;
  const WindowGrid& grid = params.grid;
  const Window window(grid, blockIdx.z);
  const int x0 = blockIdx.x * params.patches * kPatchColumns, y0 = blockIdx.y * params.rows;
  const int y_end = min(y0 + params.rows, grid.window_h);

  // Shared memory: taps, fragments of S and m, 1 / scale, exchange, the warps' tiles of Q, ring of V.
  unsigned char* taps = shared;
  uint4* state = reinterpret_cast<uint4*>(taps + Traits::taps_bytes(channels, params.per_channel));
  float* inverse_scale = reinterpret_cast<float*>(state + Traits::state_bytes(channels) / 16);
  unsigned char* exchange = reinterpret_cast<unsigned char*>(inverse_scale + channels);
  unsigned char* queries = exchange + Traits::exchange_bytes(channels, params.patches);
  uint32_t ring = shared_address(queries + Traits::query_bytes(channels, params.patches));
  state += warp * Traits::kStateFragments * 32 + lane.index;

  RowLoader<Traits> values(params.value, grid, window, channels, params.patches, ring, x0, y_end,
                           warp_channel, patch, lane);
  if constexpr (kTaps > 0) {
    for (int i = 0; i < Traits::kReadBlocks; ++i) values.load_block(y0 - Traits::kHalo + i * kStepRows, i);
  }

  // ---- Q: pixels in column g of the patch, rows r of the step.
  const int x = x0 + patch * kPatchColumns + lane.g;
  const bool patch_inside = x0 + patch * kPatchColumns < grid.window_w;
  int token_x = window.column(grid, min(x, grid.window_w - 1));
  const char* query = static_cast<const char*>(params.query.data) + window.image * params.query.image +
                      (warp_channel + 8 * lane.t) * 2;
  keep(query);
  uint32_t own_queries = shared_address(queries) + threadIdx.x / 32 * Traits::kQueryBytes + lane.index * 16;
  keep(own_queries);
  using QueryFocus = Focus<T, Traits::kSlices, kMode>;
  int token[4];
  const auto load_queries = [&](int y) {
    unrolled<4>([&](auto r) {
      token[r] = min(window.row(grid, min(y + r, grid.window_h - 1)) + token_x, params.tokens - 1);
      const char* from = query + static_cast<int64_t>(token[r]) * params.query.token;
      unrolled<Traits::kSlices>(
          [&](auto s) { copy_async<QueryFocus::offset(s, r), s * 64>(own_queries, from); });
    });
    copy_async_commit();
  };
  load_queries(y0);
  // The lane's rows of out: up to y_stop. A raster of tokens may end inside its last row.
  int y_stop = x < grid.window_w ? y_end : y0;
  if (grid.raster) y_stop = min(y_stop, (params.tokens - x + grid.map_w - 1) / grid.map_w);
  keep(y_stop);
  char* out = static_cast<char*>(const_cast<void*>(params.out.data)) + window.image * params.out.image +
              (warp_channel + lane.t % 2 * 8 + lane.t / 2 * 4) * 2;

  load_inverse_scale<T>(inverse_scale, params.focus, channels);
  const int tap_rows = Traits::tap_rows(channels, params.per_channel);
  const int tap_channel = params.per_channel ? warp_channel : 0;
  if constexpr (kTaps > 0) {
    TapTable<kTaps>::template load<T>(taps, params.weight, params.bias, tap_rows,
                                      params.per_channel ? channels : kHeadDim);
  }
  const LaneTaps<kTaps> lane_taps(taps, tap_rows, tap_channel, lane);
  const float* bias = reinterpret_cast<const float*>(taps + TapTable<kTaps>::bias_offset(tap_rows)) +
                      tap_channel + 2 * lane.t;
  const float* window_state = params.state + static_cast<int64_t>(blockIdx.z) * channels * (kHeadDim + 1);
  const float* s = window_state + warp_channel * kHeadDim;
  const float* m = window_state + channels * kHeadDim + warp_channel;
  const float state_scale = scale_of_state<T, Traits::kWarpChannels, kHeadDim>(s, m, lane.index);
  if (patch == 0) pack_state<T, kHeadDim, kTaps>(state, s, m, state_scale, lane);

  SliceGroup group(exchange, patch, params.patches, warp, warps);
  const QueryFocus focus(params.focus, inverse_scale + warp_channel + 8 * lane.t, group, lane);
  const int pixel_bytes = Traits::pixel_bytes(channels),
            row_bytes = Traits::pitch(params.patches) * pixel_bytes;
  uint32_t pixel = ring + (patch * kPatchColumns + lane.index % 8) * pixel_bytes + warp_channel * 2;
  keep(pixel);
  int block = 0;  // of the ring, where the step's first row is
  for (int y = y0; y < y_end; y += kStepRows, block = block + 1 < Traits::kRingBlocks ? block + 1 : 0) {
    copy_async_wait<0>();
    __syncthreads();  // V of this step is visible, and nobody reads the rows of the step before
    if (kTaps > 0 && y + kStepRows < y_end) {
      values.load_block(y - Traits::kHalo + Traits::kReadBlocks * kStepRows,
                        block ? block - 1 : Traits::kRingBlocks - 1);
    }
    if (!patch_inside) continue;

    uint32_t q[Traits::kSlices][4][4];
    float eps[4], room[4];
    focus(
        own_queries,
        [&](const float (&powers)[Traits::kSlices][4][8]) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            room[r] = room_for_query<T, Traits::kSlices>(powers, r);
#pragma unroll
            for (int s = 0; s < Traits::kSlices; ++s) {
#pragma unroll
              for (int w = 0; w < 4; ++w) {
                q[s][r][w] = Pair<T>::pack(powers[s][r][2 * w] * room[r], powers[s][r][2 * w + 1] * room[r]);
              }
            }
          }
        },
        [&](const Norms& norms) {
          quad_gather(eps, __fdividef(params.eps * state_scale, phi_factor(norms)));
        });
#pragma unroll
    for (int r = 0; r < 4; ++r) eps[r] *= room[r];
    char* to[4];
    bool inside[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      to[r] = out + static_cast<int64_t>(token[r]) * params.out.token;
      inside[r] = y + r < y_stop;
    }
    if (y + kStepRows < y_end) load_queries(y + kStepRows);

    const float zero[4] = {};
    const auto times_state = [&](float (&d)[2][4], const uint4* fragments) {
#pragma unroll
      for (int s = 0; s < Traits::kSlices; ++s) {
        const uint4 f = fragments[s * 32];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t (&upper)[4] = q[s][2 * i], (&lower)[4] = q[s][2 * i + 1];
          const float (&sum)[4] = s ? static_cast<const float (&)[4]>(d[i]) : zero;
          mma<T>(d[i], upper[0], lower[0], upper[1], lower[1], f.x, f.y, sum);
          mma<T>(d[i], upper[2], lower[2], upper[3], lower[3], f.z, f.w, d[i]);
        }
      }
    };
    float normalizer[Traits::kHeads][4];  // 1 / (Q . m + eps)
#pragma unroll
    for (int head = 0; head < Traits::kHeads; ++head) {
      float d[2][4];
      times_state(d, state + (Traits::kBlocks + head) * Traits::kSlices * 32);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        normalizer[head][r] = __fdividef(1.0f, d[r / 2][r % 2 * 2] + d[r / 2][r % 2 * 2 + 1] + eps[r]);
      }
    }

    PixelRows<kTaps> pixels;
    if constexpr (kTaps > 0) {
      pixels.template point<Traits::kRingBlocks>(pixel, pixel_bytes, row_bytes, block, lane.index / 8);
    }

    // Two n-blocks, 16 channels, at a time; a loop, so that only one pair's fragments are in flight.
#pragma unroll 1
    for (int pair = 0; pair < Traits::kBlocks / 2; ++pair) {
      uint32_t word[2][4];  // channels 2t, 2t + 1 of either block, by pixel row
      unrolled<2>([&](auto half) {
        float o[2][4];
        times_state(o, state + (2 * pair + half) * Traits::kSlices * 32);
        const float2 start = kTaps ? *reinterpret_cast<const float2*>(bias + pair * 16 + half * 8) : float2{};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float n = normalizer[Traits::kHeads == 2 && pair ? Traits::kHeads - 1 : 0][r];
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
      // Neighbours swap a word, so that the quad writes 32 adjacent bytes, a whole sector.
      const bool odd = lane.t % 2;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t other = shuffle_xor<1>(odd ? word[0][r] : word[1][r]);
        store_if(inside[r], to[r], make_uint2(odd ? other : word[0][r], odd ? word[1][r] : other));
        to[r] += 32;
      }
      pixels.advance(32);
    }
  }
#endif
}

}  // namespace flatten::cuda::tensorcore
