// S = K^T V / M and m = mean K of every window, by parts: one block to a (chunk of tokens, window).
//
// A warp owns a slice of 32 channels of K and all D value channels of its head (head_dim 16: both heads of
// the slice; what mixes them is dropped). `groups` groups of C / 32 warps walk over the chunk, 32 tokens each
// and step. K goes from global memory to registers, is focused there (focus.cuh), rounded, and transposed to
// fragments of K^T by movmatrix; V comes by cp.async, two stages deep, and is read by ldmatrix.trans. m is
// the same product with a column of ones. Accumulators stay in fp32 from end to end.
#pragma once

#include "focus.cuh"
#include "windows.cuh"

namespace flatten::cuda::tensorcore {

template <typename T, int kHeadDim>
struct StateTraits {
  static constexpr int kValues = kHeadDim < 32 ? 32 : kHeadDim;  // value channels of a warp
  static constexpr int kBlocks = kValues / 8;                    // n-blocks of its mma
  static_assert(kHeadDim == 16 || kHeadDim % kSliceChannels == 0, "a slice lies in one head, or holds two");

  /// 16 bytes of padding make the row an odd number of 16-byte vectors: the eight rows of an ldmatrix block
  /// then lie in different banks.
  static constexpr __host__ __device__ int row_bytes(int channels) { return channels * 2 + 16; }
  static constexpr __host__ __device__ int stage_bytes(int channels) {
    return kTileTokens * row_bytes(channels);
  }
  static constexpr int kKeyBytes = Focus<T, 1, kAnyPower>::kTileBytes;  // of a warp
  static constexpr __host__ __device__ int accumulator_bytes() { return (8 * kBlocks + 8) * 32 * 4; }

  static constexpr __host__ __device__ int shared_bytes(int channels, int groups) {
    const int slices = channels / kSliceChannels;
    const int tiles = 2 * groups * stage_bytes(channels);
    const int reduction = groups > 1 ? slices * accumulator_bytes() : 0;
    return channels * 4 + SliceGroup::shared_bytes(groups, slices) + groups * slices * kKeyBytes +
           (tiles > reduction ? tiles : reduction);
  }
};

/// A warp's part of S and m: 32 channels of K as two m16 tiles. Row g of tile i, half h (c[2h], c[2h + 1]) is
/// channel 8 (g / 2) + 2 (2i + h) + g % 2 of the slice: the order the transposed words come in.
template <typename T, int kHeadDim>
struct StateAccumulator {
  using Traits = StateTraits<T, kHeadDim>;
  float s[Traits::kBlocks][2][4] = {};
  float m[2][4] = {};

  static __device__ __forceinline__ int channel(const Lane& lane, int tile, int half) {
    return 8 * (lane.g / 2) + 2 * (2 * tile + half) + lane.g % 2;
  }

  /// Adds 32 tokens. k[r][w]: K of token g + 8r, as its 16-byte load came. values: shared address of the
  /// tile's first token, at the first value channel.
  __device__ __forceinline__ void add(const uint32_t (&k)[4][4], uint32_t values, int row_bytes,
                                      const Lane& lane) {
    const uint32_t one = Pair<T>::pack(1.0f, 1.0f);
    // ldmatrix blocks: tokens 0-7 and 8-15 of channel block b, then of b + 1.
    uint32_t address = values + (lane.index % 16) * row_bytes + (lane.index / 16) * 16;
#pragma unroll
    for (int step = 0; step < 2; ++step, address += 16 * row_bytes) {
      uint32_t a[2][4];  // fragments of K^T: 16 channels by 16 tokens
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int w = 0; w < 4; ++w) a[w / 2][2 * half + w % 2] = transpose8x8(k[2 * step + half][w]);
      }
      const auto product = [&](float (&sum)[2][4], uint32_t b0, uint32_t b1) {
#pragma unroll
        for (int i = 0; i < 2; ++i) mma<T>(sum[i], a[i][0], a[i][1], a[i][2], a[i][3], b0, b1, sum[i]);
      };
      product(m, one, one);
      unrolled<Traits::kBlocks / 2>([&](auto pair) {
        uint32_t v[4];
        load_matrix_x4_transposed<pair * 32>(v, address);
        product(s[2 * pair], v[0], v[1]);
        product(s[2 * pair + 1], v[2], v[3]);
      });
    }
  }

  /// Everything times `factor`.
  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
#pragma unroll
      for (int b = 0; b < Traits::kBlocks; ++b) s[b][e / 4][e % 4] *= factor;
      m[e / 4][e % 4] *= factor;
    }
  }

  /// Adds what the warp of another group holds, through `shared` (accumulator_bytes).
  __device__ void send(float* shared, int lane) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int b = 0; b < Traits::kBlocks; ++b) {
        reinterpret_cast<float4*>(shared)[(i * Traits::kBlocks + b) * 32 + lane] =
            make_float4(s[b][i][0], s[b][i][1], s[b][i][2], s[b][i][3]);
      }
      reinterpret_cast<float4*>(shared)[(2 * Traits::kBlocks + i) * 32 + lane] =
          make_float4(m[i][0], m[i][1], m[i][2], m[i][3]);
    }
  }
  __device__ void receive(const float* shared, int lane) {
    const auto plus = [&](float (&c)[4], int at) {
      const float4 other = reinterpret_cast<const float4*>(shared)[at * 32 + lane];
      c[0] += other.x, c[1] += other.y, c[2] += other.z, c[3] += other.w;
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int b = 0; b < Traits::kBlocks; ++b) plus(s[b][i], i * Traits::kBlocks + b);
      plus(m[i], 2 * Traits::kBlocks + i);
    }
  }

  /// The same for sums whose columns came in the order of row_gradient.cuh's tiles, and whose m is the sum of
  /// two columns.
  __device__ void store_tile_order(float* state, int channels, int slice, float scale,
                                   const Lane& lane) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = slice * kSliceChannels + channel(lane, i, half);
        float* row = state + static_cast<int64_t>(c) * kHeadDim + 8 * lane.t;
#pragma unroll
        for (int b = 0; b < Traits::kBlocks; ++b) {
          *reinterpret_cast<float2*>(row + b / 4 * kSliceChannels + b % 4 * 2) =
              make_float2(s[b][i][2 * half] * scale, s[b][i][2 * half + 1] * scale);
        }
        if (lane.t == 0) {
          state[static_cast<int64_t>(channels) * kHeadDim + c] =
              (m[i][2 * half] + m[i][2 * half + 1]) * scale;
        }
      }
    }
  }

  /// Writes S and m, times `scale`, to the state of the window.
  __device__ void store(float* state, int channels, int slice, float scale, const Lane& lane) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = channel(lane, i, half);
        float* row = state + static_cast<int64_t>(slice * kSliceChannels + c) * kHeadDim;
#pragma unroll
        for (int b = 0; b < Traits::kBlocks; ++b) {
          const int first = kHeadDim == 16 ? c / 16 * 2 : 0;  // n-blocks of the row's own head
          if (kHeadDim == 16 && b / 2 != first / 2) continue;
          *reinterpret_cast<float2*>(row + (b - first) * 8 + 2 * lane.t) =
              make_float2(s[b][i][2 * half] * scale, s[b][i][2 * half + 1] * scale);
        }
        if (lane.t == 0) {
          state[static_cast<int64_t>(channels) * kHeadDim + slice * kSliceChannels + c] =
              m[i][2 * half] * scale;
        }
      }
    }
  }
};

/// fp16 only: K is rounded as 2^e K, where e follows the largest number seen, so that neither large inputs
/// overflow nor small ones vanish. bf16 has fp32's range.
struct RunningScale {
  float value = 0x1p100f;

  /// Makes room for the tile; what was summed so far is to be multiplied by what this returns.
  __device__ __forceinline__ float make_room(const float (&y)[4][8], const float (&factor)[4]) {
    float largest = 0.0f;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(y[r][i] * factor[r]));
    }
    const unsigned bits = __reduce_max_sync(kAllLanes, __float_as_uint(largest));
    constexpr int kRoom = 13;
    if (__uint_as_float(bits) * value <= exp2f(kRoom + 1)) return 1.0f;
    const float next = __uint_as_float((127 + kRoom + 127 - (bits >> 23)) << 23);  // 2^(kRoom - exponent)
    const float change = next / value;
    value = next;
    return change;
  }
};

template <typename T, int kHeadDim, int kMode>
__global__ void __launch_bounds__(max_threads(kHeadDim))
    forward_state(const __grid_constant__ StateParams params) {
#if __CUDA_ARCH__ >= 800
  using Traits = StateTraits<T, kHeadDim>;
  extern __shared__ __align__(128) unsigned char shared[];
  const Lane lane;
  const int slices = params.channels / kSliceChannels;
  const int warp = threadIdx.x / 32;
  const int group_index = warp / slices, slice = warp % slices;
  const int begin = blockIdx.x * params.chunk;
  const int end = min(begin + params.chunk, params.keys);
  const Window window(params.grid, blockIdx.y);

  // Shared memory: 1 / scale, the groups' exchange, the warps' tiles of K, then tiles[stage][group] of V.
  float* inverse_scale = reinterpret_cast<float*>(shared);
  unsigned char* exchange = shared + params.channels * 4;
  unsigned char* keys = exchange + SliceGroup::shared_bytes(params.groups, slices);
  unsigned char* tiles = keys + params.groups * slices * Traits::kKeyBytes;
  SliceGroup group(exchange, group_index, params.groups, slice, slices);
  const int row_bytes = Traits::row_bytes(params.channels);
  uint32_t tile = shared_address(tiles) + group_index * Traits::stage_bytes(params.channels);
  int other_tile = params.groups * Traits::stage_bytes(params.channels);  // from this stage to the other

  // ---- K: tokens past the end repeat the last one; their factor is 0.
  const int first_channel = slice * kSliceChannels + 8 * lane.t;
  const char* key =
      static_cast<const char*>(params.key.data) + window.image * params.key.image + first_channel * 2;
  uint32_t own_keys = shared_address(keys) + warp * Traits::kKeyBytes + lane.index * 16;
  keep(own_keys), keep(key);
  using KeyFocus = Focus<T, 1, kMode>;
  const auto load_keys = [&](int first) {
    int token[4];
    window.tokens(token, params.grid, first + lane.g, end - 1);
    unrolled<4>([&](auto r) {
      copy_async<KeyFocus::offset(0, r), 0>(own_keys,
                                            key + static_cast<int64_t>(token[r]) * params.key.token);
    });
  };
  // ---- V: the warp brings its slice of 32 rows; eight lanes in a row write to different banks.
  const int row = lane.index % 8, value_offset = slice * 64 + lane.index / 8 * 16;
  const char* value =
      static_cast<const char*>(params.value.data) + window.image * params.value.image + value_offset;
  const auto load_values = [&](uint32_t to, int first) {
    int token[4];
    window.tokens(token, params.grid, first + row, end - 1);
    to += row * row_bytes + value_offset;
#pragma unroll
    for (int r = 0; r < 4; ++r, to += 8 * row_bytes) {
      copy_async(to, value + static_cast<int64_t>(token[r]) * params.value.token,
                 first + row + 8 * r < end ? 16 : 0);
    }
    copy_async_commit();
  };

  StateAccumulator<T, kHeadDim> sum;
  RunningScale scale;
  const int stride = params.groups * kTileTokens;
  int first = begin + group_index * kTileTokens;
  load_keys(first);
  load_values(tile, first);
  load_inverse_scale<T>(inverse_scale, params.focus, params.channels);
  __syncthreads();
  const KeyFocus focus(params.focus, inverse_scale + first_channel, group, lane);
  for (; first < end; first += stride) {
    copy_async_wait<0>();
    uint32_t k[4][4];
    float change = 1.0f;
    const LaneBias bias{params.focus.key_bias, params.channels, first_channel, first + lane.g, end - 1};
    focus(own_keys, bias, [&](const float (&y)[1][4][8], const Norms& norms) {
      float own_factor = phi_factor(norms);
      if (first + lane.g + 8 * lane.t >= end) own_factor = 0.0f;
      float factor[4];
      quad_gather(factor, own_factor);
      if constexpr (std::is_same_v<T, __half>) {
        change = scale.make_room(y[0], factor);
#pragma unroll
        for (int r = 0; r < 4; ++r) factor[r] *= scale.value;
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          k[r][w] = Pair<T>::pack(y[0][r][2 * w] * factor[r], y[0][r][2 * w + 1] * factor[r]);
        }
      }
    });
    // The group's warps have met: V of this step is visible, and nobody reads the other stage any more.
    if (change != 1.0f) sum.scale(change);
    if (first + stride < end) {
      load_keys(first + stride);
      load_values(tile + other_tile, first + stride);
    }
    sum.add(k, tile + slice * kSliceChannels / Traits::kValues * Traits::kValues * 2, row_bytes, lane);
    tile += other_tile;
    other_tile = -other_tile;
  }

  if constexpr (std::is_same_v<T, __half>) sum.scale(1.0f / scale.value);
  copy_async_wait<0>();
  for (int other = 1; other < params.groups; ++other) {
    float* staging = reinterpret_cast<float*>(tiles + slice * Traits::accumulator_bytes());
    __syncthreads();
    if (group_index == other) sum.send(staging, lane.index);
    __syncthreads();
    if (group_index == 0) sum.receive(staging, lane.index);
  }
  if (group_index == 0) {
    const int64_t size = static_cast<int64_t>(params.channels) * (kHeadDim + 1);
    sum.store(params.partial + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * size,
              params.channels, slice, 1.0f / params.keys, lane);
  }
#endif
}

}  // namespace flatten::cuda::tensorcore
