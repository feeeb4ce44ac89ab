// Where the tokens of a window lie in memory (params.h, Geometry), in 32-bit arithmetic.
#pragma once

#include "mma.cuh"
#include "params.h"

namespace flatten::cuda::tensorcore {

/// One window of one image.
struct Window {
  int image, y, x;  // y and x of its first pixel on the rolled map

  __device__ Window(const WindowGrid& grid, int index) {
    int per_row = grid.windows_w;
    keep(per_row);  // keeps the compiler from computing more of this before a loop over windows
    const int per_image = grid.windows_h * per_row;
    image = index / per_image;
    const int inside = index - image * per_image;
    const int row = inside / per_row;
    y = row * grid.window_h + grid.shift_h;
    x = (inside - row * per_row) * grid.window_w + grid.shift_w;
  }

  /// The first token of a pixel row of the window, and the token of a column in it. A number below zero is
  /// large when it is unsigned, so the lesser of the two candidates is the one on the map.
  __device__ __forceinline__ int row(const WindowGrid& grid, int i) const {
    return on_map(grid, y + i) * grid.map_w;
  }
  /// The row of the map that is row i of the rolled map; i may reach into a second round.
  __device__ __forceinline__ int on_map(const WindowGrid& grid, int i) const {
    return min(static_cast<unsigned>(i), static_cast<unsigned>(i - grid.map_h));
  }
  __device__ __forceinline__ int column(const WindowGrid& grid, int j) const {
    return min(static_cast<unsigned>(x + j), static_cast<unsigned>(x + j - grid.map_w));
  }

  /// The tokens number n, n + kStep, n + 2 kStep .. in the window's raster order; `last` for numbers beyond
  /// it.
  template <int kStep = 8, int kCount>
  __device__ __forceinline__ void tokens(int (&token)[kCount], const WindowGrid& grid, int n,
                                         int last) const {
#pragma unroll
    for (int r = 0; r < kCount; ++r) token[r] = min(n + kStep * r, last);
    if (grid.raster) return;
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      const int i = token[r] / grid.window_w;
      token[r] = row(grid, i) + column(grid, token[r] - i * grid.window_w);
    }
  }
};

}  // namespace flatten::cuda::tensorcore
