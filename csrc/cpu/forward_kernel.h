// The forward pass of one call: per window S and m from the keys and values, then out = (Q S) / (Q m + eps) +
// taps.
#pragma once

#include "attention_kernel.h"

namespace flatten::cpu::FLATTEN_ISA {

template <class X>
class ForwardKernel : AttentionKernel<X> {
  using Base = AttentionKernel<X>;
  using Base::c_, Base::eps_, Base::gemm_, Base::geometry_, Base::in_, Base::keys_, Base::queries_;
  using typename Base::T;

 public:
  explicit ForwardKernel(const AttentionForward& p)
      : Base(p),
        out_(p.out),
        state_(p.state),
        tiling_(Tiling::make(queries_)),
        shape_(TapsShape<T>::make(p.taps, c_, tiling_)),
        taps_(TapsKernels<X, T>::select(p.taps.kernel_w)) {}

  void run(const Parallel& parallel) {
    const Schedule schedule =
        Schedule::make(parallel, Base::pairs(), queries_.tokens(), Base::forward_flops(), false);
    auto whole = [&](int slot) {
      Scratch scratch = make_scratch();
      const i64 end = schedule.begin(schedule.whole, slot + 1);
      for (i64 pair = schedule.begin(schedule.whole, slot); pair < end; ++pair) {
        clear(scratch.sums);
        Base::sum_keys(pair, 0, keys_.tokens(), scratch.focus, scratch.features, scratch.values,
                       scratch.sums);
        if (state_) Base::save_state(pair, scratch.sums, state_);
        attend(pair, 0, tiling_.count(), scratch);
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
                       scratch.focus, scratch.features, scratch.values, sums);
      };
      auto apply = [&](int slot) {
        Scratch scratch = make_scratch();
        clear(scratch.sums);
        for (int s = 0; s < schedule.slots; ++s) {
          add_to(scratch.sums.s, partials + s * stride, Base::sums_elements());
        }
        if (state_ && slot == 0) Base::save_state(pair, scratch.sums, state_);
        attend(pair, schedule.begin(tiling_.count(), slot), schedule.begin(tiling_.count(), slot + 1),
               scratch);
      };
      for_each_slot(parallel, schedule.slots, sum);
      for_each_slot(parallel, schedule.slots, apply);
    }
  }

 private:
  struct Scratch {
    FocusParameters<T> focus;
    T *inverse_scale, *values, *weights, *bias, *ring;
    Features<T> features;
    Sums<T> sums;
    TapsRing<X, T> taps;
  };

  void lay_out(Arena& arena, Scratch& s) const {
    s.inverse_scale = arena.take<T>(c_.padded_count());
    s.features.lay_out(arena, c_);
    s.values = arena.take<T>(c_.block());
    s.sums = Base::sums_at(arena.take<T>(Base::sums_elements()));
    if (in_.taps) {
      s.weights = arena.take<T>(shape_.weight_elements());
      s.bias = arena.take<T>(c_.padded_count());
      s.ring = arena.take<T>(shape_.ring_elements());
    }
  }

  Scratch make_scratch() const {
    Scratch s;
    Arena measure;
    lay_out(measure, s);
    Arena arena(thread_workspace(measure.used()));
    lay_out(arena, s);
    s.focus = Base::focus_parameters(s.inverse_scale);
    if (in_.taps) {
      fill_weights(in_.taps, shape_, false, s.weights);
      fill_tap_bias(in_.taps, c_, s.bias);
      s.taps = TapsRing<X, T>(shape_, s.ring);
    }
    return s;
  }

  void clear(const Sums<T>& sums) const { set_zero(sums.s, Base::sums_elements()); }

  /// The output of tiles [begin, end) of a window.
  void attend(i64 pair, i64 begin, i64 end, Scratch& scratch) const {
    const i64 image = Base::image(pair), window = Base::window(pair);
    T* out = scratch.values;
    Block block;
    scratch.taps.forget();
    for (i64 index = begin; index < end; ++index) {
      const Tile tile = tile_at(queries_, tiling_, index);
      fill_tile(queries_, block, image, window, tile);
      Base::map_queries(block, scratch.focus, scratch.features);
      for (i64 h = 0; h < c_.heads; ++h) attend_head(h, block.count, scratch, out + h * c_.head_stride());
      if (in_.taps && !tile.is_prefix) {
        add_bias(scratch.bias, block.count, out);
        scratch.taps.advance(in_.value, queries_, image, window, tile);
        taps_.convolve(scratch.taps, scratch.weights, queries_.rows, tile, out);
      }
      for (int t = 0; t < block.count; ++t) {
        unpack_row(out + t * c_.padded, token_row<X>(out_, image, block.token[t]), c_.head_stride(), c_);
      }
    }
  }

  /// (z^p S) / (z^p m + eps / factor): the factor of a query cancels but for eps.
  void attend_head(i64 h, int count, const Scratch& scratch, T* out) const {
    const T* z = scratch.features.z + h * c_.head_stride();
    const T* m = scratch.sums.m + h * c_.padded;
    T inverse[kBlock];
    for (int t = 0; t < count; ++t) {
      Vec<T> dot = {};
      for (i64 d = 0; d < c_.padded; d += kLanes<T>) dot = fma(load(z + t * c_.padded + d), load(m + d), dot);
      inverse[t] = 1 / (sum(dot) + eps_ / scratch.features.factor[t]);
    }
    gemm_.product(count, c_.dim, c_.padded, z, scratch.sums.s + h * c_.matrix(), inverse, out);
  }

  void add_bias(const T* bias, int count, T* out) const {
    if (!in_.taps.bias) return;
    for (i64 h = 0; h < c_.heads; ++h) {
      for (int t = 0; t < count; ++t) {
        add_to(out + h * c_.head_stride() + t * c_.padded, bias + h * c_.padded, c_.padded);
      }
    }
  }

  MutableTokens out_;
  void* state_;
  Tiling tiling_;
  TapsShape<T> shape_;
  TapsKernels<X, T> taps_;
};

}  // namespace flatten::cpu::FLATTEN_ISA
