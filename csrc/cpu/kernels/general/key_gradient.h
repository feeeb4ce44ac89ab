// The key pass of the backward: dk, dv, dkey_weight and the taps' gradients, tile by tile, from a window's
// dS, dm and du. With t = Kn . (V dS^T) + Kd . dm + V . du of a key:
//
//     dKn = share V dS^T     dKd = share dm     dV = share (Kn dS + du) + flipped taps of g
//     dw = (t - E) / W       E = S : dS + m . dm + u . du
#pragma once

#include "keys.h"
#include "parameters.h"
#include "queries.h"

namespace flatten::cpu::FLATTEN_ISA {

/// What a call asks of its key pass.
struct KeyTask {
  MutableTokens key, value, normal;  // gradients, each may be null
  MutableParameter key_weight;
  bool scale = false, key_bias = false, tap_weight = false, tap_bias = false;  // whether those are wanted
  bool needs_rows() const { return key.data || normal.data || key_weight || scale || key_bias; }
  bool needs_sums() const { return needs_rows() || value.data; }
};

template <class X>
class KeyGradients {
 public:
  using T = Accumulate<X>;
  using Call = GeneralCall<X>;

  KeyGradients(const Call& call, const KeyTask& task)
      : call_(call),
        task_(task),
        tiling_(Tiling::make(call.keys)),
        value_taps_(call, tiling_, true),
        to_rows_(TapsKernels<X, T>::select(call.in.taps.kernel_w)),
        key_streamed_(is_streamed<X>(task.key, call.geometry, call.geometry.keys)),
        value_streamed_(is_streamed<X>(task.value, Call::values(call.geometry), call.geometry.keys)) {}

  const Tiling& tiling() const { return tiling_; }
  const TapsShape<T>& shape() const { return value_taps_.shape(); }
  bool needs_ring() const {
    return call_.in.taps && (task_.value.data || task_.tap_weight || task_.tap_bias);
  }

  struct Scratch {
    typename KeySums<X>::Scratch key;  // features and shares
    T *gradient, *packed, *dv;         // gradient: of the features, one head or, where focused, all
    GeneralSums<T> sums, gradients;    // sums: the caller's
    T* transposed;                     // dS^T
    T* rest;                           // of every head: what is added to t, -E
    typename ValueTaps<X>::Scratch taps;
    TapsRing<T, T> ring;
    Tokens g;                        // act(gate) grad_out, of T; where there are taps
    ParameterSums<T> sums_of_chain;  // of the tokens since the last end_chain()
    T* key_bias_sum;                 // padded rows, or null
  };
  void lay_out(Arena& arena, Scratch& s, const KeySums<X>& keys) const {
    keys.lay_out(arena, s.key);
    s.gradient = arena.take<T>(call_.focused ? call_.ck.block() : call_.ck.head_stride());
    s.packed = arena.take<T>(call_.cv.head_stride());
    s.dv = arena.take<T>(call_.cv.head_stride());
    s.gradients = call_.sums_at(arena.take<T>(call_.sums_elements()));
    s.transposed = arena.take<T>(call_.transposed_elements());
    s.rest = arena.take<T>(call_.ck.heads);
    if (!needs_ring()) return;
    value_taps_.lay_out(arena, s.taps);
    s.ring = TapsRing<T, T>(shape(), arena, false);
  }
  void prepare(Scratch& s) const {
    if (!needs_ring()) return;
    value_taps_.prepare(s.taps);
    s.ring.clear();
  }

  /// -E of every head, from s.sums and s.gradients.
  void subtract_mean(Scratch& s) const {
    if (!task_.key_weight) return;
    const Channels ck = call_.ck, cv = call_.cv;
    for (i64 h = 0; h < ck.heads; ++h) {
      const i64 at = h * call_.matrix();
      T mean = dot_of(s.sums.s + at, s.gradients.s + at, call_.matrix()) +
               dot_of(s.sums.m + h * ck.padded, s.gradients.m + h * ck.padded, ck.padded);
      if (call_.needs_u) mean += dot_of(s.sums.u + h * cv.padded, s.gradients.u + h * cv.padded, cv.padded);
      s.rest[h] = -mean;
    }
  }

  /// Tiles [begin, end) of a window. end_chain() is called after every kChainBlocks tiles and after the last.
  template <class EndChain, class Expect>
  void run(i64 pair, i64 begin, i64 end, Scratch& s, const EndChain& end_chain,
           const Expect& expect_next) const {
    const i64 image = call_.image(pair), window = call_.window(pair);
    Block blocks[2];  // the one at hand and the next, by turns
    Upcoming upcoming;
    if (task_.needs_rows()) call_.transpose_matrices(s.gradients.s, s.transposed);
    if (needs_ring()) {
      value_taps_.begin_image(image, s.taps);
      s.ring.forget();
    }
    if (begin < end) fill_tile(call_.keys, blocks[0], image, window, tile_at(call_.keys, tiling_, begin));
    int turn = 0;
    for (i64 index = begin; index < end; ++index, turn ^= 1) {
      const Block& block = blocks[turn];
      Block& next = blocks[turn ^ 1];
      const Tile tile = tile_at(call_.keys, tiling_, index);
      const bool has_taps = needs_ring() && !tile.is_prefix;
      upcoming.plan(call_.ck.heads * (2 * call_.products.steps(block.count) +
                                      (has_taps ? convolve_steps<T>(tile, call_.cv.padded) : 0)));
      if (index + 1 < end) {
        const Tile next_tile = tile_at(call_.keys, tiling_, index + 1);
        fill_tile(call_.keys, next, image, window, next_tile);
        expect(next, upcoming);
        if (needs_ring())
          expect_ring_rows<T>(s.g, call_.keys, image, window, next_tile, shape().pad_h, call_.cv.count(),
                              upcoming);
      } else {
        expect_next(upcoming);
      }
      if (has_taps) s.ring.begin_tile(s.g, call_.keys, image, window, tile);
      run_tile(block, has_taps ? &tile : nullptr, s, upcoming);
      if ((index + 1 - begin) % kChainBlocks == 0 || index + 1 == end) end_chain();
    }
  }

  void expect(const Block& block, Upcoming& upcoming) const {
    call_.expect_keys(block, upcoming);
    if (task_.value.data && !value_streamed_) upcoming.add<X>(task_.value, block, call_.cv.count());
    if (task_.key.data && !key_streamed_) upcoming.add<X>(task_.key, block, call_.ck.count());
  }
  void expect(i64 pair, i64 index, Upcoming& upcoming) const {
    Block block;
    call_.tile_block(call_.keys, tiling_, pair, index, block);
    expect(block, upcoming);
  }

 private:
  static T dot_of(const T* a, const T* b, i64 count) { return sum(dot_lanes(a, b, count)); }

  /// `tile` is null for tokens that have no taps.
  void run_tile(const Block& block, const Tile* tile, Scratch& s, Upcoming& upcoming) const {
    const General& general = call_.general;
    const Channels ck = call_.ck, cv = call_.cv;
    const bool has_normal = general.normalizer_key.data != nullptr;
    const Rows<const X> raw_value = rows_of<X>(call_.in.value, block);
    Rows<const X> key = rows_of<X>(call_.in.key, block), value = raw_value, normal;
    if (has_normal) normal = rows_of<X>(general.normalizer_key, block);
    KeyShares<X>& shares = s.key.shares;
    if (task_.needs_sums()) {
      call_.begin_shares(block, shares, key, value, has_normal ? &normal : nullptr);
      call_.begin_keys(key, block, s.key.focus, s.key.features);
    }
    const Rows<X> grad_value = rows_of<X>(task_.value, block);
    T weight[kBlock], dot[kBlock] = {}, by_weight[kBlock] = {};
    for (i64 h = 0; h < ck.heads; ++h) {
      if (task_.needs_sums()) {
        call_.weigh_keys(h, block, shares, s.key.features, weight);
        const Head<T> head = call_.key_head(h, key, has_normal ? &normal : nullptr, block, s.key.features);
        if (task_.needs_rows()) {
          pack_head(value, block.count, h, cv, call_.ones(), s.packed);
          key_rows(h, head, block, weight, s, dot, by_weight, upcoming);
        }
        if (task_.value.data) {
          call_.products.to_values(block.count, head.product, s.gradients.s + h * call_.matrix(), weight,
                                   s.dv, upcoming);
          if (call_.needs_u)
            add_multiples(s.gradients.u + h * cv.padded, call_.share_of(h, shares), block.count, cv.padded,
                          s.dv);
        }
      }
      if (task_.tap_weight && tile && (shares.cleaned || !task_.needs_rows()))
        pack_head(raw_value, block.count, h, cv, call_.ones(), s.packed);
      value_head(h, block.count, tile, s, grad_value, upcoming);
    }
    if (task_.key_weight && call_.weight_rows == 1) write_weights(block, by_weight, 0);
    if (call_.focused && (task_.key.data || task_.scale || task_.key_bias)) focused_rows(block, key, dot, s);
  }

  /// dk of one head and what else follows from the derivative by its features.
  void key_rows(i64 h, const Head<T>& head, const Block& block, const T* weight, Scratch& s, T* dot,
                T* by_weight, Upcoming& upcoming) const {
    const Channels ck = call_.ck, cv = call_.cv;
    const int count = block.count;
    const bool has_normal = call_.general.normalizer_key.data != nullptr;
    const T *dm = s.gradients.m + h * ck.padded, *share = call_.share_of(h, s.key.shares);
    const T* start = has_normal ? nullptr : dm;
    T* gradient = s.gradient + (call_.focused ? h * ck.head_stride() : 0);
    T unweighted[kBlock];
    const T* factor = weight;
    if (task_.key_weight) {  // whose gradient is that of keys before their share
      for (int t = 0; t < count; ++t) {
        const T f = s.key.features.norms.factor[t];
        unweighted[t] = share[t] == 0 && f - f != 0 ? 0 : f;
      }
      factor = unweighted;
    }
    const bool turns = static_cast<bool>(call_.general.rotation);
    call_.products.to_keys(count, s.packed, s.transposed + h * cv.dim * ck.padded, turns ? nullptr : start,
                           factor, gradient, upcoming);
    const Rows<X> dx = rows_of<X>(task_.key, block);
    const HeadGradient<X, T> to{task_.key.data ? dx.at : nullptr, s.key_bias_sum, key_streamed_};
    const bool ends_here = !call_.focused && (task_.key.data || s.key_bias_sum);
    if (turns && !(ends_here && !task_.key_weight)) call_.turn_back(h, block, gradient, start, factor);
    if (task_.key_weight) {
      weigh_gradient(h, head, block, share, s, gradient, dot, by_weight);
    } else if (call_.focused) {
      T head_dot[kBlock];
      products_of_rows(head.z, gradient, count, ck.padded, head_dot);
      for (int t = 0; t < count; ++t) dot[t] += head_dot[t];
    }
    if (has_normal && task_.normal.data) {
      const Rows<X> rows = rows_of<X>(task_.normal, block);
      for (int t = 0; t < count; ++t) {
        for (i64 d = 0; d < ck.dim; d += kLanes<T>)
          store_at_most(rows[t] + h * ck.dim + d, load(dm + d) * share[t], ck.dim - d);
      }
    }
    if (!ends_here) return;
    if (turns && !task_.key_weight) return call_.finish_head(h, head.z, block, gradient, start, factor, to);
    call_.map_backward(h, head.z, block, gradient, to);
  }

  /// dkey_weight from the gradient before the shares, which it takes on here.
  void weigh_gradient(i64 h, const Head<T>& head, const Block& block, const T* share, Scratch& s, T* gradient,
                      T* dot, T* by_weight) const {
    const Channels ck = call_.ck, cv = call_.cv;
    const int count = block.count;
    T along[kBlock], values[kBlock] = {}, normals[kBlock] = {};
    products_of_rows(head.z, gradient, count, ck.padded, along);
    if (call_.needs_u) row_dots(s.packed, s.gradients.u + h * cv.padded, count, cv.padded, values);
    if (head.normal != head.z)
      row_dots(head.normal, s.gradients.m + h * ck.padded, count, ck.padded, normals);
    const T inverse = static_cast<T>(s.key.shares.inverse[call_.weight_rows == 1 ? 0 : h]);
    for (int t = 0; t < count; ++t) {
      const T by = (along[t] + values[t] + normals[t] + s.rest[h]) * inverse;
      by_weight[t] = call_.weight_rows == 1 ? by_weight[t] + by : by;
      dot[t] += along[t] * share[t];
      T* row = gradient + t * ck.padded;
      for (i64 d = 0; d < ck.padded; d += kLanes<T>) store(row + d, load(row + d) * share[t]);
    }
    if (call_.weight_rows > 1) write_weights(block, by_weight, h);
  }
  void write_weights(const Block& block, const T* by_weight, i64 row) const {
    for (int t = 0; t < block.count; ++t) {
      const i64 at = (block.image * call_.geometry.keys + block.token[t]) * call_.weight_rows + row;
      write_parameter(task_.key_weight, at, by_weight[t]);
    }
  }

  static void products_of_rows(const T* a, const T* b, int count, i64 padded, T* dots) {
    sum_rows<T>(count, dots,
                [&](int t) FLATTEN_INLINED { return dot_lanes(a + t * padded, b + t * padded, padded); });
  }

  void focused_rows(const Block& block, const Rows<const X>& key, const T* dot, const Scratch& s) const {
    const Rows<X> dx = rows_of<X>(task_.key, block);
    RowGradients<X, T> to;
    if (task_.key.data) to.dx = dx.at;
    if (task_.scale) to.scale_sum = s.sums_of_chain.scale;
    to.bias_sum = s.key_bias_sum;
    to.streamed = key_streamed_;
    call_.focus_key().backward(key.at, call_.bias_rows(block), block.count, s.gradient, call_.ck, s.key.focus,
                               s.key.features.norms, dot, to);
  }

  /// One head's dv, and its part of the gradients of the taps' weight and bias.
  void value_head(i64 h, int count, const Tile* tile, Scratch& s, const Rows<X>& grad_value,
                  Upcoming& upcoming) const {
    if (!tile) {
      if (task_.value.data) unpack_head(s.dv, count, h, call_.cv, grad_value, value_streamed_);
      return;
    }
    s.ring.stage_head(h);
    const i64 weights = shape().weight_vector(h, 0);
    if (task_.value.data) {
      const TapsOutput<X, T> to{s.dv, s.taps.bias + h * call_.cv.padded, grad_value.at, h * call_.cv.dim,
                                value_streamed_};
      to_rows_.convolve(s.ring, s.taps.weights + weights, *tile, to, upcoming);
    }
    if (task_.tap_weight) to_rows_.correlate(s.ring, s.packed, *tile, s.sums_of_chain.weight + weights);
    if (task_.tap_bias) sum_head(s.ring, *tile, s.sums_of_chain.bias + h * call_.cv.padded);
  }

  const Call& call_;
  KeyTask task_;
  Tiling tiling_;
  ValueTaps<X> value_taps_;
  TapsKernels<X, T> to_rows_;
  bool key_streamed_, value_streamed_;
};

}  // namespace flatten::cpu::FLATTEN_ISA
