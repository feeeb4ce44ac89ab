// How the general kernels cut their work: a block of 128 threads walks over tiles of 64 tokens ("slots") and
// blocks of up to 32 channels of one head ("columns"), staged in shared memory in the accumulate type.
#pragma once

#include "element.cuh"

namespace flatten::cuda {

inline constexpr int kThreads = 128;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kSlots = 64;
inline constexpr int kWidth = 32;
// Rows of a staged tile are padded by 16 bytes (float): rows read side by side then hit different banks.
inline constexpr int kRow = kWidth + 4;
inline constexpr int kTileElements = kSlots * kRow;
inline constexpr int kMatrixElements = kWidth * kRow;
// A chunk is what one block handles: up to this many tiles.
inline constexpr int kChunkTiles = 4;
inline constexpr int kChunkSlots = kChunkTiles * kSlots;

/// Where the tokens of a window lie in the image (params.h, Geometry).
struct TokenMap {
  int prefix, map_h, map_w, window_h, window_w, windows_w, shift_h, shift_w;
  bool identity;  // one window without shift: local index = token

  __device__ int at(int window, int y, int x) const {
    int row = window / windows_w * window_h + y + shift_h;
    int column = window % windows_w * window_w + x + shift_w;
    if (row >= map_h) row -= map_h;
    if (column >= map_w) column -= map_w;
    return prefix + row * map_w + column;
  }

  __device__ int at(int window, int local) const {
    if (identity || local < prefix) return local;
    local -= prefix;
    return at(window, local / window_w, local % window_w);
  }
};

/// Tiles over the local tokens of a window: first `linear` tokens in runs of 64, then, for the taps, the
/// window's map in rectangles of 64 positions, 2^log_width wide.
struct Tiling {
  int linear, linear_tiles, tiles_x, tiles, log_width, window_h, window_w;

  __device__ int tile_height() const { return kSlots >> log_width; }
  __device__ int tile_width() const { return 1 << log_width; }

  __device__ bool on_map(int tile) const { return tile >= linear_tiles; }
  __device__ int tile_y(int tile) const { return (tile - linear_tiles) / tiles_x * tile_height(); }
  __device__ int tile_x(int tile) const { return (tile - linear_tiles) % tiles_x * tile_width(); }

  /// The local index of a slot, or -1.
  __device__ int local(int tile, int slot) const {
    if (!on_map(tile)) {
      const int index = tile * kSlots + slot;
      return index < linear ? index : -1;
    }
    const int y = tile_y(tile) + (slot >> log_width), x = tile_x(tile) + (slot & (tile_width() - 1));
    return y < window_h && x < window_w ? linear + y * window_w + x : -1;
  }
};

/// Up to 32 adjacent channels.
struct Columns {
  int first, width;
};

/// Block `index` of a head's columns.
__device__ inline Columns columns_of_head(int head, int index, int head_dim) {
  const int offset = index * kWidth;
  return {head * head_dim + offset, min(kWidth, head_dim - offset)};
}

/// One image of a (batch, token, channel) tensor. `vector`: rows and column blocks start on 16 bytes.
template <class T>
struct Reader {
  const T* data;
  std::int64_t stride;
  bool vector;

  __device__ const T* row(int token) const { return data + token * stride; }
};

template <class T>
struct Writer {
  T* data;
  std::int64_t stride;
  bool vector;

  __device__ T* row(int token) const { return data + token * stride; }
};

template <class T>
__device__ Reader<T> reader(const Tokens& t, std::int64_t batch, bool vector) {
  return {static_cast<const T*>(t.data) + batch * t.batch_stride, t.token_stride, vector};
}

template <class T>
__device__ Writer<T> writer(const MutableTokens& t, std::int64_t batch, bool vector) {
  return {static_cast<T*>(t.data) + batch * t.batch_stride, t.token_stride, vector};
}

/// What a block knows of the tokens of its chunk, in shared memory, by slot.
template <class A>
struct Rows {
  int* token;    // in the image, or -1
  int* local;    // in the window: the row of key_bias
  A* inverse;    // 1 / largest y of the row
  A* gain;       // phi = gain * (y * inverse)^p
  A* inverse_y;  // 1 / |y * inverse|^2
  A* inverse_p;  // 1 / |(y * inverse)^p|^2

  static constexpr int kElements = 4 * kChunkSlots + 2 * kChunkSlots * sizeof(int) / sizeof(A);

  __device__ explicit Rows(A* shared)
      : token(reinterpret_cast<int*>(shared + 4 * kChunkSlots)),
        local(token + kChunkSlots),
        inverse(shared),
        gain(shared + kChunkSlots),
        inverse_y(shared + 2 * kChunkSlots),
        inverse_p(shared + 3 * kChunkSlots) {}

  __device__ Rows tile(int index) const {
    Rows r = *this;
    const int skip = index * kSlots;
    r.token += skip, r.local += skip;
    r.inverse += skip, r.gain += skip, r.inverse_y += skip, r.inverse_p += skip;
    return r;
  }

  /// Looks up `tiles` tiles from `first` on; the caller synchronises.
  __device__ void find(const TokenMap& map, const Tiling& tiling, int window, int first, int tiles) const {
    for (int slot = threadIdx.x; slot < tiles * kSlots; slot += kThreads) {
      const int index = tiling.local(first + slot / kSlots, slot % kSlots);
      local[slot] = index;
      token[slot] = index < 0 ? -1 : map.at(window, index);
    }
  }
};

template <int N, class T, class F>
__device__ __forceinline__ void stage_by(Acc<T>* tile, const Reader<T>& in, const int* token, Columns columns,
                                         F&& map) {
  constexpr int lanes = kWidth / N;
#pragma unroll 2
  for (int i = threadIdx.x; i < kSlots * lanes; i += kThreads) {
    const int slot = i / lanes, column = i % lanes * N;
    Acc<T> x[N] = {};
    if (token[slot] >= 0 && column < columns.width) {
      load_pack<N>(in.row(token[slot]) + columns.first + column, x);
      map(slot, column, x);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) tile[slot * kRow + column + j] = x[j];
  }
}

/// tile[slot][column] = map(x), 0 where there is no token or channel. `map(slot, column, x)` changes the
/// values x[N] of adjacent channels in place.
template <class T, class F>
__device__ __forceinline__ void stage(Acc<T>* tile, const Reader<T>& in, const int* token, Columns columns,
                                      F&& map) {
  if (in.vector) {
    stage_by<kVector<T>>(tile, in, token, columns, map);
  } else {
    stage_by<1>(tile, in, token, columns, map);
  }
}

struct Identity {
  template <class X>
  __device__ void operator()(int, int, X&) const {}
};

/// Four adjacent channels of one token from global memory; channels past the width give 0.
template <class T>
__device__ __forceinline__ void load_four(const Reader<T>& in, int token, Columns columns, int column,
                                          Acc<T> (&x)[4]) {
  const T* from = in.row(token) + columns.first + column;
  if (in.vector && column + 4 <= columns.width) {
    load_pack<4>(from, x);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = column + j < columns.width ? widen(from[j]) : Acc<T>(0);
  }
}

template <class T>
__device__ __forceinline__ void store_four(const Writer<T>& out, int token, Columns columns, int column,
                                           const Acc<T> (&x)[4]) {
  T* to = out.row(token) + columns.first + column;
  if (out.vector && column + 4 <= columns.width) {
    store_pack<4>(to, x);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (column + j < columns.width) to[j] = narrow<T>(x[j]);
    }
  }
}

}  // namespace flatten::cuda
