// The two matrix products of linear attention on staged tiles: FFMA in the accumulate type.
#pragma once

#include "tiles.cuh"

namespace flatten::cuda::general {

__device__ __forceinline__ void load_row(const float* from, float (&to)[4]) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

__device__ __forceinline__ void load_row(const double* from, double (&to)[4]) {
  const double2 x = *reinterpret_cast<const double2*>(from), y = *reinterpret_cast<const double2*>(from + 2);
  to[0] = x.x, to[1] = x.y, to[2] = y.x, to[3] = y.y;
}

/// sum over tokens of a[token]^T b[token], 32 x 32, and of weight[token] * a[token] (weight 1 if null), 32.
///
/// Every warp sums a quarter of the slots over the whole matrix: a lane holds 4 rows x 8 columns. `store`
/// adds the warps in order, so the result does not depend on timing.
template <class A>
struct OuterProduct {
  A sum[4][8] = {};
  A rows[4] = {};

  static __device__ int row() { return threadIdx.x % 32 / 4 * 4; }
  static __device__ int column() { return threadIdx.x % 4 * 8; }

  __device__ __forceinline__ void add(const A* a, const A* b, const A* weight = nullptr) {
    const int warp = threadIdx.x / 32;
#pragma unroll 4
    for (int slot = warp; slot < kSlots; slot += kWarps) {
      A x[4], y[4], z[4];
      load_row(a + slot * kRow + row(), x);
      load_row(b + slot * kRow + column(), y);
      load_row(b + slot * kRow + column() + 4, z);
      const A w = weight ? weight[slot] : A(1);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        rows[i] += w * x[i];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum[i][j] += x[i] * y[j];
          sum[i][j + 4] += x[i] * z[j];
        }
      }
    }
  }

  static constexpr int kScratch = kWarps * (kMatrixElements + kWidth);

  /// Calls to(row, column, x) for the matrix and to_row(row, x) for the weighted sum, once per element, over
  /// the block's threads. `scratch` holds kScratch elements, free at the call; synchronises before and after.
  template <class F, class G>
  __device__ void store(A* scratch, F&& to, G&& to_row) {
    const int warp = threadIdx.x / 32;
    A* row_scratch = scratch + kWarps * kMatrixElements;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      A* line = scratch + warp * kMatrixElements + (row() + i) * kRow + column();
#pragma unroll
      for (int j = 0; j < 8; ++j) line[j] = sum[i][j];
      if (column() == 0) row_scratch[warp * kWidth + row() + i] = rows[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kWidth * kWidth; i += kThreads) {
      const int at = i / kWidth * kRow + i % kWidth;
      A x = scratch[at];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) x += scratch[w * kMatrixElements + at];
      to(i / kWidth, i % kWidth, x);
    }
    if (threadIdx.x < kWidth) {
      A x = row_scratch[threadIdx.x];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) x += row_scratch[w * kWidth + threadIdx.x];
      to_row(static_cast<int>(threadIdx.x), x);
    }
    __syncthreads();
  }
};

/// rows[token] += a[token] * matrix: 64 x 32. A lane holds 4 tokens x 4 adjacent columns.
template <class A>
struct RowProduct {
  A sum[4][4] = {};

  /// The lane's tokens: interleaved, so that the rows of `a` a warp reads fall in different banks.
  static __device__ int slot(int i) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 8 + 4 * i; }
  static __device__ int column() { return threadIdx.x % 8 * 4; }

  __device__ __forceinline__ void add(const A* a, const A* matrix) {
#pragma unroll 2
    for (int k = 0; k < kWidth; k += 4) {
      A x[4][4], y[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) load_row(a + slot(i) * kRow + k, x[i]);
#pragma unroll
      for (int i = 0; i < 4; ++i) load_row(matrix + (k + i) * kRow + column(), y[i]);
#pragma unroll
      for (int l = 0; l < 4; ++l) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] += x[i][l] * y[l][j];
        }
      }
    }
  }
};

/// a[token] . vector over 32 channels for the token threadIdx.x / 2, whole in both of its threads.
template <class A>
__device__ __forceinline__ A row_dot(const A* a, const A* vector) {
  const int slot = threadIdx.x / 2, from = threadIdx.x % 2 * (kWidth / 2);
  A total = 0;
#pragma unroll
  for (int k = 0; k < kWidth / 2; k += 4) {
    A x[4], y[4];
    load_row(a + slot * kRow + from + k, x);
    load_row(vector + from + k, y);
#pragma unroll
    for (int i = 0; i < 4; ++i) total += x[i] * y[i];
  }
  return total + __shfl_xor_sync(0xffffffffu, total, 1);
}

/// The sum over the 8 lanes of a RowProduct that share their tokens, in all of them.
template <class A>
__device__ __forceinline__ A sum_of_row(A x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  x += __shfl_xor_sync(0xffffffffu, x, 2);
  return x + __shfl_xor_sync(0xffffffffu, x, 4);
}

/// Sums the 4 tokens of each lane and then the lanes and warps that share columns, in order: the column sums
/// of a RowProduct, in threads 0..31. `scratch` holds kWarps * kWidth elements.
template <class A>
__device__ A column_sums(A (&x)[4], A* scratch) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    x[j] += __shfl_xor_sync(0xffffffffu, x[j], 8);
    x[j] += __shfl_xor_sync(0xffffffffu, x[j], 16);
  }
  const int lane = threadIdx.x % 32;
  __syncthreads();
  if (lane < 8) {
#pragma unroll
    for (int j = 0; j < 4; ++j) scratch[threadIdx.x / 32 * kWidth + lane * 4 + j] = x[j];
  }
  __syncthreads();
  A total = 0;
  if (threadIdx.x < kWidth) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += scratch[w * kWidth + threadIdx.x];
  }
  return total;
}

}  // namespace flatten::cuda::general
