// Attention over a window of fewer tokens than a head has channels, where (Q K^T) V takes fewer products than
// Q (K^T V). With features kept as factor * z^p:
//
//     A = (z_q . z_k) factor_k / M      a = 1 / (sum of A + eps / factor_q)      out = a A V
//     P = (a g) V^T                     b = a (sum of A P)                       dA = (P - b) factor_k / M
//     factor_q dQ = dA z_k              factor_k dK = dA^T z_q                   dV = A^T (a g)
//
// The window is one block, its keys are one tile.
#pragma once

#include "focus.h"
#include "gemm.h"

namespace flatten::cpu::FLATTEN_ISA {

/// Whether the scores of a window take fewer products than its S. They must fit the head's rows: a row of
/// scores has as many elements as there are keys.
inline bool scores_pay(i64 queries, i64 keys, i64 dim) {
  return queries <= kBlock && keys <= smaller(kBlock, dim) && 2 * queries * keys < (queries + keys) * dim;
}

/// The keys of one window, and what one head computes from them. Rows lie `padded` elements apart. z and
/// `values` have rows of zeros behind the last key, up to a whole vector of keys.
template <class T>
class Scores {
 public:
  T* z;  // features of the keys, head-major
  Norms<T> norms;
  T* values;            // of one head
  T *rows, *gradients;  // A and dA of one head
  T* grad_keys;         // factor dK, head-major
  T ones[kBlock];

  void take(Arena& arena, Channels c, int keys, bool backward) {
    c_ = c;
    keys_ = keys;
    columns_ = ceil_div(keys, kLanes<T>) * kLanes<T>;
    // 49 keys, say, are 48 by a product and one by dot products.
    const i64 rest = keys % kLanes<T>;
    by_product_ = rest <= kMostDots ? keys - rest : columns_;
    gemm_ = Gemm<T>::select(c.dim, c.padded);
    z = arena.take<T>(c.block());
    values = arena.take<T>(c.head_stride());
    rows = arena.take<T>(c.head_stride());
    transposed_ = arena.take<T>(c.matrix());
    if (!backward) return;
    gradients = arena.take<T>(c.head_stride());
    grad_keys = arena.take<T>(c.block());
  }

  /// Before the first window.
  void clear() {
    for (i64 h = 0; h < c_.heads; ++h) clear_rest(z + h * c_.head_stride());
    clear_rest(values);
    for (T& w : weight_) w = 0;
    for (T& one : ones) one = 1;
  }

  /// After the keys were mapped.
  void weigh_keys() {
    for (int j = 0; j < keys_; ++j) weight_[j] = norms.factor[j] / static_cast<T>(keys_);
  }

  /// V of one head.
  template <class X>
  void pack_values(i64 h, const Rows<const X>& rows) const {
    pack_head(rows, keys_, h, c_, ones, values);
  }

  /// A of one head, and a.
  void score(i64 h, int count, const T* queries, const T* rest, T* a, Upcoming& upcoming) const {
    multiply(count, queries, z + h * c_.head_stride(), rows, upcoming);
    sum_rows<T>(count, a, [&](int t) FLATTEN_INLINED {
      T* row = rows + t * c_.padded;
      Vec<T> total = {};
      for (i64 j = 0; j < columns_; j += kLanes<T>) {
        const Vec<T> weighted = load(row + j) * load(weight_ + j);
        total = total + weighted;
        store(row + j, weighted);
      }
      return total;
    });
    for (int t = 0; t < count; ++t) a[t] = 1 / (a[t] + rest[t]);
  }

  /// out = a A V of the head whose scores and values were formed last.
  void attend(int count, const T* a, T* out, Upcoming& upcoming) const {
    gemm_.partial_product(count, keys_, c_.padded, c_.padded, rows, values, a, out, upcoming);
  }

  /// dA of one head from g = a grad_out, and b; then factor dQ.
  void differentiate(i64 h, int count, const T* g, const T* a, T* b, T* grad_queries,
                     Upcoming& upcoming) const {
    multiply(count, g, values, gradients, upcoming);
    sum_rows<T>(count, b, [&](int t) FLATTEN_INLINED {
      return dot_lanes(rows + t * c_.padded, gradients + t * c_.padded, columns_);
    });
    for (int t = 0; t < count; ++t) {
      T* gradient = gradients + t * c_.padded;
      b[t] *= a[t];
      for (i64 j = 0; j < columns_; j += kLanes<T>) {
        store(gradient + j, (load(gradient + j) - b[t]) * load(weight_ + j));
      }
    }
    gemm_.partial_product(count, keys_, c_.padded, c_.padded, gradients, z + h * c_.head_stride(), ones,
                          grad_queries, upcoming);
  }

  /// factor dK and dV of one head.
  void differentiate_keys(i64 h, int count, const T* queries, const T* g, T* grad_values,
                          Upcoming& upcoming) const {
    gemm_.partial_outer_product(count, keys_, c_.padded, gradients, queries, grad_keys + h * c_.head_stride(),
                                upcoming);
    gemm_.partial_outer_product(count, keys_, c_.padded, rows, g, grad_values, upcoming);
  }

 private:
  /// The most columns of A that are formed by dot products, a key each, in place of another vector of columns
  /// in the product. For a row that vector takes dim fused products, a dot product dim / kLanes and the sum
  /// of the lanes: with a quarter of kLanes the rest is gained. Measured at 49 keys (benchmarks/NOTES.md).
  static constexpr int kMostDots = kLanes<T> / 4;

  /// to[t][j] = a[t] . b[j] for every key j, and zeros up to whole vectors.
  void multiply(int count, const T* a, const T* b, T* to, Upcoming& upcoming) const {
    transpose(b, transposed_, by_product_, c_.dim, c_.padded);
    gemm_.partial_product(count, c_.dim, by_product_, c_.padded, a, transposed_, ones, to, upcoming);
    if (by_product_ == columns_) return;
    for (int t = 0; t < count; ++t) store(to + t * c_.padded + by_product_, Vec<T>{});
    T dots[kBlock];
    for (i64 j = by_product_; j < keys_; ++j) {
      row_dots(a, b + j * c_.padded, count, c_.padded, dots);
      for (int t = 0; t < count; ++t) to[t * c_.padded + j] = dots[t];
    }
  }

  void clear_rest(T* block) const { set_zero(block + keys_ * c_.padded, (columns_ - keys_) * c_.padded); }

  Channels c_;
  int keys_;
  i64 columns_;     // columns of A: the keys, in whole vectors
  i64 by_product_;  // columns that a product forms; dot products form the others
  Gemm<T> gemm_;
  T* transposed_;
  T weight_[kBlock];  // factor / M of every key
};

}  // namespace flatten::cpu::FLATTEN_ISA
