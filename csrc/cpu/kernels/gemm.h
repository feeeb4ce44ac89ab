// The small matrix products of one head, in register tiles: R rows x V vectors of sums, for each step R
// broadcasts and V loads. Rows of every operand lie `padded` elements apart.
#pragma once

#include "rows.h"

namespace flatten::cpu::FLATTEN_ISA {

/// Steps of a product between two calls of Upcoming::step(). Measured: four or sixteen are no better
/// (benchmarks/NOTES.md, "Its pace").
constexpr i64 kStepsAtOnce = 8;

/// acc[r][v] += sum over k of a[r * a_row + k * a_step] * b[k * b_step + v * lanes]
template <int R, int V, class T>
FLATTEN_INLINE void accumulate(Vec<T> (&acc)[R][V], const T* a, i64 a_row, i64 a_step, const T* b, i64 b_step,
                               i64 steps, Upcoming& upcoming) {
  const auto step = [&]() FLATTEN_INLINED {
    Vec<T> bv[V];
    unrolled<V>([&](auto v) FLATTEN_INLINED { bv[v] = load(b + v * kLanes<T>); });
    unrolled<R>([&](auto r) FLATTEN_INLINED {
      const Vec<T> ar = broadcast(a[r * a_row]);
      unrolled<V>([&](auto v) FLATTEN_INLINED { acc[r][v] = fma(ar, bv[v], acc[r][v]); });
    });
    a += a_step;
    b += b_step;
  };
  for (; steps >= kStepsAtOnce; steps -= kStepsAtOnce) {
#pragma GCC unroll 8
    for (int k = 0; k < kStepsAtOnce; ++k) step();
    upcoming.step();
  }
  for (; steps > 0; --steps) step();
}

/// How many of the `left` vectors of a row the next tile takes: two, or four where there are 32 registers,
/// but three where that would leave a last tile of one vector. Tiles then have 8 to 24 sums, which hide each
/// other's latency.
constexpr i64 tile_vectors(i64 left) {
  const bool wide = kRegisters == 32;
  return left == 1 ? 1 : left == 3 ? 3 : !wide || left == 2 ? 2 : left == 5 ? 3 : 4;
}
constexpr int kMostVectors = kRegisters == 32 ? 4 : 3;
/// Whether rows of `vectors` vectors are cut into some tile of `size` vectors; true if `vectors` is 0, which
/// stands for any number.
constexpr bool has_tiles_of(i64 vectors, i64 size) {
  for (i64 left = vectors; left > 0; left -= tile_vectors(left)) {
    if (tile_vectors(left) == size) return true;
  }
  return vectors == 0;
}

/// The most rows of a tile of `vectors` vectors: its sums, the vectors of one step and one broadcast fill the
/// registers.
template <class T>
constexpr int tile_rows(i64 vectors) {
  const bool wide = kRegisters == 32;
  if (sizeof(T) == 8) return 4;  // fewer to compile
  return vectors == 1 ? (wide ? 12 : 6) : vectors == 2 ? (wide ? 8 : 6) : vectors == 3 && !wide ? 4 : 6;
}

/// tile.run<R, V>(first row, column) over rows of `padded` elements, cut into tiles. Only the sizes are
/// compiled that kRows and kPadded need; 0 stands for any number.
template <class T, int kRows, int kPadded, class TileBody>
FLATTEN_INLINE void for_tiles(i64 rows, i64 padded, const TileBody& tile, Upcoming& upcoming) {
  i64 column = 0;
  for (i64 left = padded / kLanes<T>; left > 0; left -= tile_vectors(left)) {
    with_size<1, kMostVectors>(tile_vectors(left), [&](auto vectors) FLATTEN_INLINED {
      constexpr int kV = decltype(vectors)::value, kMost = tile_rows<T>(kV);
      constexpr int kTiles = ceil_div(kRows, kMost);
      constexpr int kLeast = kRows ? kRows / kTiles : 1, kLargest = kRows ? ceil_div(kRows, kTiles) : kMost;
      if constexpr (has_tiles_of(kPadded / kLanes<T>, kV)) {
        in_pieces<kLeast, kLargest>(rows, [&](auto size, i64 row) FLATTEN_INLINED {
          tile.template run<decltype(size)::value, kV>(row, column, upcoming);
        });
        column += kV * kLanes<T>;
      }
    });
  }
}

/// How often a product of `rows` rows and `padded` columns calls Upcoming::step(), about.
template <class T>
i64 product_steps(i64 rows, i64 padded, i64 steps) {
  i64 tiles = 0;
  for (i64 left = padded / kLanes<T>; left > 0; left -= tile_vectors(left)) {
    tiles += ceil_div(rows, tile_rows<T>(tile_vectors(left)));
  }
  return tiles * (steps / kStepsAtOnce);
}

/// A tile of product(). kSquare says that `steps` is kPadded too.
template <class T, int kPadded, bool kSquare>
struct ProductTile {
  const T *a, *b, *start, *factor;
  T* out;
  i64 steps, stride;

  template <int R, int V>
  FLATTEN_INLINE void run(i64 row, i64 column, Upcoming& upcoming) const {
    const i64 n = kPadded ? kPadded : stride;
    Vec<T> acc[R][V];
    unrolled<V>([&](auto v) FLATTEN_INLINED {
      const Vec<T> first = start ? load(start + column + v * kLanes<T>) : Vec<T>{};
      unrolled<R>([&](auto r) FLATTEN_INLINED { acc[r][v] = first; });
    });
    accumulate<R, V, T>(acc, a + row * n, n, 1, b + column, n, kPadded && kSquare ? kPadded : steps,
                        upcoming);
    unrolled<R>([&](auto r) FLATTEN_INLINED {
      const T f = factor[row + r];
      unrolled<V>([&](auto v) FLATTEN_INLINED {
        store(out + (row + r) * n + column + v * kLanes<T>, acc[r][v] * f);
      });
    });
  }
};

/// A tile of outer_product(). kAdds says that `sum` holds something to add to.
template <class T, int kPadded, bool kAdds>
struct OuterTile {
  const T *a, *b;
  T* sum;
  i64 steps, stride;

  template <int R, int V>
  FLATTEN_INLINE void run(i64 row, i64 column, Upcoming& upcoming) const {
    const i64 n = kPadded ? kPadded : stride;
    Vec<T> acc[R][V];
    T* s = sum + row * n + column;
    unrolled<R>([&](auto r) FLATTEN_INLINED {
      unrolled<V>([&](auto v) FLATTEN_INLINED {
        acc[r][v] = Vec<T>{};
        if constexpr (kAdds) acc[r][v] = load(s + r * n + v * kLanes<T>);
      });
    });
    accumulate<R, V, T>(acc, a + row, 1, n, b + column, n, steps, upcoming);
    unrolled<R>([&](auto r) FLATTEN_INLINED {
      unrolled<V>([&](auto v) FLATTEN_INLINED { store(s + r * n + v * kLanes<T>, acc[r][v]); });
    });
  }
};

/// out[t] = factor[t] * (start + a[t] b), for `tokens` rows a of `dim` elements and a dim x padded matrix b;
/// `start`, a row, may be null for zeros.
template <class T, int kPadded>
void product(i64 tokens, i64 dim, i64 padded, const T* a, const T* b, const T* start, const T* factor, T* out,
             Upcoming& upcoming) {
  for_tiles<T, 0, kPadded>(tokens, kPadded ? kPadded : padded,
                           ProductTile<T, kPadded, true>{a, b, start, factor, out, dim, padded}, upcoming);
}

/// The first `columns` (whole vectors) of out[t] = factor[t] * (a[t] b), for rows a of `steps` elements.
template <class T, int kPadded>
void partial_product(i64 tokens, i64 steps, i64 columns, i64 padded, const T* a, const T* b, const T* factor,
                     T* out, Upcoming& upcoming) {
  const ProductTile<T, kPadded, false> tile{a, b, nullptr, factor, out, steps, padded};
  for_tiles<T, 0, 0>(tokens, columns, tile, upcoming);
}

/// sum += a^T b, for `tokens` rows of a and b; sum is dim x padded.
template <class T, int kPadded>
void outer_product(i64 tokens, i64 dim, i64 padded, const T* a, const T* b, T* sum, Upcoming& upcoming) {
  for_tiles<T, kPadded, kPadded>(dim, kPadded ? kPadded : padded,
                                 OuterTile<T, kPadded, true>{a, b, sum, tokens, padded}, upcoming);
}

/// out = the first `rows` rows of a^T b.
template <class T, int kPadded>
void partial_outer_product(i64 tokens, i64 rows, i64 padded, const T* a, const T* b, T* out,
                           Upcoming& upcoming) {
  for_tiles<T, 0, kPadded>(rows, kPadded ? kPadded : padded,
                           OuterTile<T, kPadded, false>{a, b, out, tokens, padded}, upcoming);
}

/// The products for one head width; the common ones are compiled in.
template <class T>
struct Gemm {
  void (*product)(i64 tokens, i64 dim, i64 padded, const T* a, const T* b, const T* start, const T* factor,
                  T* out, Upcoming& upcoming);
  void (*outer_product)(i64 tokens, i64 dim, i64 padded, const T* a, const T* b, T* sum, Upcoming& upcoming);
  // For scores, whose rows and columns may be fewer than a head's.
  void (*partial_product)(i64 tokens, i64 steps, i64 columns, i64 padded, const T* a, const T* b,
                          const T* factor, T* out, Upcoming& upcoming);
  void (*partial_outer_product)(i64 tokens, i64 rows, i64 padded, const T* a, const T* b, T* out,
                                Upcoming& upcoming);

  template <int kPadded>
  static Gemm make() {
    constexpr int kWhole = kPadded % kLanes<T> == 0 ? kPadded : 0;
    constexpr int kScored = kPadded == 64 ? 64 : 0;  // PVT's
    return {&FLATTEN_ISA::product<T, kWhole>, &FLATTEN_ISA::outer_product<T, kWhole>,
            &FLATTEN_ISA::partial_product<T, kScored>, &FLATTEN_ISA::partial_outer_product<T, kScored>};
  }
  static Gemm select(i64 dim, i64 padded) {
    if constexpr (sizeof(T) == 4) {
      switch (dim == padded ? padded : 0) {
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

/// to = from^T, for `rows` rows of `dim` elements; `to` is zeroed up to a whole vector behind the last row's.
template <class T>
void transpose(const T* from, T* to, i64 rows, i64 dim, i64 padded) {
  i64 square_rows = 0, square_columns = 0;  // what whole squares of vectors make up
  if constexpr (sizeof(T) == 4) {
    square_rows = rows / kFloats * kFloats;
    square_columns = dim / kFloats * kFloats;
    for (i64 i = 0; i < square_columns; i += kFloats) {
      for (i64 j = 0; j < square_rows; j += kFloats) {
        FloatVec square[kFloats];
#pragma GCC unroll 16
        for (int r = 0; r < kFloats; ++r) square[r] = load(from + (j + r) * padded + i);
        transpose_square(square);
#pragma GCC unroll 16
        for (int r = 0; r < kFloats; ++r) store(to + (i + r) * padded + j, square[r]);
      }
    }
  }
  const i64 end = ceil_div(rows, kLanes<T>) * kLanes<T>;
  for (i64 i = 0; i < dim; ++i) {
    for (i64 j = i < square_columns ? square_rows : 0; j < rows; ++j)
      to[i * padded + j] = from[j * padded + i];
    for (i64 j = rows; j < end; ++j) to[i * padded + j] = 0;
  }
}

}  // namespace flatten::cpu::FLATTEN_ISA
