// What a warp does with the tiles of its head: products, S, the place in the plan, the pixels around a tile.
#pragma once

#include "by_head.cuh"
#include "reduce.cuh"
#include "state.cuh"

namespace flatten::cuda::general {

/// The lane's eight columns, by products, of a row of a tile.
__device__ __forceinline__ void load_columns(const HeadLane& at, const float* row, float (&to)[8]) {
  float x[4], y[4];
  load_pack<4>(row + at.columns, x);
  load_pack<4>(row + at.columns + 16, y);
#pragma unroll
  for (int c = 0; c < 4; ++c) to[c] = x[c], to[c + 4] = y[c];
}

/// rows[slot] += a[slot] * matrix over 32 channels, by products.
struct HeadProduct {
  float sum[4][8] = {};

  __device__ __forceinline__ void add(const HeadLane& at, const float* a, const float* matrix) {
#pragma unroll 2
    for (int k = 0; k < kWidth; k += 4) {
      float x[4][4];
#pragma unroll
      for (int t = 0; t < 4; ++t) load_pack<4>(a + at.slot_of_product(t) * kRow + k, x[t]);
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        float y[4], z[4];
        load_pack<4>(matrix + (k + l) * kRow + at.columns, y);
        load_pack<4>(matrix + (k + l) * kRow + at.columns + 16, z);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            sum[t][c] += x[t][l] * y[c];
            sum[t][c + 4] += x[t][l] * z[c];
          }
        }
      }
    }
  }
};

/// Where row i of a matrix for both products lies, such that neither meets a bank twice.
__host__ __device__ constexpr int permuted_row(int i) { return i % 16 / 4 + 4 * (i % 4 + i / 16 * 4); }

/// HeadProduct with a matrix whose rows are permuted.
struct HeadPermutedProduct : HeadProduct {
  __device__ __forceinline__ void add(const HeadLane& at, const float* a, const float* matrix) {
#pragma unroll 2
    for (int k = 0; k < kWidth; k += 4) {
      float x[4][4];
#pragma unroll
      for (int t = 0; t < 4; ++t) load_pack<4>(a + at.slot_of_product(t) * kRow + k, x[t]);
      const float* rows = matrix + permuted_row(k) * kRow;
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        float y[8];
        load_columns(at, rows + 4 * l * kRow, y);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
#pragma unroll
          for (int c = 0; c < 8; ++c) sum[t][c] += x[t][l] * y[c];
        }
      }
    }
  }

  /// rows[slot] += a[slot] * matrix^T
  __device__ __forceinline__ void add_transposed(const HeadLane& at, const float* a, const float* matrix) {
    const float* mine = matrix + at.lane % 4 * kRow;
#pragma unroll 2
    for (int k = 0; k < kWidth; k += 4) {
      float x[4][4];
#pragma unroll
      for (int t = 0; t < 4; ++t) load_pack<4>(a + at.slot_of_product(t) * kRow + k, x[t]);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        float y[4];
        load_pack<4>(mine + 4 * c * kRow + k, y);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
#pragma unroll
          for (int l = 0; l < 4; ++l) sum[t][c] += x[t][l] * y[l];
        }
      }
    }
  }
};

/// sum over the slots of a[slot]^T b[slot], 32 x 32: a lane has four rows and eight columns.
struct HeadOuter {
  float sum[4][8] = {};

  __device__ __forceinline__ void add(const HeadLane& at, const float* a, const float* b) {
#pragma unroll 8
    for (int slot = 0; slot < kHeadSlots; ++slot) {
      float x[4], y[4], z[4];
      load_pack<4>(a + slot * kRow + at.row * 4, x);
      load_pack<4>(b + slot * kRow + at.columns, y);
      load_pack<4>(b + slot * kRow + at.columns + 16, z);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          sum[r][c] += x[r] * y[c];
          sum[r][c + 4] += x[r] * z[c];
        }
      }
    }
  }

  /// Writes the sums to a state, and the means of the four channels that the lane has by rows.
  __device__ void store(const HeadLane& at, const State<float>& to, float (&mean)[4], float scale) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        to.put(0, 0, at.row * 4 + r, at.columns + HeadLane::column_step(c), sum[r][c] * scale);
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      mean[c] += __shfl_xor_sync(0xffffffffu, mean[c], 8);
      mean[c] += __shfl_xor_sync(0xffffffffu, mean[c], 16);
      if (at.sub == 0) to.put_mean(0, at.part * 4 + c, mean[c] * scale);
    }
  }
};

enum class Staged { kPlain, kTransposed, kPermuted };

/// S or its gradient of the warp's head in the warp's shared memory, zero behind the head.
template <Staged kStaged>
__device__ inline void stage_head_matrix(const HeadLane& at, const State<const float>& state, float* matrix) {
  const int column = at.part * 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = at.slot_of_row(i);
    float x[4] = {};
    // The head's width is a multiple of four.
    if (row < state.head_dim && column < state.head_dim)
      load_pack<4>(state.s + row * state.head_dim + column, x);
    if constexpr (kStaged == Staged::kTransposed) {
#pragma unroll
      for (int c = 0; c < 4; ++c) matrix[(column + c) * kRow + row] = x[c];
    } else {
      store_pack<4, float>(matrix + (kStaged == Staged::kPermuted ? permuted_row(row) : row) * kRow + column,
                           x);
    }
  }
}

__device__ inline void load_head_mean(int first, const State<const float>& state, float (&to)[4]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) to[c] = first + c < state.head_dim ? state.m[first + c] : 0.0f;
}

/// Where a block works: chunks fastest.
struct HeadPlace {
  int chunk, window;
  std::int64_t pair, batch;

  __device__ HeadPlace(const Plan& plan, const HeadSide& side)
      : chunk(static_cast<int>(blockIdx.x % side.chunks)), pair(blockIdx.x / side.chunks) {
    window = static_cast<int>(pair % plan.windows);
    batch = pair / plan.windows;
  }
};

/// The own slot's local index and token; -1 where there is none.
struct OwnToken {
  int local, token;

  __device__ OwnToken(const HeadLane& at, const TokenMap& map, const HeadTiling& tiling, int window, int tile)
      : local(tiling.local(tile, at.own_slot())), token(local < 0 ? -1 : map.at(window, local)) {}
};

/// A tile of a map in the warp's head with the pixels around it, K / 2 on each side; zeros outside of the
/// window.
template <int K>
struct HeadHalo {
  static constexpr int kPitch = 12;  // pixels of a row

  /// Starts to copy it; the caller waits, and synchronises the warp.
  static __device__ __forceinline__ void start(float* to, const HeadReader& in, const TokenMap& map,
                                               const HeadTiling& tiling, int window, int tile,
                                               const HeadLane& at) {
    const int y = tiling.y(tile) - K / 2, x = tiling.x(tile) - K / 2;
    const int map_y = window / map.windows_w * map.window_h + y + map.shift_h;
    const int map_x = window % map.windows_w * map.window_w + x + map.shift_w;
    std::int64_t offset[kPitch / 4];
    bool inside[kPitch / 4];
#pragma unroll
    for (int i = 0; i < kPitch / 4; ++i) {
      const int column = i * 4 + at.sub;
      inside[i] = in.active && x + column >= 0 && x + column < map.window_w;
      offset[i] = inside[i] ? wrapped(map_x + column, map.map_w) * in.stride : 0;
    }
    float* row_to = to + at.sub * kWidth + at.part * 4;
#pragma unroll
    for (int r = 0; r < kHeadRows + K - 1; ++r) {
      const bool row_inside = y + r >= 0 && y + r < map.window_h;
      const int row = row_inside ? wrapped(map_y + r, map.map_h) : 0;
      const float* from = in.data + (map.prefix + static_cast<std::int64_t>(row) * map.map_w) * in.stride;
#pragma unroll
      for (int i = 0; i < kPitch / 4; ++i) {
        copy_four(row_to + (r * kPitch + i * 4) * kWidth, from + offset[i], row_inside && inside[i]);
      }
    }
  }

  static __device__ int wrapped(int at, int size) { return at >= size ? at - size : at; }

  /// The pixels of row r that half a tile sees, of the lane's channel.
  static __device__ __forceinline__ void load(const float* halo, const HeadLane& at, int half, int r,
                                              float (&to)[4 + K - 1]) {
#pragma unroll
    for (int i = 0; i < 4 + K - 1; ++i) to[i] = halo[(r * kPitch + half * 4 + i) * kWidth + at.lane];
  }
};

/// Where pixel (row, column) of half a tile lies in it.
__device__ __forceinline__ int slot_of_pixel(int half, int row, int column) {
  return row * kHeadColumns + half * 4 + column;
}

/// Writes the values that each lane has of a tile, by pixels, to out[slot][channel].
__device__ __forceinline__ void store_pixels(const HeadLane& at, const float (&x)[2][4][4], float* out) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    out[slot_of_pixel(i / 16, i / 4 % 4, i % 4) * kRow + at.lane] = x[i / 16][i / 4 % 4][i % 4];
  }
}

/// The taps of the lane's channel, 0 behind the head.
template <int K>
__device__ void load_head_taps(const Taps& taps, const HeadLane& at, int head_dim, float (&to)[K * K]) {
  const int channel = min(at.lane, head_dim - 1);
  const float* from =
      static_cast<const float*>(taps.weight.data) +
      static_cast<std::int64_t>(taps.per_channel ? at.head * head_dim + channel : channel) * K * K;
#pragma unroll
  for (int i = 0; i < K * K; ++i) to[i] = from[i];
}

}  // namespace flatten::cuda::general
