// flatten::depthwise_conv on its own: the taps of attention over x, forward and backward.
#pragma once

#include "../workspace.h"
#include "schedule.h"
#include "taps.h"

namespace flatten::cpu::FLATTEN_ISA {

/// Both directions work tile by tile: the backward's grad_x is a convolution of grad_out.
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
    const bool streamed = is_streamed<X>(p.out, p.geometry, p.geometry.keys);
    for_each_tile(
        parallel, schedule(parallel), false, p.x,
        [&](Work& work) {
          const Rows<X> out = rows_of<X>(p.out, work.block);
          for (i64 h = 0; h < c_.heads; ++h) convolve(work, h, out, streamed);
        },
        [](Work&) {});
  }

  void backward(const ConvBackward& p, const Parallel& parallel) const {
    const Schedule plan = schedule(parallel);
    const i64 weights = shape_.weight_elements(), images = in_.taps.per_image ? in_.geometry.batch : 1;
    T *weight_sums, *bias_sums;
    lay_out_in(shared_workspace, [&](Arena& arena) {
      weight_sums = arena.take<T>(plan.slots * images * weights);
      bias_sums = arena.take<T>(plan.slots * c_.padded_count());
    });
    set_zero(weight_sums, plan.slots * images * weights);
    set_zero(bias_sums, plan.slots * c_.padded_count());
    T ones[kBlock];
    for (T& one : ones) one = 1;
    const bool streamed = is_streamed<X>(p.grad_x, p.geometry, p.geometry.keys);
    const auto sum_tile = [&](Work& work) {
      const Rows<const X> x = rows_of<X>(p.x, work.block);
      const Rows<X> grad_x = rows_of<X>(p.grad_x, work.block);
      for (i64 h = 0; h < c_.heads; ++h) {
        if (work.tile.is_prefix && !p.grad_x.data) continue;
        if (p.grad_x.data) {
          convolve(work, h, grad_x, streamed);
        } else {
          work.ring.stage_head(h);
        }
        if (work.tile.is_prefix) continue;
        if (p.grad_weight) {
          pack_head(x, work.block.count, h, c_, ones, work.packed);
          taps_.correlate(work.ring, work.packed, work.tile, work.weight_sum + shape_.weight_vector(h, 0));
        }
        if (p.grad_bias) sum_head(work.ring, work.tile, work.bias_sum + h * c_.padded);
      }
    };
    const auto end_chain = [&](Work& work) {
      const i64 of_image = work.slot * images + (images > 1 ? work.block.image : 0);
      add_to(weight_sums + of_image * weights, work.weight_sum, weights);
      add_to(bias_sums + work.slot * c_.padded_count(), work.bias_sum, c_.padded_count());
      set_zero(work.weight_sum, weights);
      set_zero(work.bias_sum, c_.padded_count());
    };
    for_each_tile(parallel, plan, true, p.grad_out, sum_tile, end_chain);
    write_taps_gradients_of_images(shape_, weight_sums, images, bias_sums, plan.slots, p.grad_weight,
                                   p.grad_bias);
  }

 private:
  /// A slot's scratch and the tile it is at.
  struct Work {
    int slot;
    Tile tile;
    Block block;
    TapsRing<X, T> ring;
    Upcoming upcoming;
    T *weights, *bias;
    T *weight_sum, *bias_sum;  // of a chain of tiles
    T *zeros, *packed;         // one head of a block
  };

  Schedule schedule(const Parallel& parallel) const {
    const Geometry& g = in_.geometry;
    const double flops = 2.0 * shape_.area() * g.batch * g.keys * c_.count();
    return Schedule::make(parallel, g.batch * g.windows(), grid_.tokens(), flops, false);
  }

  void lay_out(Arena& arena, Work& work, bool in_place) const {
    work.weights = arena.take<T>(shape_.weight_elements());
    work.bias = arena.take<T>(c_.padded_count());
    work.weight_sum = arena.take<T>(shape_.weight_elements());
    work.bias_sum = arena.take<T>(c_.padded_count());
    work.zeros = arena.take<T>(c_.head_stride());
    work.packed = arena.take<T>(c_.head_stride());
    work.ring = TapsRing<X, T>(shape_, arena, in_place);
  }

  /// Calls body(work) for every tile of every window, with the rows of `source` in the ring, and
  /// end_chain(work) after every kChainBlocks tiles and after the last, so that float32 sums stay short
  /// (kChainBlocks says why). The tiles of all pairs form one list, which the slots share evenly.
  template <class Body, class EndChain>
  void for_each_tile(const Parallel& parallel, const Schedule& plan, bool transposed, const Tokens& source,
                     const Body& body, const EndChain& end_chain) const {
    const i64 tiles = tiling_.count(), windows = in_.geometry.windows();
    auto slot_tiles = [&](int slot) {
      Work work;
      work.slot = slot;
      lay_out_in(thread_workspace, [&](Arena& arena) { lay_out(arena, work, !transposed); });
      i64 image_of_weights = -1;
      fill_tap_bias(transposed ? Taps{} : in_.taps, c_, work.bias);
      set_zero(work.zeros, c_.head_stride());
      set_zero(work.weight_sum, shape_.weight_elements());
      set_zero(work.bias_sum, c_.padded_count());
      work.ring.clear();
      const i64 end = plan.begin(plan.pairs * tiles, slot + 1);
      for (i64 at = plan.begin(plan.pairs * tiles, slot); at < end; ++at) {
        const i64 image = at / tiles / windows, window = at / tiles % windows;
        if (image_of_weights < 0 || (in_.taps.per_image && image_of_weights != image)) {
          fill_weights(taps_of_image(in_.taps, c_.count(), image), shape_, transposed, work.weights);
          image_of_weights = image;
        }
        if (at % tiles == 0) work.ring.forget();
        work.tile = tile_at(grid_, tiling_, at % tiles);
        fill_tile(grid_, work.block, image, window, work.tile);
        if (!work.tile.is_prefix) work.ring.begin_tile(source, grid_, image, window, work.tile);
        body(work);
        const bool ends_image = in_.taps.per_image && (at + 1) % (tiles * windows) == 0;
        if ((at + 1) % kChainBlocks == 0 || at + 1 == end || ends_image) end_chain(work);
      }
    };
    for_each_slot(parallel, plan.slots, slot_tiles);
  }

  /// One head of the tile's taps; prefix tokens have none.
  void convolve(Work& work, i64 h, const Rows<X>& out, bool streamed) const {
    if (work.tile.is_prefix) return unpack_head(work.zeros, work.block.count, h, c_, out, streamed);
    work.ring.stage_head(h);
    const TapsOutput<X, T> to{work.zeros, work.bias + h * c_.padded, out.at, h * c_.dim, streamed};
    taps_.convolve(work.ring, work.weights + shape_.weight_vector(h, 0), work.tile, to, work.upcoming);
  }

  const ConvInputs& in_;
  Channels c_;
  Grid grid_;
  Tiling tiling_;
  TapsShape<T> shape_;
  TapsKernels<X, T> taps_;
};

}  // namespace flatten::cpu::FLATTEN_ISA
