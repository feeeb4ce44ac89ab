// What the host code of these kernels shares between forward and backward.
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

/// Cuts rows into chunks of a multiple of `step` rows, as many as make enough blocks for the device, but none
/// shorter than `least`.
struct RowChunks {
  int chunk, chunks;
  RowChunks(int rows, int step, int least, std::int64_t pieces, const Device& device) {
    const std::int64_t wanted = (kBlocksEach * device.multiprocessors + pieces - 1) / pieces;
    const std::int64_t most = std::max(1, rows / least);
    chunk = ceil_div(ceil_div(rows, std::clamp<std::int64_t>(wanted, 1, most)), step) * step;
    chunks = ceil_div(rows, chunk);
  }
  // Blocks for each multiprocessor, so that one that ends early does not leave it idle. Not measured on a
  // GPU.
  static constexpr std::int64_t kBlocksEach = 4;
};

/// Cuts windows into rectangles of at most kMostPixels pixels whose blocks, of `bytes(height, width)`, fit
/// the shared memory: into those that read the least halo for a pixel.
struct Rectangles {
  // A block of kMostWarps warps takes two rounds of rows at the most. A rectangle of kEnough pixels
  // reads 2.25 for each with 5 x 5 taps, smaller ones more. Neither the widths nor kEnough were measured on a
  // GPU.
  static constexpr int kMostPixels = 2 * kMostWarps * kTileRows, kMostWidth = 32, kLeastWidth = 8,
                       kEnough = 64;
  int height = 0, width = 0, columns = 0, count = 0;
  bool fit = false;

  template <class Bytes>
  Rectangles(const WindowGrid& grid, const Taps& taps, std::int64_t pieces, const Device& device,
             Bytes bytes) {
    // Two blocks share a multiprocessor where their rectangles are large enough then; else a block has it.
    for (const std::int64_t budget : {device.shared_bytes / 2 - 1024, device.shared_bytes}) {
      search(grid, taps, [&](int h, int w) { return bytes(h, w) <= budget; });
      fit = height > 0;
      if (fit && height * width >= std::min(grid.window_h * grid.window_w, kEnough)) break;
    }
    if (!fit) return;
    // Rectangles get shorter until there are two blocks for each multiprocessor.
    while (height > 4 && pieces * columns * ceil_div(grid.window_h, height) < 2 * device.multiprocessors) {
      height = ceil_div(height, 2);
    }
    height = ceil_div(grid.window_h, ceil_div(grid.window_h, height));  // all of much the same height
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

/// The launches that leave S and m, or their gradients.
struct StatePass {
  AccumulateParams params;
  const Kernels* kernels = nullptr;
  int windows = 0;
  std::int64_t size = 0;

  StatePass() = default;
  /// Sums the products of `features` and `other`, and multiplies the sums by `scale`.
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
