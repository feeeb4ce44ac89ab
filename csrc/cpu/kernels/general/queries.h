// The output of a window's queries from its S, m and u: out = act(gate) (a Qn S + b u + taps), tile by tile.
#pragma once

#include "call.h"

namespace flatten::cpu::FLATTEN_ISA {

/// The taps of a call's values, forward: weights, bias and the rows they read.
template <class X>
class ValueTaps {
 public:
  using T = Accumulate<X>;

  ValueTaps(const GeneralCall<X>& call, const Tiling& tiling, bool flipped)
      : call_(call), shape_(TapsShape<T>::make(call.in.taps, call.cv, tiling)), flipped_(flipped) {}

  struct Scratch {
    T *weights = nullptr, *bias = nullptr;
    i64 image = -1;  // whose weights these are
  };
  void lay_out(Arena& arena, Scratch& s) const {
    s.weights = arena.take<T>(shape_.weight_elements());
    s.bias = arena.take<T>(call_.cv.padded_count());
  }
  void prepare(Scratch& s) const {
    fill_tap_bias(flipped_ ? Taps{} : call_.in.taps, call_.cv, s.bias);
    s.image = -1;
  }
  /// The weights of an image, if they are not there yet.
  void begin_image(i64 image, Scratch& s) const {
    const Taps& taps = call_.in.taps;
    if (s.image == image || (s.image >= 0 && !taps.per_image)) return;
    fill_weights(taps_of_image(taps, call_.cv.count(), image), shape_, flipped_, s.weights);
    s.image = image;
  }
  const TapsShape<T>& shape() const { return shape_; }

 private:
  const GeneralCall<X>& call_;
  TapsShape<T> shape_;
  bool flipped_;
};

template <class X>
class QuerySide {
 public:
  using T = Accumulate<X>;
  using Call = GeneralCall<X>;

  explicit QuerySide(const Call& call)
      : call_(call),
        tiling_(Tiling::make(call.queries)),
        value_taps_(call, tiling_, false),
        to_rows_(TapsKernels<X, T>::select(call.in.taps.kernel_w)),
        to_block_(TapsKernels<T, T>::select(call.in.taps.kernel_w)),
        gate_(Gate<X, T>::select(call.general.gate_activation, call.cv)) {}

  const Tiling& tiling() const { return tiling_; }
  const Gate<X, T>& gate() const { return gate_; }

  struct Scratch {
    FocusParameters<T> focus;
    T *inverse_scale, *attended;  // attended: one head of a block
    HeadFeatures<T> features;
    Coefficients<T> coefficients;
    GeneralSums<T> sums;
    bool* empty;  // of every head: whether no key is left
    typename ValueTaps<X>::Scratch taps;
    TapsRing<X, T> ring;
  };

  void lay_out(Arena& arena, Scratch& s) const {
    s.inverse_scale = arena.take<T>(call_.ck.padded_count());
    s.features = call_.take_features(arena);
    s.attended = arena.take<T>(call_.cv.head_stride());
    s.sums = call_.sums_at(arena.take<T>(call_.sums_elements()));
    s.empty = arena.take<bool>(call_.ck.heads);
    if (!call_.in.taps) return;
    value_taps_.lay_out(arena, s.taps);
    s.ring = TapsRing<X, T>(value_taps_.shape(), arena, true);
  }
  void prepare(Scratch& s) const {
    s.focus = call_.focus_parameters(s.inverse_scale);
    if (!call_.in.taps) return;
    value_taps_.prepare(s.taps);
    s.ring.clear();
  }

  /// What a tile of a pair reads and, unless they are streamed, the rows of `out` it writes.
  void expect(i64 pair, i64 index, const MutableTokens* out, Upcoming& upcoming) const {
    Block block;
    call_.tile_block(call_.queries, tiling_, pair, index, block);
    expect(block, out, upcoming);
  }
  void expect(const Block& block, const MutableTokens* out, Upcoming& upcoming) const {
    upcoming.add<X>(call_.in.query, block, call_.ck.count());
    const General& general = call_.general;
    if (general.normalizer_query.data) upcoming.add<X>(general.normalizer_query, block, call_.ck.count());
    if (general.gate.data) upcoming.add<X>(general.gate, block, call_.cv.count());
    call_.expect_table(block, upcoming);
    if (out) upcoming.add<X>(*out, block, call_.cv.count());
  }
  /// The rows of values that the taps of a tile bring in.
  void expect_ring(i64 image, i64 window, const Tile& tile, Upcoming& upcoming) const {
    if (!call_.in.taps) return;
    expect_ring_rows<X>(call_.in.value, call_.queries, image, window, tile, value_taps_.shape().pad_h,
                        call_.cv.count(), upcoming);
  }
  i64 tap_steps(const Tile& tile) const {
    return call_.in.taps && !tile.is_prefix ? convolve_steps<T>(tile, call_.cv.padded) : 0;
  }

  /// The output of tiles [begin, end) of a window. expect_next(upcoming) adds what the slot reads after them.
  template <class Expect>
  void attend(i64 pair, i64 begin, i64 end, Scratch& s, const MutableTokens& out, bool streamed,
              const Expect& expect_next) const {
    const i64 image = call_.image(pair), window = call_.window(pair);
    Block blocks[2];  // the one at hand and the next, by turns
    Upcoming upcoming;
    begin_window(image, s);
    if (begin < end)
      fill_tile(call_.queries, blocks[0], image, window, tile_at(call_.queries, tiling_, begin));
    int turn = 0;
    for (i64 index = begin; index < end; ++index, turn ^= 1) {
      const Block& block = blocks[turn];
      Block& next = blocks[turn ^ 1];
      const Tile tile = tile_at(call_.queries, tiling_, index);
      upcoming.plan(call_.ck.heads * (call_.products.steps(block.count) + tap_steps(tile)));
      if (index + 1 < end) {
        const Tile next_tile = tile_at(call_.queries, tiling_, index + 1);
        fill_tile(call_.queries, next, image, window, next_tile);
        expect(next, streamed ? nullptr : &out, upcoming);
        expect_ring(image, window, next_tile, upcoming);
      } else {
        expect_next(upcoming);
      }
      attend_tile(block, window, tile, s, rows_of<X>(out, block), streamed, upcoming);
    }
  }

  void begin_window(i64 image, Scratch& s) const {
    if (!call_.in.taps) return;
    value_taps_.begin_image(image, s.taps);
    s.ring.forget();
  }

  /// The features and coefficients of one head of a tile.
  Head<T> begin_head(i64 h, const Rows<const X>& query, const Rows<const X>* normal, const Block& block,
                     Scratch& s) const {
    const Head<T> head = call_.query_head(h, query, normal, block, s.features);
    Coefficients<T>& k = s.coefficients;
    if (call_.normalizing.reads_m())
      row_dots(head.normal, s.sums.m + h * call_.ck.padded, block.count, call_.ck.padded, k.dots);
    call_.normalizing.weigh(block.count, s.features.norms.factor, s.empty[h], k);
    return head;
  }

  /// a Qn S + b u of one head, in s.attended.
  void attend_head(i64 h, const Head<T>& head, int count, Scratch& s, Upcoming& upcoming) const {
    const Coefficients<T>& k = s.coefficients;
    // Where no key is left the term is 0, whatever the query holds.
    if (s.empty[h]) return set_zero(s.attended, count * call_.cv.padded);
    call_.products.to_values(count, head.product, s.sums.s + h * call_.matrix(), k.a, s.attended, upcoming);
    if (call_.normalizing.reads_u())
      add_multiples(s.sums.u + h * call_.cv.padded, k.b, count, call_.cv.padded, s.attended);
  }
  /// Adds the taps of one head to s.attended. The ring has begun the tile.
  void add_taps(i64 h, const Tile& tile, Scratch& s, Upcoming& upcoming) const {
    T* rows[kBlock];
    for (int t = 0; t < kBlock; ++t) rows[t] = s.attended + t * call_.cv.padded;
    s.ring.stage_head(h);
    const TapsOutput<T, T> to{s.attended, s.taps.bias + h * call_.cv.padded, rows, 0, false};
    to_block_.convolve(s.ring, s.taps.weights + value_taps_.shape().weight_vector(h, 0), tile, to, upcoming);
  }

 private:
  void attend_tile(const Block& block, i64 window, const Tile& tile, Scratch& s, const Rows<X>& out,
                   bool streamed, Upcoming& upcoming) const {
    const General& general = call_.general;
    const bool has_taps = call_.in.taps && !tile.is_prefix, has_normal = general.normalizer_query.data;
    const Rows<const X> query = rows_of<X>(call_.in.query, block);
    Rows<const X> normal, gate;
    if (has_normal) normal = rows_of<X>(general.normalizer_query, block);
    if (general.gate.data) gate = rows_of<X>(general.gate, block);
    call_.begin_queries(query, block, s.focus, s.features);
    if (has_taps) s.ring.begin_tile(call_.in.value, call_.queries, block.image, window, tile);
    for (i64 h = 0; h < call_.ck.heads; ++h) {
      const Head<T> head = begin_head(h, query, has_normal ? &normal : nullptr, block, s);
      attend_head(h, head, block.count, s, upcoming);
      if (general.gate.data) {
        if (has_taps) add_taps(h, tile, s, upcoming);
        gate_.forward(s.attended, gate.at, block.count, h, call_.cv, out.at, streamed);
      } else if (has_taps) {
        s.ring.stage_head(h);
        const TapsOutput<X, T> to{s.attended, s.taps.bias + h * call_.cv.padded, out.at, h * call_.cv.dim,
                                  streamed};
        to_rows_.convolve(s.ring, s.taps.weights + value_taps_.shape().weight_vector(h, 0), tile, to,
                          upcoming);
      } else {
        unpack_head(s.attended, block.count, h, call_.cv, out, streamed);
      }
    }
  }

  const Call& call_;
  Tiling tiling_;
  ValueTaps<X> value_taps_;
  TapsKernels<X, T> to_rows_;   // of rows of the result
  TapsKernels<T, T> to_block_;  // of rows of a head-major block
  Gate<X, T> gate_;
};

}  // namespace flatten::cpu::FLATTEN_ISA
