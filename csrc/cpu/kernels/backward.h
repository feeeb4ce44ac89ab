// The backward pass of one call. Per window and head, with the features kept as factor * z^p:
//
//     query pass   a = 1 / (z^p m + eps / factor)     W = (a g) S^T                b = a (z^p . W)
//                  factor dQ = W - b m                dS = sum of (z^p)^T (a g)    dm = -sum of b z^p
//     key pass     dK = (V dS^T + dm) / M             dV = K dS / M + flipped taps of g
//
// W gives both dQ and the quotient's derivative, so the output is not computed again. Small windows go by
// scores.h instead, both passes in one.
#pragma once

#include "backward_memory.h"

namespace flatten::cpu::FLATTEN_ISA {

template <class X>
class BackwardKernel : BackwardMemory<X> {
  using Base = AttentionKernel<X>;
  using Memory = BackwardMemory<X>;
  using Base::c_, Base::focus_key_, Base::focus_query_, Base::gemm_, Base::geometry_, Base::in_, Base::keys_,
      Base::queries_;
  using Memory::by_scores_, Memory::needs_key_rows_, Memory::needs_query_rows_, Memory::needs_ring_,
      Memory::needs_sums_, Memory::one_tile_, Memory::p_, Memory::shape_, Memory::taps_, Memory::tiling_;
  using Memory::clear, Memory::end_chain, Memory::make_scratch, Memory::needs_attention, Memory::prepare_taps,
      Memory::state_of, Memory::take_sums, Memory::transpose_matrices;
  using typename Base::T;
  using typename Memory::Scratch, typename Memory::Shared;

 public:
  explicit BackwardKernel(const AttentionBackward& p)
      : Memory(p),
        streams_{is_streamed<X>(p.grad_query, p.geometry, p.geometry.queries),
                 is_streamed<X>(p.grad_key, p.geometry, p.geometry.keys),
                 is_streamed<X>(p.grad_value, p.geometry, p.geometry.keys)} {}

  void run(const Parallel& parallel) {
    constexpr i64 kMostBiasBytes = 8 << 20;
    Shared shared{};
    shared.bias_elements = p_.grad_key_bias ? keys_.tokens() * c_.padded_count() : 0;
    const bool share_all =
        shared.bias_elements * static_cast<i64>(sizeof(T)) * parallel.threads > kMostBiasBytes;
    const Schedule schedule =
        Schedule::make(parallel, Base::pairs(), keys_.tokens(), 2 * Base::forward_flops(), share_all);
    const int slots = schedule.slots;
    shared.bias_slots = schedule.whole == 0 ? 1 : slots;
    shared.bias_in_place = shared.bias_slots == 1 && c_.dim == c_.padded &&
                           element_size(p_.grad_key_bias.dtype) == static_cast<i64>(sizeof(T));
    shared.bias_streamed =
        shared.bias_in_place && Base::pairs() == 1 &&
        is_streamed<X>({p_.grad_key_bias.data, 0, geometry_.channels()}, geometry_, keys_.tokens());
    lay_out_in(shared_workspace, [&](Arena& arena) { Memory::lay_out(arena, shared, slots); });
    clear(shared.parameters, slots);

    auto whole = [&](int slot) {
      Scratch scratch = make_scratch(shared, slot);
      prepare_taps(scratch);
      const i64 first = schedule.begin(schedule.whole, slot), end = schedule.begin(schedule.whole, slot + 1);
      for (i64 pair = first; pair < end; ++pair) {
        const i64 next_pair = pair + 1 < end ? pair + 1 : Base::pairs();
        if (by_scores_) {
          score_pass(pair, next_pair, pair == first, scratch);
          continue;
        }
        if (needs_attention()) {
          if (!state_of(pair)) {
            clear(scratch.sums);
            Base::sum_keys(pair, 0, keys_.tokens(), scratch.focus, scratch.key_features, scratch.packed,
                           scratch.sums, [&](Upcoming& upcoming) { expect_queries(pair, 0, upcoming); });
          }
          take_sums(pair, scratch);
          clear(scratch.gradients);
          query_pass(pair, 0, queries_.tokens(), scratch, scratch.gradients,
                     [&](Upcoming& upcoming) { expect_tile(pair, 0, upcoming); });
          transpose_matrices(scratch.gradients.s, scratch.transposed);
        }
        const bool mapped = one_tile_ && needs_attention() && !state_of(pair);
        key_pass(pair, 0, tiling_.count(), pair == first, mapped, scratch,
                 [&](Upcoming& upcoming) { expect_pair(next_pair, {}, upcoming); });
      }
    };
    if (schedule.whole > 0) for_each_slot(parallel, slots, whole);
    for (i64 pair = schedule.whole; pair < schedule.pairs; ++pair)
      run_shared(parallel, schedule, pair, shared);
    if (!shared.bias_in_place) {
      for_each_run(parallel, slots, p_.grad_key_bias ? keys_.tokens() : 0,
                   [&](i64 begin, i64 end) { Memory::write_key_bias_gradient(shared, begin, end); });
    }
    Memory::write_gradients(shared, slots);
  }

 private:
  /// Where a slot's part of a pair begins.
  struct Start {
    i64 key = 0, query = 0, tile = 0;
  };

  /// A pair whose tokens all slots share.
  void run_shared(const Parallel& parallel, const Schedule& schedule, i64 pair, const Shared& shared) const {
    const int slots = schedule.slots;
    const i64 stride = shared.partial_stride;
    const auto start_of = [&](int slot) -> Start {
      return {schedule.begin(keys_.tokens(), slot), schedule.begin(queries_.tokens(), slot),
              schedule.begin(tiling_.count(), slot)};
    };
    auto sum = [&](int slot) {
      const Start start = start_of(slot), stop = start_of(slot + 1);
      Scratch scratch = make_scratch(shared, slot);
      const Sums<T> sums = Base::sums_at(shared.partial_sums + slot * stride);
      clear(sums);
      Base::sum_keys(pair, start.key, stop.key, scratch.focus, scratch.features, scratch.packed, sums,
                     [&](Upcoming& upcoming) { expect_queries(pair, start.query, upcoming); });
    };
    auto queries = [&](int slot) {
      const Start start = start_of(slot), stop = start_of(slot + 1);
      Scratch scratch = make_scratch(shared, slot);
      if (!state_of(pair)) Base::add_partials(shared.partial_sums, stride, slots, scratch.sums);
      take_sums(pair, scratch);
      const Sums<T> gradients = Base::sums_at(shared.partial_gradients + slot * stride);
      clear(gradients);
      query_pass(pair, start.query, stop.query, scratch, gradients,
                 [&](Upcoming& upcoming) { expect_tile(pair, start.tile, upcoming); });
    };
    auto keys = [&](int slot) {
      const Start start = start_of(slot), stop = start_of(slot + 1);
      Scratch scratch = make_scratch(shared, slot);
      prepare_taps(scratch);
      if (needs_attention()) {
        Base::add_partials(shared.partial_gradients, stride, slots, scratch.gradients);
        transpose_matrices(scratch.gradients.s, scratch.transposed);
      }
      key_pass(pair, start.tile, stop.tile, pair == 0, false, scratch,
               [&](Upcoming& upcoming) { expect_pair(pair + 1, start, upcoming); });
    };
    if (needs_attention()) {
      if (!state_of(pair)) for_each_slot(parallel, slots, sum);
      for_each_slot(parallel, slots, queries);
    }
    for_each_slot(parallel, slots, keys);
  }

  /// dq of positions [begin, end) of a window, and their part of dS, dm (without the 1 / M) and dscale.
  /// expect_next(upcoming) adds what the slot reads behind the last query.
  template <class Expect>
  void query_pass(i64 pair, i64 begin, i64 end, Scratch& scratch, const Sums<T>& gradients,
                  const Expect& expect_next) const {
    Base::in_chains(begin, end, scratch.features.chain, gradients,
                    [&](i64 from, i64 to, const Sums<T>& into) {
                      query_chain(pair, from, to, end, scratch, into, expect_next);
                      end_chain(scratch);
                    });
  }

  template <class Expect>
  void query_chain(i64 pair, i64 begin, i64 end, i64 last, Scratch& scratch, const Sums<T>& gradients,
                   const Expect& expect_next) const {
    Features<T>& features = scratch.features;
    const i64 size = block_size(end - begin);
    T rest[kBlock];
    Block blocks[2];  // the one at hand and the next, by turns
    Upcoming upcoming;
    queries_.fill(blocks[0], Base::image(pair), Base::window(pair), begin, smaller(size, end - begin));
    int turn = 0;
    for (i64 at = begin; at < end; at += size, turn ^= 1) {
      const Block& block = blocks[turn];
      Block& next = blocks[turn ^ 1];
      upcoming.plan(2 * c_.heads * Base::head_steps(block.count));
      if (at + size < last) {
        queries_.fill(next, block.image, Base::window(pair), at + size, smaller(size, last - at - size));
        expect_queries(next, upcoming);
      } else {
        expect_next(upcoming);
      }
      Base::map_queries(block, scratch.focus, features);
      Base::eps_by_factor(features.norms, block.count, rest);
      const Rows<const X> grad_out = rows_of<X>(p_.grad_out, block);
      T dot[kBlock] = {};
      for (i64 h = 0; h < c_.heads; ++h)
        query_head(h, block.count, grad_out, rest, scratch, gradients, dot, upcoming);
      if (needs_query_rows_) query_rows(block, dot, scratch);
    }
  }

  /// factor dQ of one head of a block, its part of every row's dot product with z, and of dS and dm.
  void query_head(i64 h, int count, const Rows<const X>& grad_out, const T* rest, const Scratch& scratch,
                  const Sums<T>& gradients, T* dot, Upcoming& upcoming) const {
    const T *z = scratch.features.z + h * c_.head_stride(), *m = scratch.sums.m + h * c_.padded;
    T *g = scratch.packed, *w = scratch.gradient + h * c_.head_stride();
    T a[kBlock], b[kBlock], ones[kBlock];
    for (T& one : ones) one = 1;
    row_dots(z, m, count, c_.padded, a);
    for (int t = 0; t < count; ++t) a[t] = 1 / (a[t] + rest[t]);
    pack_head(grad_out, count, h, c_, a, g);
    gemm_.product(count, c_.dim, c_.padded, g, scratch.transposed + h * c_.matrix(), nullptr, ones, w,
                  upcoming);
    quotient_rule(count, a, z, m, w, b);
    for (int t = 0; t < count; ++t) dot[t] -= b[t] * rest[t];
    if (!needs_sums_) return;
    add_weighted_rows(z, b, count, c_.padded, gradients.m + h * c_.padded);
    gemm_.outer_product(count, c_.dim, c_.padded, z, g, gradients.s + h * c_.matrix(), upcoming);
  }

  /// Everything of a small window, head by head, by its scores.
  void score_pass(i64 pair, i64 next_pair, bool is_first, Scratch& scratch) const {
    const Scores<T>& scores = scratch.scores;
    const Features<T>& features = scratch.features;
    Block queries, keys;
    Base::first_block(queries_, pair, 0, queries);
    Base::first_block(keys_, pair, 0, keys);
    const Tile tile = tile_at(keys_, tiling_, 0);
    Upcoming upcoming;
    upcoming.plan(c_.heads * (5 * Base::head_steps(queries.count) +
                              (needs_ring_ ? convolve_steps<T>(tile, c_.padded) : 0)));
    expect_tile(next_pair, 0, upcoming);
    expect_queries(next_pair, 0, upcoming);

    Base::score_keys(keys, scratch.focus, scratch.scores);
    Base::map_queries(queries, scratch.focus, scratch.features);
    if (needs_ring_) {
      scratch.ring.forget();
      scratch.ring.begin_tile(p_.grad_out, keys_, keys.image, Base::window(pair), tile);
    }
    const Rows<const X> values = rows_of<X>(in_.value, keys), grad_out = rows_of<X>(p_.grad_out, queries);
    const Rows<X> grad_value = rows_of<X>(p_.grad_value, keys);
    T rest[kBlock], a[kBlock], b[kBlock], query_dot[kBlock] = {}, key_dot[kBlock] = {};
    Base::eps_by_factor(features.norms, queries.count, rest);
    for (i64 h = 0; h < c_.heads; ++h) {
      const i64 head = h * c_.head_stride();
      const T* z = features.z + head;
      scores.score(h, queries.count, z, rest, a, upcoming);
      pack_head(grad_out, queries.count, h, c_, a, scratch.packed);
      scores.pack_values(h, values);
      scores.differentiate(h, queries.count, scratch.packed, a, b, scratch.gradient + head, upcoming);
      for (int t = 0; t < queries.count; ++t) query_dot[t] += b[t] * rest[t];
      if (needs_sums_) scores.differentiate_keys(h, queries.count, z, scratch.packed, scratch.dv, upcoming);
      if (needs_key_rows_) add_dots(scores.z + head, scores.grad_keys + head, keys.count, key_dot);
      value_head(h, keys.count, needs_ring_ ? &tile : nullptr, scores.values, scratch.dv, scratch, grad_value,
                 upcoming);
    }
    if (needs_query_rows_) query_rows(queries, query_dot, scratch);
    if (needs_key_rows_) key_rows(keys, scores.grad_keys, scores.norms, key_dot, is_first, scratch);
    end_chain(scratch);
  }

  // What the passes read and write, for reading ahead: of a block; from there on; none behind the last pair.
  void expect_queries(const Block& block, Upcoming& upcoming) const {
    upcoming.add<X>(in_.query, block, c_.count());
    upcoming.add<X>(p_.grad_out, block, c_.count());
    if (p_.grad_query.data && !streams_.query) upcoming.add<X>(p_.grad_query, block, c_.count());
  }
  void expect_queries(i64 pair, i64 position, Upcoming& upcoming) const {
    Block block;
    Base::first_block(queries_, pair, position, block);
    expect_queries(block, upcoming);
  }
  void expect_tile(const Block& block, Upcoming& upcoming) const {
    upcoming.add<X>(in_.key, block, c_.count());
    upcoming.add<X>(in_.value, block, c_.count());
    if (p_.grad_value.data && !streams_.value) upcoming.add<X>(p_.grad_value, block, c_.count());
    if (p_.grad_key.data && !streams_.key) upcoming.add<X>(p_.grad_key, block, c_.count());
    Base::expect_bias(block, upcoming);
  }
  void expect_tile(i64 pair, i64 index, Upcoming& upcoming) const {
    Block block;
    Base::tile_block(keys_, tiling_, pair, index, block);
    expect_tile(block, upcoming);
  }
  void expect_pair(i64 pair, Start start, Upcoming& upcoming) const {
    if (pair >= Base::pairs()) return;
    if (!needs_attention()) return expect_tile(pair, start.tile, upcoming);
    if (state_of(pair)) return expect_queries(pair, start.query, upcoming);
    Base::expect_keys(pair, start.key, upcoming);
  }

  /// w += b m with b = -a (z . w), for the rows of one head of a block. The row's sum of z times the result
  /// is b eps / factor, which needs no difference of large numbers.
  void quotient_rule(int count, const T* a, const T* z, const T* m, T* w, T* b) const {
    sum_rows<T>(count, b, [&](int t) FLATTEN_INLINED {
      return dot_lanes(z + t * c_.padded, w + t * c_.padded, c_.padded);
    });
    for (int t = 0; t < count; ++t, w += c_.padded) {
      b[t] *= -a[t];
      const Vec<T> bt = broadcast(b[t]);
      for (i64 d = 0; d < c_.padded; d += kLanes<T>) store(w + d, fma(load(m + d), bt, load(w + d)));
    }
  }

  /// dk, dv and their part of dscale, dkey_bias, dweight, dbias of tiles [begin, end) of a window. The sum of
  /// key_bias's gradient, which may be as large as the keys, is not cleared but begun by the `is_first` pair.
  template <class Expect>
  void key_pass(i64 pair, i64 begin, i64 end, bool is_first, bool mapped, Scratch& scratch,
                const Expect& expect_next) const {
    const i64 image = Base::image(pair), window = Base::window(pair);
    Features<T>& features = scratch.key_features;
    const bool packs_values = p_.grad_weight || needs_key_rows_;
    const T mean = 1 / static_cast<T>(geometry_.window_keys());
    T ones[kBlock], weight[kBlock];
    for (T& one : ones) one = 1;
    Block blocks[2];  // the one at hand and the next, by turns
    Upcoming upcoming;
    scratch.ring.forget();
    if (begin < end) fill_tile(keys_, blocks[0], image, window, tile_at(keys_, tiling_, begin));
    int turn = 0;
    for (i64 index = begin; index < end; ++index, turn ^= 1) {
      const Block& block = blocks[turn];
      Block& next = blocks[turn ^ 1];
      const Tile tile = tile_at(keys_, tiling_, index);
      const bool has_taps = needs_ring_ && !tile.is_prefix;
      upcoming.plan(c_.heads * (2 * Base::head_steps(block.count) +
                                (has_taps ? convolve_steps<T>(tile, c_.padded) : 0)));
      if (index + 1 < end) {
        const Tile next_tile = tile_at(keys_, tiling_, index + 1);
        fill_tile(keys_, next, image, window, next_tile);
        expect_tile(next, upcoming);
        if (needs_ring_) {
          expect_ring_rows<X>(p_.grad_out, keys_, image, window, next_tile, shape_.pad_h, c_.count(),
                              upcoming);
        }
      } else {
        expect_next(upcoming);
      }
      if (needs_sums_) {
        if (!mapped) Base::map_keys(block, scratch.focus, features);
        for (int t = 0; t < block.count; ++t) weight[t] = features.norms.factor[t] * mean;
      }
      if (has_taps) scratch.ring.begin_tile(p_.grad_out, keys_, image, window, tile);
      const Rows<const X> values = rows_of<X>(in_.value, block);
      const Rows<X> grad_value = rows_of<X>(p_.grad_value, block);
      T dot[kBlock] = {};
      for (i64 h = 0; h < c_.heads; ++h) {
        if (packs_values) pack_head(values, block.count, h, c_, ones, scratch.packed);
        key_products(h, block.count, weight, scratch, upcoming);
        const i64 head = h * c_.head_stride();
        if (needs_key_rows_) add_dots(features.z + head, scratch.gradient + head, block.count, dot);
        value_head(h, block.count, has_taps ? &tile : nullptr, scratch.packed, scratch.dv, scratch,
                   grad_value, upcoming);
      }
      if (needs_key_rows_) key_rows(block, scratch.gradient, features.norms, dot, is_first, scratch);
      if ((index + 1) % kChainBlocks == 0 || index + 1 == end) end_chain(scratch);
    }
  }

  /// One head's dv, and its part of dweight and dbias, of a tile; null: of tokens without taps.
  void value_head(i64 h, int count, const Tile* tile, const T* values, const T* dv, Scratch& scratch,
                  const Rows<X>& grad_value, Upcoming& upcoming) const {
    if (!tile) {
      if (p_.grad_value.data) unpack_head(dv, count, h, c_, grad_value, streams_.value);
      return;
    }
    scratch.ring.stage_head(h);
    const i64 weights = shape_.weight_vector(h, 0);
    if (p_.grad_value.data) {
      const TapsOutput<X, T> to{dv, scratch.zero_bias, grad_value.at, h * c_.dim, streams_.value};
      taps_.convolve(scratch.ring, scratch.weights + weights, *tile, to, upcoming);
    }
    if (p_.grad_weight) taps_.correlate(scratch.ring, values, *tile, scratch.chain.weight + weights);
    if (p_.grad_bias) sum_head(scratch.ring, *tile, scratch.chain.bias + h * c_.padded);
  }

  /// factor dK and dV of one head of a block; `weight`: factor / M.
  void key_products(i64 h, int count, const T* weight, const Scratch& scratch, Upcoming& upcoming) const {
    if (needs_key_rows_) {
      gemm_.product(count, c_.dim, c_.padded, scratch.packed, scratch.transposed + h * c_.matrix(),
                    scratch.gradients.m + h * c_.padded, weight, scratch.gradient + h * c_.head_stride(),
                    upcoming);
    }
    if (p_.grad_value.data) {
      gemm_.product(count, c_.dim, c_.padded, scratch.key_features.z + h * c_.head_stride(),
                    scratch.gradients.s + h * c_.matrix(), nullptr, weight, scratch.dv, upcoming);
    }
  }

  /// dot[t] += z[t] . r[t]
  void add_dots(const T* z, const T* r, int count, T* dot) const {
    T head[kBlock];
    sum_rows<T>(count, head, [&](int t) FLATTEN_INLINED {
      return dot_lanes(z + t * c_.padded, r + t * c_.padded, c_.padded);
    });
    for (int t = 0; t < count; ++t) dot[t] += head[t];
  }

  /// dq of a block from scratch.gradient = factor dQ.
  void query_rows(const Block& block, const T* dot, const Scratch& scratch) const {
    const Rows<X> dx = rows_of<X>(p_.grad_query, block);
    RowGradients<X, T> to;
    if (p_.grad_query.data) to.dx = dx.at;
    if (p_.grad_scale) to.scale_sum = scratch.chain.scale;
    to.streamed = streams_.query;
    focus_query_.backward(rows_of<X>(in_.query, block).at, {}, block.count, scratch.gradient, c_,
                          scratch.focus, scratch.features.norms, dot, to);
  }

  /// dk of a block from r = factor dK.
  void key_rows(const Block& block, const T* r, const Norms<T>& norms, const T* dot, bool is_first,
                const Scratch& scratch) const {
    const Rows<X> dx = rows_of<X>(p_.grad_key, block);
    RowGradients<X, T> to;
    if (p_.grad_key.data) to.dx = dx.at;
    if (p_.grad_scale) to.scale_sum = scratch.chain.scale;
    to.bias_sum = scratch.key_bias_sum;
    to.is_first = is_first;
    to.streamed = streams_.key;
    to.bias_streamed = scratch.bias_streamed;
    focus_key_.backward(rows_of<X>(in_.key, block).at, Base::bias_rows(block), block.count, r, c_,
                        scratch.focus, norms, dot, to);
  }

  struct {
    bool query, key, value;
  } streams_;  // which gradients are streamed, see is_streamed
};

}  // namespace flatten::cpu::FLATTEN_ISA
