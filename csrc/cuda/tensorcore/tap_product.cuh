// The depthwise taps as products on tensor cores: 8 x 4 pixels by 8 channels to a warp.
//
// An mma m16n8k16 takes two taps: its A fragment is two rows of eight pixels by eight channels, twice, at the
// shifts of the two taps; its B fragment holds the taps' weights of the eight channels on two 8x8 diagonals.
// Seven of eight products are with zeros, and it is still several times fewer instructions than an FMA per
// tap and number. A's 8x8 blocks (eight pixels of an input row, at one shift dx) come by ldmatrix and serve
// every dy.
#pragma once

#include "focus.cuh"

namespace flatten::cuda::tensorcore {

/// The table of taps in shared memory: of each channel a word per tap, the weight in the half that the
/// channel has in a fragment register; an odd number of 16-byte vectors per channel, so that two channels'
/// vectors lie in different banks. Lanes off the diagonal read the zeros behind the table. Then the bias.
template <int kTaps>
struct TapTable {
  static constexpr int kVectors = (kTaps * kTaps + 3) / 4;
  static constexpr int kStride = kVectors * 16;
  static constexpr int kZeros = (8 + kVectors) * 16;
  static_assert(kTaps == 0 || kVectors % 2 == 1, "an odd stride");

  static constexpr __host__ __device__ int bytes(int channels) {
    return kTaps ? (channels * (kStride + 4) + kZeros + 127) / 128 * 128 : 0;
  }
  static constexpr __host__ __device__ int bias_offset(int channels) { return channels * kStride + kZeros; }

  /// Fills the table of `rows` channels; row c holds the parameters' channel c % period. kMirrored: taps in
  /// reverse, for the gradient of the convolution's input.
  template <typename T, bool kMirrored = false>
  static __device__ __forceinline__ void load(unsigned char* table, const Floats& weight, const Floats& bias,
                                              int rows, int period) {
    uint32_t* words = reinterpret_cast<uint32_t*>(table);
    // Several rows at a time, or small blocks would wait for one load after another.
    constexpr int kAtOnce = 8;
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int tap = lane; tap < kVectors * 4; tap += 32) {
      const int from = kMirrored ? kTaps * kTaps - 1 - tap : tap;
      const bool used = tap < kTaps * kTaps;
      for (int first = threadIdx.x / 32; first < rows; first += kAtOnce * warps) {
        float w[kAtOnce];
        const auto row = [&](int i) { return first + i * warps; };
        const auto fetch = [&](const auto* weights) {
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const bool inside = used && row(i) < rows;
            w[i] = inside ? static_cast<float>(weights[row(i) % period * kTaps * kTaps + from]) : 0.0f;
          }
        };
        if (weight.half) {
          fetch(static_cast<const T*>(weight.data));
        } else {
          fetch(static_cast<const float*>(weight.data));
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (row(i) >= rows) continue;
          words[row(i) * kVectors * 4 + tap] =
              row(i) % 2 ? Pair<T>::pack(0.0f, w[i]) : Pair<T>::pack(w[i], 0.0f);
        }
      }
    }
    for (int i = threadIdx.x; i < kZeros / 4; i += blockDim.x) words[rows * kVectors * 4 + i] = 0;
    float* biases = reinterpret_cast<float*>(table + bias_offset(rows));
    for (int c = threadIdx.x; c < rows; c += blockDim.x) {
      biases[c] = bias.data ? element<T>(bias, c % period) : 0.0f;
    }
  }
};

/// Where a lane finds its row of the table, for an n-block of channels and the next ones.
template <int kTaps>
struct LaneTaps {
  uint32_t address;
  int step;  // bytes from one n-block to the next

  /// `rows` channels are in the table; the first n-block begins at `channel`.
  __device__ __forceinline__ LaneTaps(const unsigned char* table, int rows, int channel, const Lane& lane) {
    using Table = TapTable<kTaps>;
    const bool diagonal = lane.g / 2 == lane.t;
    // Lanes off the diagonal read zeros from a bank that the two diagonal lanes of their quarter warp leave
    // free.
    const int zeros = rows * Table::kStride + Table::kVectors * (lane.g / 2 * 2 + 2) % 8 * 16;
    address = shared_address(table) + (diagonal ? (channel + lane.g) * Table::kStride : zeros);
    step = diagonal ? 8 * Table::kStride : 0;
    keep(address), keep(step);
  }
};

/// A whole window in shared memory, row by row. `zeros` is the address of a pixel of zeros, which patches
/// read for pixels outside of the window.
struct Raster {
  uint32_t pixels, zeros;
  int pixel_bytes, row_bytes, width, height;
};

/// Where a lane finds the input rows of 8 x 4 output pixels, for ldmatrix.
template <int kTaps>
struct PixelRows {
  static constexpr int kRows = kTaps + 3;
  uint32_t row[kRows];  // address of the lane's 16 bytes of each row, at shift dx = lane / 8
  uint32_t fifth[2];    // kTaps 5 only: addresses at shift 4 of the input rows lane / 8 and lane / 8 + 4
  int rest;             // kTaps 7 only: bytes from shift lane / 8 to shift lane / 8 + 4, or to the last shift

  /// pixel: address of the patch's pixel lane % 8, shift 0, in the ring's first row; block: of four rows in
  /// the ring of kRingBlocks, where the step's input begins.
  template <int kRingBlocks>
  __device__ __forceinline__ void point(uint32_t pixel, int pixel_bytes, int row_bytes, int block,
                                        int matrix) {
#pragma unroll
    for (int i = 0; i < (kRows + 3) / 4; ++i) {
      uint32_t offset = pixel + block * kStepRows * row_bytes;
      block = block + 1 < kRingBlocks ? block + 1 : 0;
      if (i < 2) fifth[i] = offset + 4 * pixel_bytes + matrix * row_bytes;
      offset += min(matrix, kTaps - 1) * pixel_bytes;
#pragma unroll
      for (int j = 4 * i; j < min(4 * i + 4, kRows); ++j, offset += row_bytes) row[j] = offset;
    }
    rest = (min(matrix + 4, kTaps - 1) - matrix) * pixel_bytes;
  }

  /// The same in a raster, at the input pixel (top, left) of the window. Not for kTaps 7.
  __device__ __forceinline__ void point(const Raster& raster, int left, int top, const Lane& lane) {
    static_assert(kTaps <= 5);
    int index = lane.index;
    keep(index);  // keeps the compiler from computing parts of this before a loop over steps
    const int matrix = index / 8;
    left += index % 8;
    const auto inside = [](int i, int size) {
      return static_cast<unsigned>(i) < static_cast<unsigned>(size);
    };
    uint32_t pixel;
    int step;  // bytes to the row below
    const auto column = [&](int x) {
      const bool has = inside(x, raster.width);
      pixel = has ? raster.pixels + top * raster.row_bytes + x * raster.pixel_bytes : raster.zeros;
      step = has ? raster.row_bytes : 0;
    };
    column(left + min(matrix, kTaps - 1));
#pragma unroll
    for (int j = 0; j < kRows; ++j, pixel += step) {
      row[j] = inside(top + j, raster.height) ? pixel : raster.zeros;
    }
    column(left + 4);
    fifth[0] = inside(top + matrix, raster.height) ? pixel + matrix * step : raster.zeros;
    fifth[1] = inside(top + matrix + 4, raster.height) ? pixel + (matrix + 4) * step : raster.zeros;
  }

  __device__ __forceinline__ void advance(int bytes) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) row[j] += bytes;
    fifth[0] += bytes;
    fifth[1] += bytes;
  }
};

/// The same addresses from step to step, over a ring of kRingBlocks blocks of four rows.
template <int kTaps, int kRingBlocks>
struct RingRows {
  using Rows = PixelRows<kTaps>;
  uint32_t first;  // the lane's address of a block's first row, in block 0
  int row_bytes, fifth, rest;

  /// patch: address of the patch's first pixel, shift 0, in the ring's first row.
  __device__ __forceinline__ RingRows(uint32_t patch, int pixel_bytes, int row_bytes, const Lane& lane)
      : row_bytes(row_bytes) {
    const int matrix = lane.index / 8, shift = min(matrix, kTaps - 1);
    first = patch + (lane.index % 8 + shift) * pixel_bytes;
    fifth = (4 - shift) * pixel_bytes + matrix * row_bytes;
    rest = (min(matrix + 4, kTaps - 1) - matrix) * pixel_bytes;
    keep(first), keep(this->row_bytes), keep(fifth), keep(rest);
  }

  /// block: where the step's input begins.
  __device__ __forceinline__ void point(Rows& rows, int block) const {
    if constexpr (kTaps > 0) {
#pragma unroll
      for (int i = 0; i < (Rows::kRows + 3) / 4; ++i) {
        uint32_t row = first + block * (kStepRows * row_bytes);
        block = block + 1 < kRingBlocks ? block + 1 : 0;
        if (i < 2) rows.fifth[i] = row + fifth;
#pragma unroll
        for (int j = 4 * i; j < min(4 * i + 4, Rows::kRows); ++j, row += row_bytes) rows.row[j] = row;
      }
      rows.rest = rest;
    }
  }
};

/// out += the taps over eight channels of 8 x 4 pixels. Tile i is output rows 2i and 2i + 1; its A fragment
/// for the taps of row dy and two shifts is the input rows 2i + dy and 2i + dy + 1 at these shifts. taps:
/// shared address of the lane's row of the table. kOffset: of the channels in a pixel, in bytes.
template <typename T, int kTaps, int kOffset>
__device__ __forceinline__ void convolve(float (&out)[2][4], const PixelRows<kTaps>& pixels, uint32_t taps) {
  constexpr int kRows = kTaps + 3;
  uint32_t weight[(kTaps * kTaps + 3) / 4 * 4];
  // Shifts in pairs, and the last one with its neighbour below: kPaired shifts of the rows j - 1 and j.
  constexpr int kPaired = kTaps - 1;
  uint32_t block[2][2][4], last[kRows];
  unrolled<kRows>([&](auto row) {
    constexpr int j = row;
    constexpr int kLoaded = (j * kTaps + 3) / 4, kNeeded = ((j + 1) * kTaps + 3) / 4;  // vectors of taps
    if constexpr (j < kTaps) {
      unrolled<kNeeded - kLoaded>(
          [&](auto i) { load_shared<(kLoaded + i) * 16>(weight + (kLoaded + i) * 4, taps); });
    }
    load_matrix_x4<kOffset>(block[j % 2][0], pixels.row[j]);
    if (kTaps == 3) last[j] = block[j % 2][0][2];
    if (kTaps == 7) {
      load_matrix_x4<kOffset>(block[j % 2][1], pixels.row[j] + pixels.rest);
      last[j] = block[j % 2][1][2];
    }
    if (kTaps == 5 && j % 4 == 0) {
      uint32_t four[4];
      load_matrix_x4<kOffset>(four, pixels.fifth[j / 4]);
#pragma unroll
      for (int i = 0; i < 4; ++i) last[j + i] = four[i];
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int dy = j - 1 - 2 * tile;
      if (j == 0 || dy < 0 || dy >= kTaps) continue;
      const uint32_t* w = weight + dy * kTaps;
#pragma unroll
      for (int dx = 0; dx < kPaired; dx += 2) {
        const uint32_t (&upper)[4] = block[(j + 1) % 2][dx / 4];
        const uint32_t (&lower)[4] = block[j % 2][dx / 4];
        mma<T>(out[tile], upper[dx % 4], lower[dx % 4], upper[dx % 4 + 1], lower[dx % 4 + 1], w[dx],
               w[dx + 1], out[tile]);
      }
      if (dy % 2) {
        mma<T>(out[tile], last[j - 2], last[j - 1], last[j - 1], last[j], w[kPaired - kTaps], w[kPaired],
               out[tile]);
      } else if (dy == kTaps - 1) {
        mma_k8<T>(out[tile], last[j - 1], last[j], w[kPaired], out[tile]);
      }
    }
  });
}

}  // namespace flatten::cuda::tensorcore
