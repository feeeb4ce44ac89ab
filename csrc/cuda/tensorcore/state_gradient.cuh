// S and m, or their gradients, as a warp of the backward kernels holds them: 32 rows of one head's matrix.
#pragma once

#include "backward_block.cuh"

namespace flatten::cuda::tensorcore {

template <typename T, int kHeadDim>
struct StateGradient {
  static constexpr int kPartners = BackwardLayout<kHeadDim, 1>::kPartners;
  static constexpr int kHeads = BackwardLayout<kHeadDim, 1>::kHeads;
  static constexpr int kBlocks = 4 * kPartners;
  static constexpr int kBytes = (2 * kBlocks + 1) * 512;  // in shared memory, of a warp
  // Accumulators of mma: row 16i + 8h + g of the slice in s[b][i][2h ..], columns 8b + 2t and 8b + 2t + 1 of
  // the head (head dimension 16: of the warp's two). m of that row in m[2i + h].
  float s[kBlocks][2][4] = {}, m[4] = {};
  // fp16 only: s holds the sum times the scale of u, m holds the sum times that scale and the scale of share.
  // The scale of u starts at 2^60, so that its product with a large number over a denominator stays finite.
  RunningScale u_scale{0x1p60f}, share_scale;

  /// fp16 only: chooses u_scale, by which u is to be multiplied. `largest` is the largest magnitude of u
  /// among all partners, before that multiplication.
  __device__ __forceinline__ void make_room(float largest) {
    const float change = u_scale.make_room(largest);
    if (change == 1.0f) return;
    multiply(change, change);
  }

  /// Adds w^T u and w^T share of 32 tokens. w is the address of block_row for this lane's matrix of A (see
  /// below), u the address for B in the tile of partner 0, share[r] the share of token g + 8r.
  template <int kStages, bool kShort>
  __device__ __forceinline__ void add(const BackwardBlock<kHeadDim, kStages, kShort>& block, int w_tile,
                                      int u_tile, const float (&share)[4]) {
    const Lane& lane = block.lane;
    int matrix = lane.index / 8;
    keep_if<kShort>(matrix);
    // The 8x8 blocks of A are tokens 0-7 with channels 0-7 and 8-15, then tokens 8-15 with the same. Those of
    // B are channels 0-7 with tokens 0-7 and 8-15, then channels 8-15 with the same.
    float share_factor = 1.0f;
    if constexpr (kNarrow<T>) {
      float largest = 0.0f;
#pragma unroll
      for (int r = 0; r < 4; ++r) largest = fmaxf(largest, fabsf(share[r]));
      const float change = share_scale.make_room(warp_max(largest));
      if (change != 1.0f) multiply(1.0f, change);
      share_factor = share_scale.value;
    }
    const uint32_t a_row = block.block_row(matrix / 2, matrix % 2) + w_tile;
    const uint32_t b_row = block.of_partner(block.block_row(matrix % 2, matrix / 2) + u_tile, 0);
    float columns[2][4] = {};  // sums for m, laid out as s; only the head's first two columns are used
    unrolled<2>([&](auto step) {
      uint32_t a[2][4];
      load_matrix_x4_transposed<step * 1024>(a[0], a_row);
      load_matrix_x4_transposed<step * 1024>(a[1], a_row ^ 32);
      const auto product = [&](float (&c)[2][4], uint32_t b0, uint32_t b1) {
#pragma unroll
        for (int i = 0; i < 2; ++i) mma<T>(c[i], a[i][0], a[i][1], a[i][2], a[i][3], b0, b1, c[i]);
      };
      uint32_t column[2];  // share as the sum of two numbers: rounded, and what rounding left
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float value = share[2 * step + half] * share_factor;
        const float upper = Pair<T>::unpack(Pair<T>::pack(value, 0.0f)).x;
        const bool used = lane.t == 0 || (kHeads == 2 && lane.t == 2);
        column[half] = transpose8x8(used ? Pair<T>::pack(upper, value - upper) : 0u);
      }
      product(columns, column[0], column[1]);
#pragma unroll
      for (int p = 0; p < kPartners; ++p) {
        const uint32_t row = b_row + p * BackwardLayout<kHeadDim, kStages>::kTileBytes;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          uint32_t b[4];
          load_matrix_x4_transposed<step * 1024>(b, row ^ (pair * 32));
          product(s[4 * p + 2 * pair], b[0], b[1]);
          product(s[4 * p + 2 * pair + 1], b[2], b[3]);
        }
      }
    });
#pragma unroll
    for (int r = 0; r < 4; ++r) m[r] += columns[r / 2][r % 2 * 2] + columns[r / 2][r % 2 * 2 + 1];
  }

  /// To be called after the last tile: multiplies everything by `factor` and takes the scales of fp16 out.
  __device__ __forceinline__ void finish(float factor) {
    if constexpr (kNarrow<T>) {
      factor /= u_scale.value;
      multiply(factor, factor / share_scale.value);
    } else {
      multiply(factor, factor);
    }
  }
  __device__ __forceinline__ void multiply(float s_factor, float m_factor) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) s[b][e / 4][e % 4] *= s_factor;
      if (e < 4) m[e] *= m_factor;
    }
  }

  /// The largest magnitude among the lane's sums.
  __device__ __forceinline__ float largest() const {
    float most = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) most = fmaxf(most, fabsf(s[b][e / 4][e % 4]));
      if (e < 4) most = fmaxf(most, fabsf(m[e]));
    }
    return most;
  }

  /// Adds the sums of all groups of warps, in the order of the groups, in the first group. They travel
  /// through the memory of the tiles, which must no longer be in use. All threads call it; it synchronises
  /// first.
  template <int kStages, bool kShort>
  __device__ __forceinline__ void add_groups(const BackwardBlock<kHeadDim, kStages, kShort>& block) {
    float4* shared = reinterpret_cast<float4*>(block.tiles + block.slice * kBytes);
    for (int other = 1; other < block.groups; ++other) {
      __syncthreads();
      if (block.group == other) send(shared, block.lane.index);
      __syncthreads();
      if (block.group == 0) receive(shared, block.lane.index);
    }
  }

  /// Adds the sums of the same warp of another group, read from `shared` (kBytes).
  __device__ void send(float4* shared, int lane) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        shared[(i * kBlocks + b) * 32 + lane] = make_float4(s[b][i][0], s[b][i][1], s[b][i][2], s[b][i][3]);
      }
    }
    shared[2 * kBlocks * 32 + lane] = make_float4(m[0], m[1], m[2], m[3]);
  }
  __device__ void receive(const float4* shared, int lane) {
    const auto plus = [&](float (&c)[4], int at) {
      const float4 other = shared[at * 32 + lane];
      c[0] += other.x, c[1] += other.y, c[2] += other.z, c[3] += other.w;
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) plus(s[b][i], i * kBlocks + b);
    }
    plus(m, 2 * kBlocks);
  }

  /// Visits the warp's matrix in a state in memory (launch.h): calls use(b, i, h, pointer to the lane's two
  /// columns).
  template <typename Float, typename Use>
  static __device__ __forceinline__ void for_each_pair(Float* state, int slice, const Lane& lane, Use use) {
    Float* row = state + static_cast<int64_t>(slice * kSliceChannels + lane.g) * kHeadDim + 2 * lane.t;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          if (kHeads == 2 && b / 2 != i) continue;
          use(b, i, h, row + (16 * i + 8 * h) * kHeadDim + (kHeads == 2 ? b % 2 : b) * 8);
        }
      }
    }
  }
  __device__ __forceinline__ void load_matrix(const float* state, int slice, const Lane& lane) {
    for_each_pair(state, slice, lane, [&](int b, int i, int h, const float* from) {
      const float2 x = *reinterpret_cast<const float2*>(from);
      s[b][i][2 * h] = x.x, s[b][i][2 * h + 1] = x.y;
    });
  }
  __device__ __forceinline__ void store_matrix(float* state, int slice, const Lane& lane) const {
    for_each_pair(state, slice, lane, [&](int b, int i, int h, float* to) {
      *reinterpret_cast<float2*>(to) = make_float2(s[b][i][2 * h], s[b][i][2 * h + 1]);
    });
  }
  /// Stores m to an array of the slice's channels.
  __device__ __forceinline__ void store_mean(float* mean, const Lane& lane, float factor = 1.0f) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (lane.t != (kHeads == 2 ? 2 * i : 0)) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        mean[16 * i + 8 * h + lane.g] = m[2 * i + h] * factor;
      }
    }
  }

  /// Stores the slice's rows of the matrix, times `factor` and rounded, where the products of BackwardBlock
  /// read them.
  template <int kStages, bool kShort>
  __device__ __forceinline__ void pack(const BackwardBlock<kHeadDim, kStages, kShort>& block,
                                       float factor) const {
    using Layout = BackwardLayout<kHeadDim, kStages>;
    unrolled<kBlocks>([&](auto b) {
      unrolled<4>([&](auto rows) {
        constexpr int i = rows / 2, h = rows % 2;
        const uint32_t to = block.word(block.slice_state(), b % 4 ^ rows);
        const bool used = kHeads == 1 || b / 2 == i;
        store_shared<b / 4 * Layout::kMatrix + rows * 512>(
            to, used ? Pair<T>::pack(s[b][i][2 * h] * factor, s[b][i][2 * h + 1] * factor) : 0u);
      });
    });
  }
};

/// Brings S and m of one window, or their gradients, from memory to where the block's products read them. All
/// threads call it; it synchronises before and after. kSplit is that of pack_mean.
template <typename T, bool kSplit, int kHeadDim, int kStages, bool kShort>
__device__ __forceinline__ void load_state(const BackwardBlock<kHeadDim, kStages, kShort>& block,
                                           const float* state) {
  const float* mean = state + block.channels * kHeadDim;
  StateGradient<T, kHeadDim> s;
  float largest = 0.0f;
  if (block.group == 0) s.load_matrix(state, block.slice, block.lane);
  if constexpr (kNarrow<T>) {
    largest = s.largest();
    for (int c = threadIdx.x; c < block.channels; c += blockDim.x) largest = fmaxf(largest, fabsf(mean[c]));
  }
  const float factor = block.template agree_on_scale<T>(largest);
  for (int c = threadIdx.x; c < block.channels; c += blockDim.x) {
    block.mean(c / kSliceChannels)[c % kSliceChannels] = mean[c] * factor;
  }
  if (block.group == 0) s.pack(block, factor);
  __syncthreads();
  if (block.group == 0) block.template pack_mean<T, kSplit>();
  __syncthreads();
}

}  // namespace flatten::cuda::tensorcore
