// The small matrix products of one head, in register tiles: kTileRows x kTileVecs vectors of accumulators,
// one broadcast and kTileVecs loads a step. All blocks are head-major: rows `padded` elements apart.
#pragma once

#include "layout.h"

namespace flatten::cpu::FLATTEN_ISA {

constexpr int kTileVecs = kRegisters == 32 ? 4 : 2;
constexpr int kTileRows = 6;

/// acc[r][v] += sum over k of a[r * a_row + k * a_step] * b[k * b_step + v * lanes]
template <int R, int V, class T>
FLATTEN_INLINE void accumulate(Vec<T> (&acc)[R][V], const T* a, i64 a_row, i64 a_step, const T* b, i64 b_step,
                               i64 steps) {
  for (i64 k = 0; k < steps; ++k) {
    Vec<T> bv[V];
    for (int v = 0; v < V; ++v) bv[v] = load(b + v * kLanes<T>);
    for (int r = 0; r < R; ++r) {
      const Vec<T> ar = broadcast(a[r * a_row]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(ar, bv[v], acc[r][v]);
    }
    a += a_step;
    b += b_step;
  }
}

/// Cuts `rows` into tiles as even as can be and the vectors of a row into tiles of at most kTileVecs, and
/// calls tile.run<R, V>(first row, first element) for each.
template <int V, class T, class TileBody>
FLATTEN_INLINE void for_row_tiles(i64 rows, i64 column, const TileBody& tile) {
  const i64 tiles = ceil_div(rows, kTileRows);
  i64 row = 0;
  for (i64 i = 0; i < tiles; ++i) {
    const i64 next = rows * (i + 1) / tiles;
    switch (next - row) {
      case 1:
        tile.template run<1, V>(row, column);
        break;
      case 2:
        tile.template run<2, V>(row, column);
        break;
      case 3:
        tile.template run<3, V>(row, column);
        break;
      case 4:
        tile.template run<4, V>(row, column);
        break;
      case 5:
        tile.template run<5, V>(row, column);
        break;
      default:
        tile.template run<6, V>(row, column);
        break;
    }
    row = next;
  }
}

template <class T, class TileBody>
FLATTEN_INLINE void for_tiles(i64 rows, i64 padded, const TileBody& tile) {
  static_assert(kTileRows == 6);
  i64 column = 0;
  for (; column + kTileVecs * kLanes<T> <= padded; column += kTileVecs * kLanes<T>) {
    for_row_tiles<kTileVecs, T>(rows, column, tile);
  }
  for (; column < padded; column += kLanes<T>) for_row_tiles<1, T>(rows, column, tile);
}

template <class T, int kPadded>
struct ProductTile {
  const T *a, *b, *factor;
  T* out;
  i64 steps, stride;

  template <int R, int V>
  FLATTEN_INLINE void run(i64 row, i64 column) const {
    const i64 n = kPadded ? kPadded : stride;
    Vec<T> acc[R][V] = {};
    accumulate<R, V, T>(acc, a + row * n, n, 1, b + column, n, steps);
    for (int r = 0; r < R; ++r) {
      const T f = factor[row + r];
      for (int v = 0; v < V; ++v) store(out + (row + r) * n + column + v * kLanes<T>, acc[r][v] * f);
    }
  }
};

template <class T, int kPadded>
struct OuterTile {
  const T *a, *b;
  T* sum;
  i64 steps, stride;

  template <int R, int V>
  FLATTEN_INLINE void run(i64 row, i64 column) const {
    const i64 n = kPadded ? kPadded : stride;
    Vec<T> acc[R][V];
    T* s = sum + row * n + column;
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) acc[r][v] = load(s + r * n + v * kLanes<T>);
    }
    accumulate<R, V, T>(acc, a + row, 1, n, b + column, n, steps);
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) store(s + r * n + v * kLanes<T>, acc[r][v]);
    }
  }
};

/// out[t] = factor[t] * a[t] b, for `tokens` rows a of `dim` elements and a dim x padded matrix b.
template <class T, int kPadded>
void product(i64 tokens, i64 dim, i64 padded, const T* a, const T* b, const T* factor, T* out) {
  for_tiles<T>(tokens, kPadded ? kPadded : padded, ProductTile<T, kPadded>{a, b, factor, out, dim, padded});
}

/// sum += a^T b, for `tokens` rows of a and b; sum is dim x padded.
template <class T, int kPadded>
void outer_product(i64 tokens, i64 dim, i64 padded, const T* a, const T* b, T* sum) {
  for_tiles<T>(dim, kPadded ? kPadded : padded, OuterTile<T, kPadded>{a, b, sum, tokens, padded});
}

/// The products for one head width; the common ones have their strides compiled in.
template <class T>
struct Gemm {
  void (*product)(i64 tokens, i64 dim, i64 padded, const T* a, const T* b, const T* factor, T* out);
  void (*outer_product)(i64 tokens, i64 dim, i64 padded, const T* a, const T* b, T* sum);

  template <int kPadded>
  static Gemm make() {
    return {&FLATTEN_ISA::product<T, kPadded>, &FLATTEN_ISA::outer_product<T, kPadded>};
  }
  static Gemm select(i64 padded) {
    if constexpr (sizeof(T) == 4) {
      switch (padded) {
        case 16:
          return make<16>();
        case 24:
          return make<24>();
        case 32:
          return make<32>();
        case 48:
          return make<48>();
        case 64:
          return make<64>();
        case 96:
          return make<96>();
        case 128:
          return make<128>();
        default:
          break;
      }
    }
    return make<0>();
  }
};

/// to = from^T, dim x dim inside dim x padded; the padding of `to` is zeroed.
template <class T>
void transpose(const T* from, T* to, i64 dim, i64 padded) {
  for (i64 i = 0; i < dim; ++i) {
    for (i64 j = 0; j < dim; ++j) to[i * padded + j] = from[j * padded + i];
    for (i64 j = dim; j < padded; ++j) to[i * padded + j] = 0;
  }
}

}  // namespace flatten::cpu::FLATTEN_ISA
