// flatten::depthwise_conv on its own: the taps of attention over x, forward and backward.
#pragma once

#include "schedule.h"
#include "taps_kernel.h"
#include "workspace.h"

namespace flatten::cpu::FLATTEN_ISA {

/// Both directions go tile by tile.
template <class X>
class ConvKernel {
  using T = Accumulate<X>;

 public:
  explicit ConvKernel(const ConvInputs& in)
      : in_(in),
        c_(Channels::make<T>(in.geometry)),
        grid_(Grid::make(in.geometry, in.geometry.window_keys(), true)),
        tiling_(Tiling::make(grid_)),
        shape_(TapsShape<T>::make(in.taps, c_, tiling_)),
        taps_(TapsKernels<X, T>::select(in.taps.kernel_w)) {}

  void forward(const ConvForward& p, const Parallel& parallel) const {
    for_each_tile(parallel, schedule(parallel), false, [&](Work& work) {
      start_with(in_.taps.bias && !work.tile.is_prefix ? work.bias : nullptr, work.block.count, work.out);
      if (!work.tile.is_prefix) {
        work.ring.advance(p.x, grid_, work.block.image, work.window, work.tile);
        taps_.convolve(work.ring, work.weights, grid_.rows, work.tile, work.out);
      }
      unpack(work, p.out);
    });
  }

  void backward(const ConvBackward& p, const Parallel& parallel) const {
    const Schedule plan = schedule(parallel);
    const i64 weights = shape_.weight_elements();
    Arena measure;
    measure.take<T>(plan.slots * weights);
    measure.take<T>(plan.slots * c_.padded_count());
    Arena arena(shared_workspace(measure.used()));
    T* weight_sums = arena.take<T>(plan.slots * weights);
    T* bias_sums = arena.take<T>(plan.slots * c_.padded_count());
    set_zero(weight_sums, plan.slots * weights);
    set_zero(bias_sums, plan.slots * c_.padded_count());
    for_each_tile(parallel, plan, true, [&](Work& work) {
      if (!work.tile.is_prefix)
        work.ring.advance(p.grad_out, grid_, work.block.image, work.window, work.tile);
      if (p.grad_x.data) {
        start_with(nullptr, work.block.count, work.out);
        if (!work.tile.is_prefix) taps_.convolve(work.ring, work.weights, grid_.rows, work.tile, work.out);
        unpack(work, p.grad_x);
      }
      if (work.tile.is_prefix) return;
      if (p.grad_weight) {
        for (int t = 0; t < work.block.count; ++t) {
          pack_row(token_row<X>(p.x, work.block.image, work.block.token[t]), work.out + t * c_.padded,
                   c_.head_stride(), c_, T(1));
        }
        taps_.correlate(work.ring, work.out, grid_.rows, work.tile, weight_sums + work.slot * weights);
      }
      if (p.grad_bias) sum_tile(work.ring, work.tile, bias_sums + work.slot * c_.padded_count());
    });
    write_taps_gradients(shape_, weight_sums, bias_sums, plan.slots, p.grad_weight, p.grad_bias);
  }

 private:
  /// A slot's scratch and the tile it is at.
  struct Work {
    int slot;
    i64 window;
    Tile tile;
    Block block;
    TapsRing<X, T> ring;
    T *weights, *bias, *rows, *out;
  };

  Schedule schedule(const Parallel& parallel) const {
    const Geometry& g = in_.geometry;
    const double flops = 2.0 * shape_.area() * g.batch * g.keys * c_.count();
    return Schedule::make(parallel, g.batch * g.windows(), grid_.tokens(), flops, false);
  }

  void lay_out(Arena& arena, Work& work) const {
    work.weights = arena.take<T>(shape_.weight_elements());
    work.bias = arena.take<T>(c_.padded_count());
    work.rows = arena.take<T>(shape_.ring_elements());
    work.out = arena.take<T>(c_.block());
  }

  /// body(work) for every tile of every window. All pairs' tiles form one list, which the slots share evenly.
  template <class Body>
  void for_each_tile(const Parallel& parallel, const Schedule& plan, bool flipped, const Body& body) const {
    const i64 tiles = tiling_.count(), windows = in_.geometry.windows();
    auto slot_tiles = [&](int slot) {
      Work work;
      work.slot = slot;
      Arena measure;
      lay_out(measure, work);
      Arena arena(thread_workspace(measure.used()));
      lay_out(arena, work);
      fill_weights(in_.taps, shape_, flipped, work.weights);
      fill_tap_bias(in_.taps, c_, work.bias);
      work.ring = TapsRing<X, T>(shape_, work.rows);
      const i64 end = plan.begin(plan.pairs * tiles, slot + 1);
      for (i64 at = plan.begin(plan.pairs * tiles, slot); at < end; ++at) {
        const i64 pair = at / tiles;
        if (at % tiles == 0) work.ring.forget();
        work.window = pair % windows;
        work.tile = tile_at(grid_, tiling_, at % tiles);
        fill_tile(grid_, work.block, pair / windows, work.window, work.tile);
        body(work);
      }
    };
    for_each_slot(parallel, plan.slots, slot_tiles);
  }

  /// A block of the bias (or zeros) in every token.
  void start_with(const T* bias, int count, T* out) const {
    for (i64 h = 0; h < c_.heads; ++h) {
      T* to = out + h * c_.head_stride();
      set_zero(to, count * c_.padded);
      for (int t = 0; bias && t < count; ++t) add_to(to + t * c_.padded, bias + h * c_.padded, c_.padded);
    }
  }

  void unpack(const Work& work, const MutableTokens& to) const {
    for (int t = 0; t < work.block.count; ++t) {
      unpack_row(work.out + t * c_.padded, token_row<X>(to, work.block.image, work.block.token[t]),
                 c_.head_stride(), c_);
    }
  }

  const ConvInputs& in_;
  Channels c_;
  Grid grid_;
  Tiling tiling_;
  TapsShape<T> shape_;
  TapsKernels<X, T> taps_;
};

}  // namespace flatten::cpu::FLATTEN_ISA
