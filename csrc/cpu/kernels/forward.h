// The forward pass of one call: per window S and m from the keys and values, then out = (Q S) / (Q m + eps) +
// taps; or by scores, where the window is smaller than its heads are wide.
#pragma once

#include "attention.h"

namespace flatten::cpu::FLATTEN_ISA {

template <class X>
class ForwardKernel : AttentionKernel<X> {
  using Base = AttentionKernel<X>;
  using Base::c_, Base::gemm_, Base::geometry_, Base::in_, Base::keys_, Base::queries_;
  using typename Base::T;

 public:
  explicit ForwardKernel(const AttentionForward& p)
      : Base(p),
        out_(p.out),
        state_(static_cast<T*>(p.state)),
        saved_windows_(p.saved_windows),
        tiling_(Tiling::make(queries_)),
        shape_(TapsShape<T>::make(p.taps, c_, tiling_)),
        taps_(TapsKernels<X, T>::select(p.taps.kernel_w)),
        by_scores_(!p.state && Base::can_score()),
        streamed_(is_streamed<X>(p.out, p.geometry, p.geometry.queries)) {}

  void run(const Parallel& parallel) {
    const Schedule schedule =
        Schedule::make(parallel, Base::pairs(), queries_.tokens(), Base::forward_flops(), false);
    auto whole = [&](int slot) {
      Scratch scratch = make_scratch();
      prepare_taps(scratch);
      const i64 end = schedule.begin(schedule.whole, slot + 1);
      for (i64 pair = schedule.begin(schedule.whole, slot); pair < end; ++pair) {
        const i64 next_pair = pair + 1 < end ? pair + 1 : Base::pairs();
        if (by_scores_) {
          Block keys;
          Base::first_block(keys_, pair, 0, keys);
          Base::score_keys(keys, scratch.focus, scratch.scores);
          scratch.values_of_window = rows_of<X>(in_.value, keys);
        } else {
          clear(scratch.sums);
          Base::sum_keys(pair, 0, keys_.tokens(), scratch.focus, scratch.features, scratch.values,
                         scratch.sums, [&](Upcoming& upcoming) { expect_queries(pair, 0, upcoming); });
          save_state(pair, scratch.sums);
        }
        attend(pair, 0, tiling_.count(), scratch, [&](Upcoming& upcoming) {
          Base::expect_keys(next_pair, 0, upcoming);
          if (by_scores_) expect_queries(next_pair, 0, upcoming);
        });
      }
    };
    if (schedule.whole > 0) for_each_slot(parallel, schedule.slots, whole);
    if (schedule.whole == schedule.pairs) return;

    const i64 stride = ceil_div(Base::sums_elements(), 16) * 16;
    T* partials = static_cast<T*>(shared_workspace(schedule.slots * stride * sizeof(T)));
    for (i64 pair = schedule.whole; pair < schedule.pairs; ++pair) {
      auto sum = [&](int slot) {
        Scratch scratch = make_scratch();
        const Sums<T> sums = Base::sums_at(partials + slot * stride);
        clear(sums);
        Base::sum_keys(pair, schedule.begin(keys_.tokens(), slot), schedule.begin(keys_.tokens(), slot + 1),
                       scratch.focus, scratch.features, scratch.values, sums, [&](Upcoming& upcoming) {
                         expect_queries(pair, schedule.begin(tiling_.count(), slot), upcoming);
                       });
      };
      auto apply = [&](int slot) {
        Scratch scratch = make_scratch();
        prepare_taps(scratch);
        Base::add_partials(partials, stride, schedule.slots, scratch.sums);
        if (slot == 0) save_state(pair, scratch.sums);
        attend(pair, schedule.begin(tiling_.count(), slot), schedule.begin(tiling_.count(), slot + 1),
               scratch, [&](Upcoming& upcoming) {
                 Base::expect_keys(pair + 1, schedule.begin(keys_.tokens(), slot), upcoming);
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
    T *inverse_scale, *values, *attended;  // the last two: one head of a block
    Sums<T> sums;
    Scores<T> scores;
    Rows<const X> values_of_window;  // by scores
    T *weights, *bias;
    TapsRing<X, T> ring;
  };

  void lay_out(Arena& arena, Scratch& s) const {
    s.inverse_scale = arena.take<T>(c_.padded_count());
    s.features = Base::take_features(arena);
    s.values = arena.take<T>(c_.head_stride());
    s.attended = arena.take<T>(c_.head_stride());
    s.sums = Base::sums_at(arena.take<T>(Base::sums_elements()));
    if (by_scores_) s.scores.take(arena, c_, static_cast<int>(keys_.tokens()), false);
    if (!in_.taps) return;
    s.weights = arena.take<T>(shape_.weight_elements());
    s.bias = arena.take<T>(c_.padded_count());
    s.ring = TapsRing<X, T>(shape_, arena, true);
  }

  Scratch make_scratch() const {
    Scratch s;
    lay_out_in(thread_workspace, [&](Arena& arena) { lay_out(arena, s); });
    s.focus = Base::focus_parameters(s.inverse_scale);
    if (by_scores_) s.scores.clear();
    return s;
  }

  void prepare_taps(Scratch& s) const {
    if (!in_.taps) return;
    fill_weights(in_.taps, shape_, false, s.weights);
    fill_tap_bias(in_.taps, c_, s.bias);
    s.ring.clear();
  }

  void clear(const Sums<T>& sums) const { set_zero(sums.s, Base::sums_elements()); }

  void save_state(i64 pair, const Sums<T>& sums) const {
    const i64 at = state_ ? Base::saved_at(pair, saved_windows_) : -1;
    if (at >= 0) Base::save_state(sums, state_ + at);
  }

  /// Adds the queries of a tile of a pair to come; none behind the last.
  void expect_queries(i64 pair, i64 index, Upcoming& upcoming) const {
    Block block;
    Base::tile_block(queries_, tiling_, pair, index, block);
    upcoming.add<X>(in_.query, block, c_.count());
  }

  /// The output of tiles [begin, end) of a window; expect_next(upcoming) adds what the slot reads then.
  template <class Expect>
  void attend(i64 pair, i64 begin, i64 end, Scratch& scratch, const Expect& expect_next) const {
    const i64 image = Base::image(pair), window = Base::window(pair);
    Block blocks[2];  // the one at hand and the next, by turns
    T rest[kBlock];
    scratch.ring.forget();
    Upcoming upcoming;
    if (begin < end) fill_tile(queries_, blocks[0], image, window, tile_at(queries_, tiling_, begin));
    int turn = 0;
    for (i64 index = begin; index < end; ++index, turn ^= 1) {
      const Block& block = blocks[turn];
      Block& next = blocks[turn ^ 1];
      const Tile tile = tile_at(queries_, tiling_, index);
      const bool has_taps = in_.taps && !tile.is_prefix;
      upcoming.plan(c_.heads * ((by_scores_ ? 2 : 1) * Base::head_steps(block.count) +
                                (has_taps ? convolve_steps<T>(tile, c_.padded) : 0)));
      if (index + 1 < end) {
        const Tile next_tile = tile_at(queries_, tiling_, index + 1);
        fill_tile(queries_, next, image, window, next_tile);
        upcoming.add<X>(in_.query, next, c_.count());
        if (!streamed_) upcoming.add<X>(out_, next, c_.count());
        if (in_.taps) {
          expect_ring_rows<X>(in_.value, queries_, image, window, next_tile, shape_.pad_h, c_.count(),
                              upcoming);
        }
      } else {
        expect_next(upcoming);
      }
      Base::map_queries(block, scratch.focus, scratch.features);
      Base::eps_by_factor(scratch.features.norms, block.count, rest);
      const Rows<X> out = rows_of<X>(out_, block);
      if (has_taps) scratch.ring.begin_tile(in_.value, queries_, image, window, tile);
      for (i64 h = 0; h < c_.heads; ++h) {
        if (by_scores_) {
          score_head(h, block.count, rest, scratch, upcoming);
        } else {
          attend_head(h, block.count, rest, scratch, upcoming);
        }
        if (has_taps) {
          scratch.ring.stage_head(h);
          const TapsOutput<X, T> to{scratch.attended, scratch.bias + h * c_.padded, out.at, h * c_.dim,
                                    streamed_};
          taps_.convolve(scratch.ring, scratch.weights + shape_.weight_vector(h, 0), tile, to, upcoming);
        } else {
          unpack_head(scratch.attended, block.count, h, c_, out, streamed_);
        }
      }
    }
  }

  /// (z S) / (z m + eps / factor): the factor of a query cancels but for eps.
  void attend_head(i64 h, int count, const T* rest, const Scratch& scratch, Upcoming& upcoming) const {
    const T* z = scratch.features.z + h * c_.head_stride();
    T inverse[kBlock];
    row_dots(z, scratch.sums.m + h * c_.padded, count, c_.padded, inverse);
    for (int t = 0; t < count; ++t) inverse[t] = 1 / (inverse[t] + rest[t]);
    gemm_.product(count, c_.dim, c_.padded, z, scratch.sums.s + h * c_.matrix(), nullptr, inverse,
                  scratch.attended, upcoming);
  }

  /// The same from the scores of the window's keys.
  void score_head(i64 h, int count, const T* rest, const Scratch& scratch, Upcoming& upcoming) const {
    const Scores<T>& scores = scratch.scores;
    T inverse[kBlock];
    scores.pack_values(h, scratch.values_of_window);
    scores.score(h, count, scratch.features.z + h * c_.head_stride(), rest, inverse, upcoming);
    scores.attend(count, inverse, scratch.attended, upcoming);
  }

  MutableTokens out_;
  T* state_;
  i64 saved_windows_;
  Tiling tiling_;
  TapsShape<T> shape_;
  TapsKernels<X, T> taps_;
  bool by_scores_, streamed_;
};

}  // namespace flatten::cpu::FLATTEN_ISA
