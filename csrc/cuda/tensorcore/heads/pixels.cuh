// The rows that a block takes where there are taps, and the pixels around them in shared memory.
#pragma once

#include "rows.cuh"

namespace flatten::cuda::tensorcore::heads {

/// `linear` rows from number `first` on, then a rectangle of the window's pixels.
struct Region {
  int first, linear, y, x, height, width;

  __device__ __forceinline__ int count() const { return linear + height * width; }
  __device__ __forceinline__ Spot at(const Rows& rows, const Window& window, int item) const {
    if (item < linear) return row_spot(rows, window, first + item);
    const int i = (item - linear) / width;
    return pixel_spot(rows, window, y + i, x + item - linear - i * width);
  }
};

/// Rectangle number `index` of a window; the first has the tokens before the map too, if they are asked for.
template <typename Params>
__device__ __forceinline__ Region rectangle(const Params& params, const Rows& rows, int index, bool prefix) {
  const int row = index / params.regions_x;
  const int y = row * params.region_h, x = (index - row * params.regions_x) * params.region_w;
  return {0, prefix && index == 0 ? rows.prefix : 0,       y,
          x, min(params.region_h, rows.grid.window_h - y), min(params.region_w, rows.grid.window_w - x)};
}

/// A rectangle with its halo, row by row; a pixel is an odd number of 16-byte vectors.
template <int kSlices>
struct PixelBlock {
  static constexpr int kVectors = kSlices * 4, kPixel = kVectors * 16 + 16;
  uint32_t address;
  int row_pixels;  // of the largest rectangle

  static __host__ __device__ int bytes(int height, int width, int kernel_h, int kernel_w) {
    return (height + kernel_h - 1) * (width + kernel_w - 1) * kPixel;
  }

  /// Starts to copy the head's channels of the pixels; zeros from beyond the window.
  __device__ __forceinline__ void load(const TokenArray& x, const Rows& rows, const Window& window,
                                       const Region& region, int kernel_h, int kernel_w, int channel,
                                       int head_dim) const {
    const int height = region.height + kernel_h - 1, width = region.width + kernel_w - 1;
    const int vector = threadIdx.x % kVectors;
    if (vector * 8 < head_dim) {
      for (int i = threadIdx.x / kVectors; i < height * width; i += blockDim.x / kVectors) {
        const int row = i / width, column = i - row * width;
        const int y = region.y + row - kernel_h / 2, x0 = region.x + column - kernel_w / 2;
        const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(rows.grid.window_h) &&
                            static_cast<unsigned>(x0) < static_cast<unsigned>(rows.grid.window_w);
        const int token = inside ? pixel_spot(rows, window, y, x0).token : 0;
        copy_async_or_zeros<0>(address + (row * row_pixels + column) * kPixel + vector * 16,
                               row_of(x, window.image, token, channel + vector * 8), inside ? 16 : 0);
      }
    }
    copy_async_commit();
  }

  /// Where the taps of an item begin: its pixel at the first tap. Other rows have that of some pixel.
  __device__ __forceinline__ uint32_t first_tap(const Region& region, int item) const {
    const int pixel = min(max(item - region.linear, 0), region.height * region.width - 1);
    const int y = pixel / region.width;
    return address + (y * row_pixels + pixel - y * region.width) * kPixel;
  }
};

/// How far a tap's pixel is from that of the first tap. A number beyond the taps gives the last one.
template <int kSlices>
__device__ __forceinline__ int tap_offset(int tap, int kernel_h, int kernel_w, int row_pixels) {
  tap = min(tap, kernel_h * kernel_w - 1);
  const int y = tap / kernel_w;
  return (y * row_pixels + tap - y * kernel_w) * PixelBlock<kSlices>::kPixel;
}

}  // namespace flatten::cuda::tensorcore::heads
