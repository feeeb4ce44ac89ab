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

/// Cuts windows into rectangles of at most kMostPixels pixels whose blocks `bytes(height, width)` fit.
struct Rectangles {
  static constexpr int kMostPixels = 2 * kMostWarps * kTileRows, kMostWidth = 32;
  int height, width, columns, count;
  bool fit = false;

  template <class Bytes>
  Rectangles(const WindowGrid& grid, std::int64_t pieces, const Device& device, Bytes bytes) {
    const std::int64_t half = device.shared_bytes / 2 - 1024;  // for two blocks at once
    columns = ceil_div(grid.window_w, kMostWidth);
    for (const std::int64_t budget : {half, device.shared_bytes}) {
      for (;; ++columns) {
        width = ceil_div(grid.window_w, columns);
        const int most = std::min(grid.window_h, std::max(1, kMostPixels / width));
        for (height = most; height > 0; --height) {
          if (bytes(height, width) <= budget) break;
        }
        // Not narrow rows, whose halo would be most of what is read.
        if (height >= std::min(grid.window_h, 4) || width <= 4) break;
      }
      fit = height > 0;
      if (fit) break;
      columns = ceil_div(grid.window_w, kMostWidth);
    }
    if (!fit) return;
    columns = ceil_div(grid.window_w, width);
    // Shorter ones where there are few blocks.
    while (height > 4 && pieces * columns * ceil_div(grid.window_h, height) < 2 * device.multiprocessors) {
      height = ceil_div(height, 2);
    }
    height = ceil_div(grid.window_h, ceil_div(grid.window_h, height));  // of even height
    count = columns * ceil_div(grid.window_h, height);
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
