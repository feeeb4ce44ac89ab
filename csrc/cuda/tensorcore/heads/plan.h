// What the host code of these kernels shares, forward and backward.
#pragma once

#include "../plan.h"
#include "params.h"

namespace flatten::cuda::tensorcore::heads {

/// What keeps a call from these kernels, in the log's words; null: nothing.
const char* unsuited(const AttentionInputs& p, const Device& device);

const Kernels& kernels_of(const AttentionInputs& p);

/// q's and k's rows; `norms` is placed later.
Features query_features(const AttentionInputs& p);
Features key_features(const AttentionInputs& p);

inline std::int64_t rows_of(const AttentionInputs& p, const Features& side) {
  return p.geometry.batch * p.geometry.windows() * side.rows.tokens;
}

/// The launch that measures the rows of both.
MeasureParams measure_of(const AttentionInputs& p, const Features& query, const Features& key);

/// Chunks of a multiple of `step` rows, several of which make enough blocks for the device, but not shorter
/// than `least`.
struct RowChunks {
  int chunk, chunks;
  RowChunks(int rows, int step, int least, std::int64_t pieces, const Device& device) {
    const std::int64_t wanted = (kBlocksEach * device.multiprocessors + pieces - 1) / pieces;
    const std::int64_t most = std::max(1, rows / least);
    chunk = ceil_div(ceil_div(rows, std::clamp<std::int64_t>(wanted, 1, most)), step) * step;
    chunks = ceil_div(rows, chunk);
  }
  static constexpr std::int64_t kBlocksEach = 4;
};

/// Cuts windows into rectangles of at most kMostPixels pixels whose blocks `bytes(height, width)` fit: those
/// that read the least halo for a pixel.
struct Rectangles {
  static constexpr int kMostPixels = 2 * kMostWarps * kTileRows, kMostWidth = 32, kLeastWidth = 8,
                       kEnough = 64;
  int height = 0, width = 0, columns = 0, count = 0;
  bool fit = false;

  template <class Bytes>
  Rectangles(const WindowGrid& grid, const Taps& taps, std::int64_t pieces, const Device& device,
             Bytes bytes) {
    // For two blocks at once if they are large enough, else for one.
    for (const std::int64_t budget : {device.shared_bytes / 2 - 1024, device.shared_bytes}) {
      search(grid, taps, [&](int h, int w) { return bytes(h, w) <= budget; });
      fit = height > 0;
      if (fit && height * width >= std::min(grid.window_h * grid.window_w, kEnough)) break;
    }
    if (!fit) return;
    // Shorter ones where there are few blocks.
    while (height > 4 && pieces * columns * ceil_div(grid.window_h, height) < 2 * device.multiprocessors) {
      height = ceil_div(height, 2);
    }
    height = ceil_div(grid.window_h, ceil_div(grid.window_h, height));  // of even height
    count = columns * ceil_div(grid.window_h, height);
  }

 private:
  template <class Fits>
  void search(const WindowGrid& grid, const Taps& taps, Fits fits) {
    double best = 0;
    for (int cut = ceil_div(grid.window_w, kMostWidth);; ++cut) {
      const int w = ceil_div(grid.window_w, cut);
      int h = std::min(grid.window_h, std::max(1, kMostPixels / w));
      while (h > 0 && !fits(h, w)) --h;
      const double with_halo = static_cast<double>((h + taps.kernel_h - 1) * (w + taps.kernel_w - 1));
      if (h > 0 && h * w / with_halo > best) {
        best = h * w / with_halo;
        height = h, width = w, columns = ceil_div(grid.window_w, w);
      }
      if (w <= kLeastWidth) break;
    }
  }
};

/// S and m.
struct StatePass {
  AccumulateParams params;
  const Kernels* kernels = nullptr;
  int windows = 0;
  std::int64_t size = 0;

  StatePass() = default;
  /// Of `features` and `other`; `scale`: of the sums.
  StatePass(const AttentionInputs& p, const Features& features, const Tokens& other, double scale,
            const Device& device);
  std::int64_t bytes() const { return windows * size * std::int64_t{sizeof(float)}; }
  /// Memory for the parts, if there are any; `state` takes the result.
  void place(float* state, Workspace& workspace);
  cudaError_t launch(float* state, cudaStream_t stream) const;
};

/// The multiplication of rows with a matrix each head, cut into blocks. `taps` read `pixels`; null: none.
MultiplyParams multiply_of(const AttentionInputs& p, Product product, const Features& features,
                           const Tokens* pixels, const Kernels& kernels, const Device& device);

}  // namespace flatten::cuda::tensorcore::heads
