// S = K^T V / M and m = mean K of every window, by parts: one block to a (chunk of tokens, window).
//
// A warp owns a slice of 32 channels of K and all D value channels of its head (head_dim 16: both heads of
// the slice; what mixes them is dropped). `groups` groups of C / 32 warps walk over the chunk, 32 tokens each
// and step. The warps bring K and V of their slices by cp.async, V one step ahead of its use. K is mapped
// (features.cuh), put back where it came from, and both operands are read by ldmatrix.trans. m is the same
// product with a column of ones. Accumulators stay in fp32 from end to end.
#pragma once

#include "features.cuh"
#include "range.cuh"
#include "windows.cuh"

namespace flatten::cuda::tensorcore {

template <typename T, int kHeadDim>
struct StateTraits {
  static constexpr int kValues = kHeadDim < 32 ? 32 : kHeadDim;  // value channels of a warp
  static constexpr int kBlocks = kValues / 8;                    // n-blocks of its mma
  static_assert(kHeadDim == 16 || kHeadDim % kSliceChannels == 0, "a slice lies in one head, or holds two");

  static constexpr __host__ __device__ int accumulator_bytes() { return (8 * kBlocks + 8) * 32 * 4; }

  static constexpr __host__ __device__ int shared_bytes(int channels, int groups, bool biased) {
    const int slices = channels / kSliceChannels;
    // Of K, two stages of V, and key_bias.
    const int tiles = groups * slices * (3 * kTileBytes + (biased ? BiasTile::kBytes : 0));
    const int reduction = groups > 1 ? slices * accumulator_bytes() : 0;
    return ScaleTable::bytes(channels) + SliceGroup::shared_bytes(groups, slices) +
           (tiles > reduction ? tiles : reduction);
  }
};

/// A warp's part of S and m: 32 channels of K as two m16 tiles. Row g of tile i, half h (c[2h], c[2h + 1]) is
/// channel 16i + 8h + g of the slice.
template <typename T, int kHeadDim>
struct StateAccumulator {
  using Traits = StateTraits<T, kHeadDim>;
  float s[Traits::kBlocks][2][4] = {};
  float m[2][4] = {};

  /// Adds 32 tokens, from tiles: of K, and of the first slice of V. then_load() runs when K has been read.
  template <typename Load>
  __device__ __forceinline__ void add(uint32_t keys, uint32_t values, const Lane& lane, Load then_load) {
    const uint32_t one = Pair<T>::pack(1.0f, 1.0f);
    // ldmatrix blocks: for fragments of K^T, 16 channels by 16 tokens, vectors 2i and 2i + 1 of tokens 0-7,
    // then of tokens 8-15; of V, vector b of tokens 0-7 and 8-15, then vector b + 1.
    uint32_t k = keys + tile_offset(lane.index % 8 + lane.index / 16 * 8, lane.index / 8 % 2);
    uint32_t v = values + tile_offset(lane.index % 16, lane.index / 16);
    keep(k), keep(v);
    const uint32_t k_far = k ^ 32, v_far = v ^ 32;  // vectors 2 and 3
    uint32_t a[2][2][4];
    unrolled<2>([&](auto step) {
      load_matrix_x4_transposed<step*(kTileBytes / 2)>(a[step][0], k);
      load_matrix_x4_transposed<step*(kTileBytes / 2)>(a[step][1], k_far);
    });
    then_load();
    unrolled<2>([&](auto step) {
      constexpr int kOffset = step * (kTileBytes / 2);
      const auto product = [&](float (&sum)[2][4], uint32_t b0, uint32_t b1) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t (&x)[4] = a[step][i];
          mma<T>(sum[i], x[0], x[1], x[2], x[3], b0, b1, sum[i]);
        }
      };
      product(m, one, one);
      unrolled<Traits::kBlocks / 2>([&](auto pair) {
        uint32_t b[4];
        load_matrix_x4_transposed<kOffset + pair / 2 * kTileBytes>(b, pair % 2 ? v_far : v);
        product(s[2 * pair], b[0], b[1]);
        product(s[2 * pair + 1], b[2], b[3]);
      });
    });
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

  /// Writes S and m, times `scale`, to the state of the window.
  __device__ void store(float* state, int channels, int slice, float scale, const Lane& lane) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = 16 * i + 8 * half + lane.g;
        float* row = state + static_cast<int64_t>(slice * kSliceChannels + c) * kHeadDim;
#pragma unroll
        for (int b = 0; b < Traits::kBlocks; ++b) {
          const int first = kHeadDim == 16 ? i * 2 : 0;  // n-blocks of the row's own head
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

template <typename T, int kHeadDim, int kMode>
__global__ void __launch_bounds__(max_threads(kHeadDim))
    forward_state(const __grid_constant__ StateParams params) {
  using Traits = StateTraits<T, kHeadDim>;
  extern __shared__ __align__(128) unsigned char shared[];
  const Lane lane;
  const int slices = params.channels / kSliceChannels;
  const int warp = threadIdx.x / 32;
  const int group_index = warp / slices, slice = warp % slices;
  const int begin = blockIdx.x * params.chunk;
  int end = min(begin + params.chunk, params.keys);
  keep(end);
  const Window window(params.grid, blockIdx.y);

  // Shared memory: the scale, the groups' exchange, tiles of K, two stages of V and key_bias, each by warp.
  const ScaleTable table{shared, params.channels};
  unsigned char* exchange = shared + ScaleTable::bytes(params.channels);
  unsigned char* tiles = exchange + SliceGroup::shared_bytes(params.groups, slices);
  const int stage_bytes = params.groups * slices * kTileBytes;
  SliceGroup group(exchange, group_index, slice, slices);
  uint32_t keys = shared_address(tiles) + warp * kTileBytes;
  uint32_t own_keys = keys + tile_offset(lane.g, lane.t);  // the lane's vectors
  keep(keys), keep(own_keys);
  // V of the warp's head: the stage in use, and from there to the other one.
  uint32_t values = keys + stage_bytes - slice % (Traits::kValues / kSliceChannels) * kTileBytes;
  int other_stage = stage_bytes;

  // ---- K and V; tokens past the end repeat the last one, their K is made 0.
  const TileCopy copy(keys);
  const BiasTile bias(params.focus.key_bias,
                      shared_address(tiles) + 3 * stage_bytes + warp * BiasTile::kBytes, lane);
  int copied_values = stage_bytes;  // from the tile of K to where V is brought next
  const auto base = [&](const TokenArray& x) {
    return static_cast<const char*>(x.data) + window.image * x.image + slice * 64 + TileCopy::byte();
  };
  const char *key = base(params.key), *value = base(params.value);
  int key_bytes = params.key.token, value_bytes = params.value.token;
  keep(key), keep(value), keep(key_bytes), keep(value_bytes);
  const auto load = [&](int first) {
    int token[2];
    window.tokens<TileCopy::kStep>(token, params.grid, first + TileCopy::token(), end - 1);
    const char* const keys_from[2] = {advance(key, token[0], key_bytes), advance(key, token[1], key_bytes)};
    copy.operator()<1>(keys_from);
    const char* const values_from[2] = {advance(value, token[0], value_bytes),
                                        advance(value, token[1], value_bytes)};
    copy.operator()<1>(values_from, copied_values);
    bias.load(params.channels, slice * kSliceChannels, first + lane.g, end - 1, lane);
    copy_async_commit();
    copied_values = 3 * stage_bytes - copied_values;
  };

  StateAccumulator<T, kHeadDim> sum;
  RunningScale scale;
  const int stride = params.groups * kTileTokens;
  int first = begin + group_index * kTileTokens;
  load(first);
  table.load<T>(params.focus);
  __syncthreads();
  const FeatureMap<T, 1, kMode> features(params.focus, table, slice * kSliceChannels, group, lane);
  for (; first < end; first += stride) {
    copy_async_wait<0>();
    __syncwarp();
    Words<1> k;
    const float change = features.keys(k, bias, first + lane.g + 8 * lane.t < end, scale, own_keys);
    if (kNarrow<T> && change != 1.0f) sum.scale(change);
    unrolled<4>([&](auto r) { store_shared<r * 512>(own_keys, k[0][r]); });
    __syncwarp();
    // The group's warps have met: V of this step is visible, and nobody reads the other stage any more.
    sum.add(keys, values, lane, [&] {
      if (first + stride < end) load(first + stride);
    });
    values += other_stage;
    other_stage = -other_stage;
  }

  if constexpr (kNarrow<T>) sum.scale(1.0f / scale.value);
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
}

}  // namespace flatten::cuda::tensorcore
