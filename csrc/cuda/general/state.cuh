// S and m (or their gradients) of one head: where they lie in memory (launch.h) and how they are staged.
#pragma once

#include "plan.h"
#include "tiles.cuh"

namespace flatten::cuda::general {

template <class A>
struct State {
  using Value = std::remove_const_t<A>;
  A *s, *m;
  int head_dim;

  /// Of window `pair` in an array of states.
  __device__ State(A* states, const Plan& plan, std::int64_t pair, int head)
      : s(states + pair * plan.state() + static_cast<std::int64_t>(head) * plan.head_dim * plan.head_dim),
        m(states + pair * plan.state() + static_cast<std::int64_t>(plan.channels) * plan.head_dim +
          head * plan.head_dim),
        head_dim(plan.head_dim) {}

  /// Element (row, column) of matrix block (i, j), if it is inside the head.
  __device__ void put(int i, int j, int row, int column, Value x) const {
    row += i * kWidth, column += j * kWidth;
    if (row < head_dim && column < head_dim) s[row * head_dim + column] = x;
  }

  __device__ void put_mean(int i, int row, Value x) const {
    row += i * kWidth;
    if (row < head_dim) m[row] = x;
  }

  /// matrix[r][c] = block (i, j), or matrix[c][r], zero outside of the head.
  __device__ void stage_block(Value* matrix, int i, int j, bool transposed) const {
    for (int k = threadIdx.x; k < kWidth * kWidth; k += kThreads) {
      const int row = k / kWidth, column = k % kWidth;
      const int from_row = i * kWidth + row, from_column = j * kWidth + column;
      const bool inside = from_row < head_dim && from_column < head_dim;
      matrix[transposed ? column * kRow + row : row * kRow + column] =
          inside ? s[from_row * head_dim + from_column] : Value(0);
    }
  }

  /// m, zero behind the head, and all matrix blocks if they are resident. Synchronises before.
  __device__ void stage(Value* to_m, Value* matrices, const Plan& plan, bool transposed) const {
    __syncthreads();
    for (int c = threadIdx.x; c < plan.blocks * kWidth; c += kThreads)
      to_m[c] = c < head_dim ? m[c] : Value(0);
    for (int block = 0; plan.resident && block < plan.matrix_blocks; ++block) {
      stage_block(matrices + block * kMatrixElements, block / plan.blocks, block % plan.blocks, transposed);
    }
  }

  /// Block (i, j) in shared memory, staged now if it is not resident; the caller synchronises around it.
  __device__ const Value* matrix(Value* matrices, const Plan& plan, int i, int j, bool transposed) const {
    if (plan.resident) return matrices + (i * plan.blocks + j) * kMatrixElements;
    stage_block(matrices, i, j, transposed);
    return matrices;
  }
};

}  // namespace flatten::cuda::general
