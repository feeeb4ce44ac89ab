// The products of a head whose queries and keys have D_k channels and whose values have D_v.
#pragma once

#include "../attention.h"

namespace flatten::cpu::FLATTEN_ISA {

/// ProductTile (gemm.h) with rows of `a` that lie a_stride apart, those of b and out b_stride.
template <class T>
struct UnevenTile {
  const T *a, *b, *start, *factor;
  T* out;
  i64 steps, a_stride, b_stride;

  template <int R, int V>
  FLATTEN_INLINE void run(i64 row, i64 column, Upcoming& upcoming) const {
    Vec<T> acc[R][V];
    unrolled<V>([&](auto v) FLATTEN_INLINED {
      const Vec<T> first = start ? load(start + column + v * kLanes<T>) : Vec<T>{};
      unrolled<R>([&](auto r) FLATTEN_INLINED { acc[r][v] = first; });
    });
    accumulate<R, V, T>(acc, a + row * a_stride, a_stride, 1, b + column, b_stride, steps, upcoming);
    unrolled<R>([&](auto r) FLATTEN_INLINED {
      const T f = factor[row + r];
      unrolled<V>([&](auto v) FLATTEN_INLINED {
        store(out + (row + r) * b_stride + column + v * kLanes<T>, acc[r][v] * f);
      });
    });
  }
};

/// OuterTile (gemm.h) likewise.
template <class T>
struct UnevenOuterTile {
  const T *a, *b;
  T* sum;
  i64 steps, a_stride, b_stride;

  template <int R, int V>
  FLATTEN_INLINE void run(i64 row, i64 column, Upcoming& upcoming) const {
    Vec<T> acc[R][V];
    T* s = sum + row * b_stride + column;
    unrolled<R>([&](auto r) FLATTEN_INLINED {
      unrolled<V>([&](auto v) FLATTEN_INLINED { acc[r][v] = load(s + r * b_stride + v * kLanes<T>); });
    });
    accumulate<R, V, T>(acc, a + row, 1, a_stride, b + column, b_stride, steps, upcoming);
    unrolled<R>([&](auto r) FLATTEN_INLINED {
      unrolled<V>([&](auto v) FLATTEN_INLINED { store(s + r * b_stride + v * kLanes<T>, acc[r][v]); });
    });
  }
};

template <class T>
class Products {
 public:
  Products(Channels keys, Channels values)
      : k_(keys),
        v_(values),
        gemm_(Gemm<T>::select(keys.dim, keys.padded)),
        even_(keys.dim == values.dim),
        single_(!even_ && values.dim == 1 && keys.padded <= kMostOfSingle) {}

  /// out[t] = factor[t] * a[t] b: rows of D_k to rows of D_v by a D_k x D_v matrix.
  void to_values(int count, const T* a, const T* b, const T* factor, T* out, Upcoming& upcoming) const {
    if (even_) return gemm_.product(count, k_.dim, k_.padded, a, b, nullptr, factor, out, upcoming);
    if (single_) {
      read_ahead(steps(count), upcoming);
      return multiply_by_column(count, a, b, factor, out);
    }
    multiply({a, b, nullptr, factor, out, k_.dim, k_.padded, v_.padded}, count, upcoming);
  }
  /// out[t] = factor[t] * (start + a[t] b): rows of D_v to rows of D_k by a D_v x D_k matrix; `start`, a row,
  /// may be null for zeros.
  void to_keys(int count, const T* a, const T* b, const T* start, const T* factor, T* out,
               Upcoming& upcoming) const {
    if (even_) return gemm_.product(count, k_.dim, k_.padded, a, b, start, factor, out, upcoming);
    if (single_) {
      read_ahead(steps(count), upcoming);
      return multiply_by_row(count, a, b, start, factor, out);
    }
    multiply({a, b, start, factor, out, v_.dim, v_.padded, k_.padded}, count, upcoming);
  }
  /// sum += a^T b, D_k x D_v.
  void outer(int count, const T* a, const T* b, T* sum, Upcoming& upcoming) const {
    if (even_) return gemm_.outer_product(count, k_.dim, k_.padded, a, b, sum, upcoming);
    if (single_) {
      read_ahead(outer_steps(count), upcoming);
      return add_column(count, a, b, sum);
    }
    add_outer({a, b, sum, count, k_.padded, v_.padded}, upcoming);
  }
  /// How often one product with `count` tokens calls Upcoming::step(), about.
  i64 steps(i64 count) const { return product_steps<T>(count, v_.padded, k_.dim); }
  i64 outer_steps(i64 count) const { return product_steps<T>(k_.dim, v_.padded, count); }

 private:
  static __attribute__((noinline)) void multiply(const UnevenTile<T>& tile, i64 rows, Upcoming& upcoming) {
    for_tiles<T, 0, 0>(rows, tile.b_stride, tile, upcoming);
  }
  __attribute__((noinline)) void add_outer(const UnevenOuterTile<T>& tile, Upcoming& upcoming) const {
    for_tiles<T, 0, 0>(k_.dim, v_.padded, tile, upcoming);
  }

  static void read_ahead(i64 steps, Upcoming& upcoming) {
    for (; steps > 0; --steps) upcoming.step();
  }

  // Where values have one channel, S is a column: rows of it are vectors with one number in each.
  void multiply_by_column(int count, const T* a, const T* b, const T* factor, T* out) const {
    T column[kMostOfSingle] = {}, dots[kBlock];
    for (i64 d = 0; d < k_.dim; ++d) column[d] = b[d * v_.padded];
    row_dots(a, column, count, k_.padded, dots);
    for (int t = 0; t < count; ++t) {
      Vec<T> first{};
      first[0] = factor[t] * dots[t];
      store(out + t * v_.padded, first);
    }
  }
  void multiply_by_row(int count, const T* a, const T* b, const T* start, const T* factor, T* out) const {
    for (int t = 0; t < count; ++t, out += k_.padded) {
      const Vec<T> x = broadcast(factor[t] * a[t * v_.padded]), f = broadcast(factor[t]);
      for (i64 d = 0; d < k_.padded; d += kLanes<T>) {
        const Vec<T> row = load(b + d) * x;
        store(out + d, start ? fma(load(start + d), f, row) : row);
      }
    }
  }
  void add_column(int count, const T* a, const T* b, T* sum) const {
    T column[kMostOfSingle] = {}, weight[kBlock];
    for (int t = 0; t < count; ++t) weight[t] = b[t * v_.padded];
    add_weighted_rows(a, weight, count, k_.padded, column);
    for (i64 d = 0; d < k_.dim; ++d) sum[d * v_.padded] += column[d];
  }

  static constexpr i64 kMostOfSingle = 256;  // channels of a key, in scratch on the stack
  Channels k_, v_;
  Gemm<T> gemm_;
  bool even_, single_;
};

}  // namespace flatten::cpu::FLATTEN_ISA
