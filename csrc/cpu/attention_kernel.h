// What the forward and the backward pass of attention share: features of queries and keys, and the sums S and
// m.
#pragma once

#include "focus_kernel.h"
#include "gemm_kernel.h"
#include "schedule.h"
#include "taps_kernel.h"
#include "workspace.h"

namespace flatten::cpu::FLATTEN_ISA {

/// S (dim x padded a head) and m (padded a head) of one window.
template <class T>
struct Sums {
  T* s;
  T* m;
};

/// Features of a block of tokens: phi = factor * features, and what their derivative needs.
template <class T>
struct Features {
  T* z;         // z^p, a block
  T* bias_row;  // x + key_bias of the row at hand
  RowNorms<T> norms[kBlock];
  T factor[kBlock];

  void lay_out(Arena& arena, const Channels& c) {
    z = arena.take<T>(c.block());
    bias_row = arena.take<T>(c.count());
  }
};

template <class X>
class AttentionKernel {
 public:
  using T = Accumulate<X>;

 protected:
  AttentionKernel(const AttentionInputs& in)
      : in_(in),
        geometry_(in.geometry),
        c_(Channels::make<T>(in.geometry)),
        keys_(Grid::make(in.geometry, in.geometry.window_keys(), static_cast<bool>(in.taps))),
        queries_(Grid::make(in.geometry, in.geometry.window_queries(), static_cast<bool>(in.taps))),
        gemm_(Gemm<T>::select(c_.padded)),
        focus_(Focus<X, T>::select(in.mapping)),
        focus_biased_(Focus<T, T>::select(in.mapping)),
        eps_(static_cast<T>(in.eps)) {}

  i64 pairs() const { return geometry_.batch * geometry_.windows(); }
  i64 image(i64 pair) const { return pair / geometry_.windows(); }
  i64 window(i64 pair) const { return pair % geometry_.windows(); }
  i64 sums_elements() const { return c_.matrices() + c_.padded_count(); }
  Sums<T> sums_at(T* memory) const { return {memory, memory + c_.matrices()}; }

  double forward_flops() const {
    const double taps = 2.0 * in_.taps.kernel_h * in_.taps.kernel_w;
    return static_cast<double>(geometry_.batch) * c_.count() *
           (2.0 * (geometry_.queries + geometry_.keys) * c_.dim + taps * geometry_.queries);
  }

  FocusParameters<T> focus_parameters(T* inverse_scale) const {
    fill_inverse_scale(in_.mapping, c_, inverse_scale);
    return FocusParameters<T>::make(in_.mapping, in_.eps, inverse_scale);
  }

  void map_queries(const Block& block, const FocusParameters<T>& f, Features<T>& to) const {
    for (int t = 0; t < block.count; ++t) {
      const X* x = token_row<X>(in_.query, block.image, block.token[t]);
      to.norms[t] = focus_.forward(x, to.z + t * c_.padded, c_.head_stride(), c_, f);
      to.factor[t] = to.norms[t].factor;
    }
  }

  void map_keys(const Block& block, const FocusParameters<T>& f, Features<T>& to) const {
    for (int t = 0; t < block.count; ++t) {
      const X* x = token_row<X>(in_.key, block.image, block.token[t]);
      T* z = to.z + t * c_.padded;
      if (in_.mapping.key_bias) {
        add_bias_row(x, in_.mapping.key_bias, block.position[t], c_, to.bias_row);
        to.norms[t] = focus_biased_.forward(to.bias_row, z, c_.head_stride(), c_, f);
      } else {
        to.norms[t] = focus_.forward(x, z, c_.head_stride(), c_, f);
      }
      to.factor[t] = to.norms[t].factor;
    }
  }

  void pack(const Tokens& source, const Block& block, const T* factor, T* to) const {
    for (int t = 0; t < block.count; ++t) {
      pack_row(token_row<X>(source, block.image, block.token[t]), to + t * c_.padded, c_.head_stride(), c_,
               factor[t]);
    }
  }

  /// Adds positions [begin, end) of a window to S = sum of K^T V / M and m = sum of K / M. The factors of the
  /// keys ride on the values: K^T V = (z^p)^T (factor V).
  void sum_keys(i64 pair, i64 begin, i64 end, const FocusParameters<T>& f, Features<T>& features, T* values,
                const Sums<T>& sums) const {
    Block block;
    for (i64 at = begin; at < end; at += kBlock) {
      keys_.fill(block, image(pair), window(pair), at, smaller(kBlock, end - at));
      map_keys(block, f, features);
      T weight[kBlock];
      for (int t = 0; t < block.count; ++t) {
        weight[t] = features.factor[t] / static_cast<T>(geometry_.window_keys());
      }
      pack(in_.value, block, weight, values);
      for (i64 h = 0; h < c_.heads; ++h) {
        const T* z = features.z + h * c_.head_stride();
        gemm_.outer_product(block.count, c_.dim, c_.padded, z, values + h * c_.head_stride(),
                            sums.s + h * c_.matrix());
        add_weighted_rows(z, weight, block.count, sums.m + h * c_.padded);
      }
    }
  }

  /// sum += the rows of one head of a block, weighted.
  void add_weighted_rows(const T* rows, const T* weight, int count, T* sum) const {
    for (i64 d = 0; d < c_.padded; d += kLanes<T>) {
      Vec<T> acc = load(sum + d);
      for (int t = 0; t < count; ++t) acc = fma(load(rows + t * c_.padded + d), broadcast(weight[t]), acc);
      store(sum + d, acc);
    }
  }

  // The state keeps S and m without padding: (pairs, heads, dim, dim), then m, pair by pair.
  void save_state(i64 pair, const Sums<T>& sums, void* state) const {
    T* to = static_cast<T*>(state) + pair * (c_.dim + 1) * c_.count();
    const Channels rows{c_.heads * c_.dim, c_.dim, c_.padded};
    unpack_row(sums.s, to, c_.padded, rows);
    unpack_row(sums.m, to + c_.count() * c_.dim, c_.padded, c_);
  }
  void load_state(i64 pair, const void* state, const Sums<T>& sums) const {
    const T* from = static_cast<const T*>(state) + pair * (c_.dim + 1) * c_.count();
    const Channels rows{c_.heads * c_.dim, c_.dim, c_.padded};
    pack_row(from, sums.s, c_.padded, rows, T(1));
    pack_row(from + c_.count() * c_.dim, sums.m, c_.padded, c_, T(1));
  }

  const AttentionInputs& in_;
  const Geometry& geometry_;
  Channels c_;
  Grid keys_, queries_;
  Gemm<T> gemm_;
  Focus<X, T> focus_;
  Focus<T, T> focus_biased_;
  T eps_;
};

}  // namespace flatten::cpu::FLATTEN_ISA
