// Pixel rows of a token tensor, with their halo, to the ring of rows in shared memory that the taps read.
#pragma once

#include "warp_tile.cuh"
#include "windows.cuh"

namespace flatten::cuda::tensorcore {

/// Copies a warp's channels of the rows that lie under a strip and its halo. Eight lanes copy adjacent
/// pixels, and write to different banks.
template <typename Traits>
class RowLoader {
 public:
  __device__ __forceinline__ RowLoader(const TokenArray& tokens, const WindowGrid& grid, const Window& window,
                                       int channels, int patches, uint32_t ring, int x0, int y_end,
                                       int warp_channel, int patch, const Lane& lane)
      : grid_(grid),
        window_(window),
        token_bytes_(tokens.token),
        patches_(patches),
        patch_(patch),
        rows_(min(grid.window_h, y_end + Traits::kHalo)),
        pixel_bytes_(Traits::pixel_bytes(channels)),
        row_bytes_(Traits::pitch(patches) * pixel_bytes_) {
    const int pixel = lane.index % 8, channel = warp_channel * 2 + lane.index / 8 * 16;
    to_ = ring + pixel * pixel_bytes_ + channel;
    const char* data = static_cast<const char*>(tokens.data) + window.image * tokens.image + channel;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = 8 * i + pixel, x = x0 - Traits::kHalo + column;
      const bool inside = x >= 0 && x < grid.window_w;
      from_[i] = data + static_cast<int64_t>(inside ? window.column(grid, x) : 0) * token_bytes_;
      bytes_[i] = column < Traits::pitch(patches) ? (inside ? 16 : 0) : -1;
      keep(from_[i]), keep(bytes_[i]);
    }
    keep(to_), keep(row_bytes_), keep(pixel_bytes_), keep(token_bytes_), keep(rows_);
  }

  /// Copies four rows, from row y of the window on, to a block of the ring. The warps of a strip's patches
  /// share the work.
  __device__ __forceinline__ void load_block(int y, int block) const {
    uint32_t to = to_ + (block * kStepRows + patch_) * row_bytes_;
    for (int j = patch_; j < kStepRows; j += patches_, to += patches_ * row_bytes_) {
      if (static_cast<unsigned>(y + j) < static_cast<unsigned>(rows_)) {
        const int token = window_.row(grid_, y + j);
        copy_row(to, [&](int i) { return advance(from_[i], token, token_bytes_); }, ~0);
      } else {
        copy_row(to, [&](int i) { return from_[i]; }, ~16);  // zeros
      }
    }
    copy_async_commit();
  }

 private:
  /// from(i) is where the lane reads column 8i + lane % 8; `mask` is applied to bytes_ (to copy zeros).
  template <typename From>
  __device__ __forceinline__ void copy_row(uint32_t to, From from, int mask) const {
    unrolled<kColumns>([&](auto i) {
      const char* row = from(i);
      unrolled<Traits::kSlices>([&](auto s) {
        if constexpr (i == 0) {  // every strip has these columns
          copy_async_or_zeros<s * 64>(to, row, bytes_[i] & mask);
        } else {
          copy_async<s * 64>(to, row, bytes_[i] & mask);
        }
      });
      to += 8 * pixel_bytes_;
    });
  }

  static constexpr int kColumns = (kMaxPatches * kPatchColumns + 2 * Traits::kHalo + 7) / 8;  // by eight
  const WindowGrid& grid_;
  const Window& window_;
  int token_bytes_, patches_, patch_, rows_, pixel_bytes_, row_bytes_;
  uint32_t to_;
  const char* from_[kColumns];
  int bytes_[kColumns];  // bytes to read: 16, or 0 outside of the window; -1 beyond the strip
};

}  // namespace flatten::cuda::tensorcore
