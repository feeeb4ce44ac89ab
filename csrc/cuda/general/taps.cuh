// The depthwise convolution of one tile and the gradient of its taps.
//
// A warp's lanes are 32 channels; a thread computes 2 x 4 positions at once, so that a row of values read
// from the staged halo serves up to 2 * K outputs from registers. K = 0 takes any odd kernel, unstaged.
#pragma once

#include "tiles.cuh"

namespace flatten::cuda::general {

inline constexpr int kAnyTaps = 0;
inline constexpr int kRuntimeTaps = -1;  // of a kernel that looks at the call

/// Which instantiation takes a kernel size: 3, 5 and 7 are staged; float64 and other sizes are not.
template <class T>
__host__ __device__ constexpr int taps_case(const Taps& taps) {
  const bool square = taps.kernel_h == taps.kernel_w && taps.kernel_h >= 3 && taps.kernel_h <= 7;
  return std::is_same_v<T, double> || (taps.weight.data && !square) ? kAnyTaps
         : taps.weight.data                                         ? static_cast<int>(taps.kernel_h)
                                                                    : 3;
}

inline constexpr int kPieceRows = 2, kPieceColumns = 4;
inline constexpr int kPieces = kSlots / (kPieceRows * kPieceColumns);

/// Positions of a tile with its border of K / 2.
template <int K>
__host__ __device__ constexpr int halo_positions(int log_width) {
  return K == kAnyTaps ? 0 : ((kSlots >> log_width) + K - 1) * ((1 << log_width) + K - 1);
}

/// Elements of the accumulate type a staged halo takes: values, then one int per position.
template <int K, class A>
__host__ __device__ constexpr int halo_elements(int log_width) {
  const int positions = halo_positions<K>(log_width);
  return positions * kWidth + (positions * static_cast<int>(sizeof(int)) + static_cast<int>(sizeof(A)) - 1) /
                                  static_cast<int>(sizeof(A));
}

/// One window of one image, and how its map is tiled.
struct MapWindow {
  TokenMap map;
  Tiling tiling;
  int window;

  /// The token at a position of the window, or -1 outside of it.
  __device__ int token(int y, int x) const {
    const bool inside = y >= 0 && y < map.window_h && x >= 0 && x < map.window_w;
    return inside ? map.at(window, y, x) : -1;
  }
};

/// Where the weight of a channel starts: shared kernels repeat every head_dim channels.
struct TapIndex {
  Taps taps;
  int head_dim;

  __device__ int kernel(int channel) const { return taps.per_channel ? channel : channel % head_dim; }
};

template <int N, class T, int K>
__device__ __forceinline__ void stage_halo_by(Acc<T>* halo, const int* tokens, int positions,
                                              const Reader<T>& in, Columns columns) {
  constexpr int lanes = kWidth / N;
  for (int i = threadIdx.x; i < positions * lanes; i += kThreads) {
    const int token = tokens[i / lanes], column = i % lanes * N;
    Acc<T> x[N] = {};
    if (token >= 0 && column < columns.width) load_pack<N>(in.row(token) + columns.first + column, x);
#pragma unroll
    for (int j = 0; j < N; ++j) halo[i / lanes * kWidth + column + j] = x[j];
  }
}

/// Stages a tile with its border. Synchronises before and after.
template <class T, int K>
__device__ void stage_halo(Acc<T>* halo, const Reader<T>& in, const MapWindow& where, int tile,
                           Columns columns) {
  const Tiling& t = where.tiling;
  const int width = t.tile_width() + K - 1, positions = (t.tile_height() + K - 1) * width;
  int* tokens = reinterpret_cast<int*>(halo + positions * kWidth);
  __syncthreads();
  for (int i = threadIdx.x; i < positions; i += kThreads) {
    tokens[i] = where.token(t.tile_y(tile) + i / width - K / 2, t.tile_x(tile) + i % width - K / 2);
  }
  __syncthreads();
  if (in.vector) {
    stage_halo_by<kVector<T>, T, K>(halo, tokens, positions, in, columns);
  } else {
    stage_halo_by<1, T, K>(halo, tokens, positions, in, columns);
  }
  __syncthreads();
}

/// The first row and column of a piece in its tile.
struct Piece {
  int y, x;
  __device__ Piece(const Tiling& t, int index) {
    const int across = t.tile_width() / kPieceColumns;
    y = index / across * kPieceRows;
    x = index % across * kPieceColumns;
  }
};

/// out[slot][lane] = sum over taps, without bias. `mirrored` turns the kernel by 180 degrees: the gradient.
template <class T, int K>
__device__ void convolve_staged(Acc<T>* out, const Acc<T>* halo, const Acc<T>* weights, const Tiling& t,
                                bool mirrored) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32, width = t.tile_width() + K - 1;
  A w[K * K];
#pragma unroll
  for (int i = 0; i < K * K; ++i) w[i] = weights[lane * K * K + (mirrored ? K * K - 1 - i : i)];
  for (int index = threadIdx.x / 32; index < kPieces; index += kWarps) {
    const Piece piece(t, index);
    A sum[kPieceRows][kPieceColumns] = {};
#pragma unroll
    for (int row = 0; row < kPieceRows + K - 1; ++row) {
      A x[kPieceColumns + K - 1];
#pragma unroll
      for (int i = 0; i < kPieceColumns + K - 1; ++i) {
        x[i] = halo[((piece.y + row) * width + piece.x + i) * kWidth + lane];
      }
#pragma unroll
      for (int r = 0; r < kPieceRows; ++r) {
        if (row - r < 0 || row - r >= K) continue;
#pragma unroll
        for (int c = 0; c < kPieceColumns; ++c) {
#pragma unroll
          for (int i = 0; i < K; ++i) sum[r][c] += w[(row - r) * K + i] * x[c + i];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kPieceRows; ++r) {
#pragma unroll
      for (int c = 0; c < kPieceColumns; ++c) {
        out[((piece.y + r) * t.tile_width() + piece.x + c) * kRow + lane] = sum[r][c];
      }
    }
  }
}

/// The same for any odd kernel, straight from global memory.
template <class T>
__device__ void convolve_any(Acc<T>* out, const Reader<T>& in, const MapWindow& where, int tile,
                             Columns columns, const TapIndex& index, bool mirrored) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32;
  if (lane >= columns.width) return;
  const Tiling& t = where.tiling;
  const int h = static_cast<int>(index.taps.kernel_h), w = static_cast<int>(index.taps.kernel_w);
  const std::int64_t kernel = static_cast<std::int64_t>(index.kernel(columns.first + lane)) * h * w;
  for (int slot = threadIdx.x / 32; slot < kSlots; slot += kWarps) {
    const int y = t.tile_y(tile) + (slot >> t.log_width), x = t.tile_x(tile) + (slot & (t.tile_width() - 1));
    A sum = 0;
    for (int i = max(0, h / 2 - y); i < min(h, t.window_h + h / 2 - y); ++i) {
      for (int j = max(0, w / 2 - x); j < min(w, t.window_w + w / 2 - x); ++j) {
        const int token = where.map.at(where.window, y + i - h / 2, x + j - w / 2);
        const int at = i * w + j;
        sum += load_parameter<T>(index.taps.weight, kernel + (mirrored ? h * w - 1 - at : at)) *
               widen(in.row(token)[columns.first + lane]);
      }
    }
    out[slot * kRow + lane] = sum;
  }
}

/// Shared memory of a convolution, in elements: staged halo and weights.
template <int K, class A>
__host__ __device__ constexpr int taps_elements(int log_width) {
  return K == kAnyTaps ? 0 : halo_elements<K, A>(log_width) + kWidth * K * K;
}

/// Convolves one tile of one block of columns into out[slot][column]. Synchronises before and after;
/// `scratch` holds taps_elements() and must not overlap `out`.
template <class T, int K>
__device__ void convolve(Acc<T>* out, Acc<T>* scratch, const Reader<T>& in, const MapWindow& where, int tile,
                         Columns columns, const TapIndex& index, bool mirrored) {
  if constexpr (K == kRuntimeTaps) {
    switch (taps_case<T>(index.taps)) {
      case 3:
        return convolve<T, 3>(out, scratch, in, where, tile, columns, index, mirrored);
      case 5:
        return convolve<T, 5>(out, scratch, in, where, tile, columns, index, mirrored);
      case 7:
        return convolve<T, 7>(out, scratch, in, where, tile, columns, index, mirrored);
      default:
        return convolve<T, kAnyTaps>(out, scratch, in, where, tile, columns, index, mirrored);
    }
  } else if constexpr (K == kAnyTaps) {
    __syncthreads();
    convolve_any<T>(out, in, where, tile, columns, index, mirrored);
  } else {
    Acc<T>* weights = scratch + halo_elements<K, Acc<T>>(where.tiling.log_width);
    stage_halo<T, K>(scratch, in, where, tile, columns);
    for (int i = threadIdx.x; i < kWidth * K * K; i += kThreads) {
      const int column = i / (K * K);
      const std::int64_t kernel = index.kernel(columns.first + column) * (K * K);
      weights[i] = column < columns.width ? load_parameter<T>(index.taps.weight, kernel + i % (K * K)) : 0;
    }
    __syncthreads();
    convolve_staged<T, K>(out, scratch, weights, where.tiling, mirrored);
  }
  __syncthreads();
}

/// Sums gradient * shifted input over tiles, per channel (lane) and tap, the bias last.
template <class T, int K>
struct TapGradient {
  using A = Acc<T>;
  A sum[K * K + 1] = {};

  __device__ __forceinline__ void add(const A* halo, const Reader<T>& grad, const MapWindow& where, int tile,
                                      Columns columns) {
    const Tiling& t = where.tiling;
    const int lane = threadIdx.x % 32, width = t.tile_width() + K - 1;
    for (int index = threadIdx.x / 32; index < kPieces; index += kWarps) {
      const Piece piece(t, index);
      A g[kPieceRows][kPieceColumns];
#pragma unroll
      for (int r = 0; r < kPieceRows; ++r) {
#pragma unroll
        for (int c = 0; c < kPieceColumns; ++c) {
          const int token = where.token(t.tile_y(tile) + piece.y + r, t.tile_x(tile) + piece.x + c);
          g[r][c] = token >= 0 && lane < columns.width ? widen(grad.row(token)[columns.first + lane]) : A(0);
          sum[K * K] += g[r][c];
        }
      }
#pragma unroll
      for (int row = 0; row < kPieceRows + K - 1; ++row) {
        A x[kPieceColumns + K - 1];
#pragma unroll
        for (int i = 0; i < kPieceColumns + K - 1; ++i) {
          x[i] = halo[((piece.y + row) * width + piece.x + i) * kWidth + lane];
        }
#pragma unroll
        for (int r = 0; r < kPieceRows; ++r) {
          if (row - r < 0 || row - r >= K) continue;
#pragma unroll
          for (int i = 0; i < K; ++i) {
#pragma unroll
            for (int c = 0; c < kPieceColumns; ++c) sum[(row - r) * K + i] += g[r][c] * x[c + i];
          }
        }
      }
    }
  }

  static constexpr int kScratch = kWarps * (K * K + 1) * kWidth;

  /// to(tap, lane, x), the bias as tap K * K; adds the warps in order. Synchronises before.
  template <class F>
  __device__ void store(A* scratch, F&& to) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();
#pragma unroll
    for (int i = 0; i <= K * K; ++i) scratch[(warp * (K * K + 1) + i) * kWidth + lane] = sum[i];
    __syncthreads();
    for (int i = warp; i <= K * K; i += kWarps) {
      A total = 0;
      for (int w = 0; w < kWarps; ++w) total += scratch[(w * (K * K + 1) + i) * kWidth + lane];
      to(i, lane, total);
    }
  }
};

}  // namespace flatten::cuda::general
