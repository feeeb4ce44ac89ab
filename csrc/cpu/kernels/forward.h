// The forward pass of one call: per window S and m from the keys and values, then out = (Q S) / (Q m + eps) +
// taps; or by scores, where the window is smaller than its heads are wide.
#pragma once

#include "attention.h"

namespace flatten::cpu::FLATTEN_ISA {

template <class X>
class ForwardKernel {
  using T = Accumulate<X>;

 public:
  explicit ForwardKernel(const AttentionForward& p)
      : call_(p),
        out_(p.out),
        state_(static_cast<T*>(p.state)),
        saved_windows_(p.saved_windows),
        tiling_(Tiling::make(call_.queries)),
        shape_(TapsShape<T>::make(p.taps, call_.c, tiling_)),
        taps_(TapsKernels<X, T>::select(p.taps.kernel_w)),
        by_scores_(!p.state && call_.can_score()),
        streamed_(is_streamed<X>(p.out, p.geometry, p.geometry.queries)) {}

  void run(const Parallel& parallel) {
    const Schedule schedule =
        Schedule::make(parallel, call_.pairs(), call_.queries.tokens(), call_.forward_flops(), false);
    auto whole = [&](int slot) {
      Scratch scratch = make_scratch();
      prepare_taps(scratch);
      const i64 end = schedule.begin(schedule.whole, slot + 1);
      for (i64 pair = schedule.begin(schedule.whole, slot); pair < end; ++pair) {
        const i64 next_pair = pair + 1 < end ? pair + 1 : call_.pairs();
        if (by_scores_) {
          Block keys;
          call_.first_block(call_.keys, pair, 0, keys);
          call_.score_keys(keys, scratch.focus, scratch.scores);
          scratch.values_of_window = rows_of<X>(call_.in.value, keys);
        } else {
          clear(scratch.sums);
          call_.sum_keys(pair, 0, call_.keys.tokens(), scratch.focus, scratch.features, scratch.values,
                         scratch.sums, [&](Upcoming& upcoming) { expect_queries(pair, 0, upcoming); });
          save_state(pair, scratch.sums);
        }
        attend(pair, 0, tiling_.count(), scratch, [&](Upcoming& upcoming) {
          call_.expect_keys(next_pair, 0, upcoming);
          if (by_scores_) expect_queries(next_pair, 0, upcoming);
        });
      }
    };
    if (schedule.whole > 0) for_each_slot(parallel, schedule.slots, whole);
    if (schedule.whole == schedule.pairs) return;

    const i64 stride = ceil_div(call_.sums_elements(), 16) * 16;
    T* partials = static_cast<T*>(shared_workspace(schedule.slots * stride * sizeof(T)));
    for (i64 pair = schedule.whole; pair < schedule.pairs; ++pair) {
      auto sum = [&](int slot) {
        Scratch scratch = make_scratch();
        const Sums<T> sums = call_.sums_at(partials + slot * stride);
        clear(sums);
        call_.sum_keys(pair, schedule.begin(call_.keys.tokens(), slot),
                       schedule.begin(call_.keys.tokens(), slot + 1), scratch.focus, scratch.features,
                       scratch.values, sums, [&](Upcoming& upcoming) {
                         expect_queries(pair, schedule.begin(tiling_.count(), slot), upcoming);
                       });
      };
      auto apply = [&](int slot) {
        Scratch scratch = make_scratch();
        prepare_taps(scratch);
        call_.add_partials(partials, stride, schedule.slots, scratch.sums);
        if (slot == 0) save_state(pair, scratch.sums);
        attend(pair, schedule.begin(tiling_.count(), slot), schedule.begin(tiling_.count(), slot + 1),
               scratch, [&](Upcoming& upcoming) {
                 call_.expect_keys(pair + 1, schedule.begin(call_.keys.tokens(), slot), upcoming);
               });
      };
      for_each_slot(parallel, schedule.slots, sum);
      for_each_slot(parallel, schedule.slots, apply);
    }
  }

 private:
  struct Scratch {
    FocusParameters<T> focus;
    Features<T> features;
    T* inverse_scale;
    T *values, *attended;  // of one head of a block
    Sums<T> sums;
    Scores<T> scores;
    Rows<const X> values_of_window;  // of a window that goes by scores
    T *weights, *bias;
    TapsRing<X, T> ring;
  };

  void lay_out(Arena& arena, Scratch& s) const {
    s.inverse_scale = arena.take<T>(call_.c.padded_count());
    s.features = call_.take_features(arena);
    s.values = arena.take<T>(call_.c.head_stride());
    s.attended = arena.take<T>(call_.c.head_stride());
    s.sums = call_.sums_at(arena.take<T>(call_.sums_elements()));
    if (by_scores_) s.scores.take(arena, call_.c, static_cast<int>(call_.keys.tokens()), false);
    if (!call_.in.taps) return;
    s.weights = arena.take<T>(shape_.weight_elements());
    s.bias = arena.take<T>(call_.c.padded_count());
    s.ring = TapsRing<X, T>(shape_, arena, true);
  }

  Scratch make_scratch() const {
    Scratch s;
    lay_out_in(thread_workspace, [&](Arena& arena) { lay_out(arena, s); });
    s.focus = call_.focus_parameters(s.inverse_scale);
    if (by_scores_) s.scores.clear();
    return s;
  }

  void prepare_taps(Scratch& s) const {
    if (!call_.in.taps) return;
    fill_weights(call_.in.taps, shape_, false, s.weights);
    fill_tap_bias(call_.in.taps, call_.c, s.bias);
    s.ring.clear();
  }

  void clear(const Sums<T>& sums) const { set_zero(sums.s, call_.sums_elements()); }

  void save_state(i64 pair, const Sums<T>& sums) const {
    const i64 at = state_ ? call_.saved_at(pair, saved_windows_) : -1;
    if (at >= 0) call_.save_state(sums, state_ + at);
  }

  /// Adds the queries of a tile of a pair to come; nothing if there is no such tile or pair.
  void expect_queries(i64 pair, i64 index, Upcoming& upcoming) const {
    Block block;
    call_.tile_block(call_.queries, tiling_, pair, index, block);
    upcoming.add<X>(call_.in.query, block, call_.c.count());
  }

  /// The output of tiles [begin, end) of a window. expect_next(upcoming) adds what the slot will read after
  /// them.
  template <class Expect>
  void attend(i64 pair, i64 begin, i64 end, Scratch& scratch, const Expect& expect_next) const {
    const i64 image = call_.image(pair), window = call_.window(pair);
    Block blocks[2];  // the one at hand and the next, by turns
    T rest[kBlock];
    scratch.ring.forget();
    Upcoming upcoming;
    if (begin < end)
      fill_tile(call_.queries, blocks[0], image, window, tile_at(call_.queries, tiling_, begin));
    int turn = 0;
    for (i64 index = begin; index < end; ++index, turn ^= 1) {
      const Block& block = blocks[turn];
      Block& next = blocks[turn ^ 1];
      const Tile tile = tile_at(call_.queries, tiling_, index);
      const bool has_taps = call_.in.taps && !tile.is_prefix;
      upcoming.plan(call_.c.heads * ((by_scores_ ? 2 : 1) * call_.head_steps(block.count) +
                                     (has_taps ? convolve_steps<T>(tile, call_.c.padded) : 0)));
      if (index + 1 < end) {
        const Tile next_tile = tile_at(call_.queries, tiling_, index + 1);
        fill_tile(call_.queries, next, image, window, next_tile);
        upcoming.add<X>(call_.in.query, next, call_.c.count());
        if (!streamed_) upcoming.add<X>(out_, next, call_.c.count());
        if (call_.in.taps) {
          expect_ring_rows<X>(call_.in.value, call_.queries, image, window, next_tile, shape_.pad_h,
                              call_.c.count(), upcoming);
        }
      } else {
        expect_next(upcoming);
      }
      call_.map_queries(block, scratch.focus, scratch.features);
      call_.eps_by_factor(scratch.features.norms, block.count, rest);
      const Rows<X> out = rows_of<X>(out_, block);
      if (has_taps) scratch.ring.begin_tile(call_.in.value, call_.queries, image, window, tile);
      for (i64 h = 0; h < call_.c.heads; ++h) {
        if (by_scores_) {
          score_head(h, block.count, rest, scratch, upcoming);
        } else {
          attend_head(h, block.count, rest, scratch, upcoming);
        }
        if (has_taps) {
          scratch.ring.stage_head(h);
          const TapsOutput<X, T> to{scratch.attended, scratch.bias + h * call_.c.padded, out.at,
                                    h * call_.c.dim, streamed_};
          taps_.convolve(scratch.ring, scratch.weights + shape_.weight_vector(h, 0), tile, to, upcoming);
        } else {
          unpack_head(scratch.attended, block.count, h, call_.c, out, streamed_);
        }
      }
    }
  }

  /// (z S) / (z m + eps / factor): the factor of a query cancels but for eps.
  void attend_head(i64 h, int count, const T* rest, const Scratch& scratch, Upcoming& upcoming) const {
    const T* z = scratch.features.z + h * call_.c.head_stride();
    T inverse[kBlock];
    row_dots(z, scratch.sums.m + h * call_.c.padded, count, call_.c.padded, inverse);
    for (int t = 0; t < count; ++t) inverse[t] = 1 / (inverse[t] + rest[t]);
    call_.gemm.product(count, call_.c.dim, call_.c.padded, z, scratch.sums.s + h * call_.c.matrix(), nullptr,
                       inverse, scratch.attended, upcoming);
  }

  /// The same from the scores of the window's keys.
  void score_head(i64 h, int count, const T* rest, const Scratch& scratch, Upcoming& upcoming) const {
    const Scores<T>& scores = scratch.scores;
    T inverse[kBlock];
    scores.pack_values(h, scratch.values_of_window);
    scores.score(h, count, scratch.features.z + h * call_.c.head_stride(), rest, inverse, upcoming);
    scores.attend(count, inverse, scratch.attended, upcoming);
  }

  AttentionCall<X> call_;
  MutableTokens out_;
  T* state_;
  i64 saved_windows_;
  Tiling tiling_;
  TapsShape<T> shape_;
  TapsKernels<X, T> taps_;
  bool by_scores_, streamed_;
};

}  // namespace flatten::cpu::FLATTEN_ISA
