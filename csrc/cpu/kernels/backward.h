// The backward pass of one call. Per window and head, with the features kept as factor * z^p:
//
//     query pass   a = 1 / (z^p m + eps / factor)     W = (a g) S^T                b = a (z^p . W)
//                  factor dQ = W - b m                dS = sum of (z^p)^T (a g)    dm = -sum of b z^p
//     key pass     dK = (V dS^T + dm) / M             dV = K dS / M + flipped taps of g
//
// W gives both dQ and the quotient's derivative, so the output is not computed again. Small windows use
// scores.h instead, and both passes are one.
#pragma once

#include "backward_memory.h"

namespace flatten::cpu::FLATTEN_ISA {

template <class X>
class BackwardKernel {
  using T = Accumulate<X>;
  using Memory = BackwardMemory<X>;
  using Scratch = typename Memory::Scratch;
  using Shared = typename Memory::Shared;

 public:
  explicit BackwardKernel(const AttentionBackward& p)
      : p_(p),
        call_(p),
        plan_(p, call_),
        memory_(p, call_, plan_),
        streams_{is_streamed<X>(p.grad_query, p.geometry, p.geometry.queries),
                 is_streamed<X>(p.grad_key, p.geometry, p.geometry.keys),
                 is_streamed<X>(p.grad_value, p.geometry, p.geometry.keys)} {}
  BackwardKernel(const BackwardKernel&) = delete;  // memory_ refers to call_ and plan_

  void run(const Parallel& parallel) {
    // Every slot that does whole pairs sums the gradient of key_bias for itself. Above this size [bytes] of
    // all sums the slots share every pair, and one sum. Not measured; chosen so that the sums stay in the
    // last-level cache of any server.
    constexpr i64 kMostBiasBytes = 8 << 20;
    Shared shared{};
    shared.bias_elements = p_.grad_key_bias ? call_.keys.tokens() * call_.c.padded_count() : 0;
    const bool share_all =
        shared.bias_elements * static_cast<i64>(sizeof(T)) * parallel.threads > kMostBiasBytes;
    const Schedule schedule =
        Schedule::make(parallel, call_.pairs(), call_.keys.tokens(), 2 * call_.forward_flops(), share_all);
    const int slots = schedule.slots;
    shared.bias_slots = schedule.whole == 0 ? 1 : slots;
    shared.bias_in_place = shared.bias_slots == 1 && call_.c.dim == call_.c.padded &&
                           element_size(p_.grad_key_bias.dtype) == static_cast<i64>(sizeof(T));
    shared.bias_streamed = shared.bias_in_place && call_.pairs() == 1 &&
                           is_streamed<X>({p_.grad_key_bias.data, 0, call_.geometry.channels()},
                                          call_.geometry, call_.keys.tokens());
    lay_out_in(shared_workspace, [&](Arena& arena) { memory_.lay_out(arena, shared, slots); });
    memory_.clear(shared.parameters, slots);

    auto whole = [&](int slot) {
      Scratch scratch = memory_.make_scratch(shared, slot);
      memory_.prepare_taps(scratch);
      const i64 first = schedule.begin(schedule.whole, slot), end = schedule.begin(schedule.whole, slot + 1);
      for (i64 pair = first; pair < end; ++pair) {
        const i64 next_pair = pair + 1 < end ? pair + 1 : call_.pairs();
        if (plan_.by_scores) {
          score_pass(pair, next_pair, pair == first, scratch);
          continue;
        }
        if (plan_.needs_attention()) {
          if (!memory_.state_of(pair)) {
            memory_.clear(scratch.sums);
            call_.sum_keys(pair, 0, call_.keys.tokens(), scratch.focus, scratch.key_features, scratch.packed,
                           scratch.sums, [&](Upcoming& upcoming) { expect_queries(pair, 0, upcoming); });
          }
          memory_.take_sums(pair, scratch);
          memory_.clear(scratch.gradients);
          query_pass(pair, 0, call_.queries.tokens(), scratch, scratch.gradients,
                     [&](Upcoming& upcoming) { expect_tile(pair, 0, upcoming); });
          memory_.transpose_matrices(scratch.gradients.s, scratch.transposed);
        }
        const bool mapped = plan_.one_tile && plan_.needs_attention() && !memory_.state_of(pair);
        key_pass(pair, 0, plan_.tiling.count(), pair == first, mapped, scratch,
                 [&](Upcoming& upcoming) { expect_pair(next_pair, {}, upcoming); });
      }
    };
    if (schedule.whole > 0) for_each_slot(parallel, slots, whole);
    for (i64 pair = schedule.whole; pair < schedule.pairs; ++pair)
      run_shared(parallel, schedule, pair, shared);
    if (!shared.bias_in_place) {
      for_each_run(parallel, slots, p_.grad_key_bias ? call_.keys.tokens() : 0,
                   [&](i64 begin, i64 end) { memory_.write_key_bias_gradient(shared, begin, end); });
    }
    memory_.write_gradients(shared, slots);
  }

 private:
  /// Where a slot's part of a pair begins: a position, a position, a tile number.
  struct Start {
    i64 key = 0, query = 0, tile = 0;
  };

  /// A pair whose tokens all slots share.
  void run_shared(const Parallel& parallel, const Schedule& schedule, i64 pair, const Shared& shared) const {
    const int slots = schedule.slots;
    const i64 stride = shared.partial_stride;
    const auto start_of = [&](int slot) -> Start {
      return {schedule.begin(call_.keys.tokens(), slot), schedule.begin(call_.queries.tokens(), slot),
              schedule.begin(plan_.tiling.count(), slot)};
    };
    auto sum = [&](int slot) {
      const Start start = start_of(slot), stop = start_of(slot + 1);
      Scratch scratch = memory_.make_scratch(shared, slot);
      const Sums<T> sums = call_.sums_at(shared.partial_sums + slot * stride);
      memory_.clear(sums);
      call_.sum_keys(pair, start.key, stop.key, scratch.focus, scratch.features, scratch.packed, sums,
                     [&](Upcoming& upcoming) { expect_queries(pair, start.query, upcoming); });
    };
    auto queries = [&](int slot) {
      const Start start = start_of(slot), stop = start_of(slot + 1);
      Scratch scratch = memory_.make_scratch(shared, slot);
      if (!memory_.state_of(pair)) call_.add_partials(shared.partial_sums, stride, slots, scratch.sums);
      memory_.take_sums(pair, scratch);
      const Sums<T> gradients = call_.sums_at(shared.partial_gradients + slot * stride);
      memory_.clear(gradients);
      query_pass(pair, start.query, stop.query, scratch, gradients,
                 [&](Upcoming& upcoming) { expect_tile(pair, start.tile, upcoming); });
    };
    auto keys = [&](int slot) {
      const Start start = start_of(slot), stop = start_of(slot + 1);
      Scratch scratch = memory_.make_scratch(shared, slot);
      memory_.prepare_taps(scratch);
      if (plan_.needs_attention()) {
        call_.add_partials(shared.partial_gradients, stride, slots, scratch.gradients);
        memory_.transpose_matrices(scratch.gradients.s, scratch.transposed);
      }
      key_pass(pair, start.tile, stop.tile, pair == 0, false, scratch,
               [&](Upcoming& upcoming) { expect_pair(pair + 1, start, upcoming); });
    };
    if (plan_.needs_attention()) {
      if (!memory_.state_of(pair)) for_each_slot(parallel, slots, sum);
      for_each_slot(parallel, slots, queries);
    }
    for_each_slot(parallel, slots, keys);
  }

  /// dq of positions [begin, end) of a window, and their part of dS, dm (without the 1 / M) and dscale.
  /// expect_next(upcoming) adds what the slot reads behind the last query.
  template <class Expect>
  void query_pass(i64 pair, i64 begin, i64 end, Scratch& scratch, const Sums<T>& gradients,
                  const Expect& expect_next) const {
    call_.in_chains(begin, end, scratch.features.chain, gradients,
                    [&](i64 from, i64 to, const Sums<T>& into) {
                      query_chain(pair, from, to, end, scratch, into, expect_next);
                      memory_.end_chain(scratch);
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
    call_.queries.fill(blocks[0], call_.image(pair), call_.window(pair), begin, smaller(size, end - begin));
    int turn = 0;
    for (i64 at = begin; at < end; at += size, turn ^= 1) {
      const Block& block = blocks[turn];
      Block& next = blocks[turn ^ 1];
      upcoming.plan(2 * call_.c.heads * call_.head_steps(block.count));
      if (at + size < last) {
        call_.queries.fill(next, block.image, call_.window(pair), at + size, smaller(size, last - at - size));
        expect_queries(next, upcoming);
      } else {
        expect_next(upcoming);
      }
      call_.map_queries(block, scratch.focus, features);
      call_.eps_by_factor(features.norms, block.count, rest);
      const Rows<const X> grad_out = rows_of<X>(p_.grad_out, block);
      T dot[kBlock] = {};
      for (i64 h = 0; h < call_.c.heads; ++h)
        query_head(h, block.count, grad_out, rest, scratch, gradients, dot, upcoming);
      if (plan_.needs_query_rows) query_rows(block, dot, scratch);
    }
  }

  /// factor dQ of one head of a block, its part of every row's dot product with z, and of dS and dm.
  void query_head(i64 h, int count, const Rows<const X>& grad_out, const T* rest, const Scratch& scratch,
                  const Sums<T>& gradients, T* dot, Upcoming& upcoming) const {
    const T *z = scratch.features.z + h * call_.c.head_stride(), *m = scratch.sums.m + h * call_.c.padded;
    T *g = scratch.packed, *w = scratch.gradient + h * call_.c.head_stride();
    T a[kBlock], b[kBlock], ones[kBlock];
    for (T& one : ones) one = 1;
    row_dots(z, m, count, call_.c.padded, a);
    for (int t = 0; t < count; ++t) a[t] = 1 / (a[t] + rest[t]);
    pack_head(grad_out, count, h, call_.c, a, g);
    call_.gemm.product(count, call_.c.dim, call_.c.padded, g, scratch.transposed + h * call_.c.matrix(),
                       nullptr, ones, w, upcoming);
    quotient_rule(count, a, z, m, w, b);
    for (int t = 0; t < count; ++t) dot[t] -= b[t] * rest[t];
    if (!plan_.needs_sums) return;
    add_weighted_rows(z, b, count, call_.c.padded, gradients.m + h * call_.c.padded);
    call_.gemm.outer_product(count, call_.c.dim, call_.c.padded, z, g, gradients.s + h * call_.c.matrix(),
                             upcoming);
  }

  /// Everything of a small window, head by head, by its scores.
  void score_pass(i64 pair, i64 next_pair, bool is_first, Scratch& scratch) const {
    const Scores<T>& scores = scratch.scores;
    const Features<T>& features = scratch.features;
    Block queries, keys;
    call_.first_block(call_.queries, pair, 0, queries);
    call_.first_block(call_.keys, pair, 0, keys);
    const Tile tile = tile_at(call_.keys, plan_.tiling, 0);
    Upcoming upcoming;
    upcoming.plan(call_.c.heads * (5 * call_.head_steps(queries.count) +
                                   (plan_.needs_ring ? convolve_steps<T>(tile, call_.c.padded) : 0)));
    expect_tile(next_pair, 0, upcoming);
    expect_queries(next_pair, 0, upcoming);

    call_.score_keys(keys, scratch.focus, scratch.scores);
    call_.map_queries(queries, scratch.focus, scratch.features);
    if (plan_.needs_ring) {
      scratch.ring.forget();
      scratch.ring.begin_tile(p_.grad_out, call_.keys, keys.image, call_.window(pair), tile);
    }
    const Rows<const X> values = rows_of<X>(call_.in.value, keys),
                        grad_out = rows_of<X>(p_.grad_out, queries);
    const Rows<X> grad_value = rows_of<X>(p_.grad_value, keys);
    T rest[kBlock], a[kBlock], b[kBlock], query_dot[kBlock] = {}, key_dot[kBlock] = {};
    call_.eps_by_factor(features.norms, queries.count, rest);
    for (i64 h = 0; h < call_.c.heads; ++h) {
      const i64 head = h * call_.c.head_stride();
      const T* z = features.z + head;
      scores.score(h, queries.count, z, rest, a, upcoming);
      pack_head(grad_out, queries.count, h, call_.c, a, scratch.packed);
      scores.pack_values(h, values);
      scores.differentiate(h, queries.count, scratch.packed, a, b, scratch.gradient + head, upcoming);
      for (int t = 0; t < queries.count; ++t) query_dot[t] += b[t] * rest[t];
      if (plan_.needs_sums)
        scores.differentiate_keys(h, queries.count, z, scratch.packed, scratch.dv, upcoming);
      if (plan_.needs_key_rows) add_dots(scores.z + head, scores.grad_keys + head, keys.count, key_dot);
      value_head(h, keys.count, plan_.needs_ring ? &tile : nullptr, scores.values, scratch.dv, scratch,
                 grad_value, upcoming);
    }
    if (plan_.needs_query_rows) query_rows(queries, query_dot, scratch);
    if (plan_.needs_key_rows) key_rows(keys, scores.grad_keys, scores.norms, key_dot, is_first, scratch);
    memory_.end_chain(scratch);
  }

  // Add what the passes will read and write to what is read ahead: of a block, or of the first block from a
  // place of a pair on; nothing if there is no such pair.
  void expect_queries(const Block& block, Upcoming& upcoming) const {
    upcoming.add<X>(call_.in.query, block, call_.c.count());
    upcoming.add<X>(p_.grad_out, block, call_.c.count());
    if (p_.grad_query.data && !streams_.query) upcoming.add<X>(p_.grad_query, block, call_.c.count());
  }
  void expect_queries(i64 pair, i64 position, Upcoming& upcoming) const {
    Block block;
    call_.first_block(call_.queries, pair, position, block);
    expect_queries(block, upcoming);
  }
  void expect_tile(const Block& block, Upcoming& upcoming) const {
    upcoming.add<X>(call_.in.key, block, call_.c.count());
    upcoming.add<X>(call_.in.value, block, call_.c.count());
    if (p_.grad_value.data && !streams_.value) upcoming.add<X>(p_.grad_value, block, call_.c.count());
    if (p_.grad_key.data && !streams_.key) upcoming.add<X>(p_.grad_key, block, call_.c.count());
    call_.expect_bias(block, upcoming);
  }
  void expect_tile(i64 pair, i64 index, Upcoming& upcoming) const {
    Block block;
    call_.tile_block(call_.keys, plan_.tiling, pair, index, block);
    expect_tile(block, upcoming);
  }
  void expect_pair(i64 pair, Start start, Upcoming& upcoming) const {
    if (pair >= call_.pairs()) return;
    if (!plan_.needs_attention()) return expect_tile(pair, start.tile, upcoming);
    if (memory_.state_of(pair)) return expect_queries(pair, start.query, upcoming);
    call_.expect_keys(pair, start.key, upcoming);
  }

  /// w += b m with b = -a (z . w), for the rows of one head of a block. The row's sum of z times the result
  /// is b eps / factor, which needs no difference of large numbers.
  void quotient_rule(int count, const T* a, const T* z, const T* m, T* w, T* b) const {
    sum_rows<T>(count, b, [&](int t) FLATTEN_INLINED {
      return dot_lanes(z + t * call_.c.padded, w + t * call_.c.padded, call_.c.padded);
    });
    for (int t = 0; t < count; ++t, w += call_.c.padded) {
      b[t] *= -a[t];
      const Vec<T> bt = broadcast(b[t]);
      for (i64 d = 0; d < call_.c.padded; d += kLanes<T>) store(w + d, fma(load(m + d), bt, load(w + d)));
    }
  }

  /// dk, dv and their part of dscale, dkey_bias, dweight, dbias of tiles [begin, end) of a window. The pair
  /// that `is_first` stores its part of dkey_bias, so that a sum as large as the keys need not be cleared.
  /// `mapped` says that the keys' features are at hand.
  template <class Expect>
  void key_pass(i64 pair, i64 begin, i64 end, bool is_first, bool mapped, Scratch& scratch,
                const Expect& expect_next) const {
    const i64 image = call_.image(pair), window = call_.window(pair);
    Features<T>& features = scratch.key_features;
    const bool packs_values = p_.grad_weight || plan_.needs_key_rows;
    const T mean = 1 / static_cast<T>(call_.geometry.window_keys());
    T ones[kBlock], weight[kBlock];
    for (T& one : ones) one = 1;
    Block blocks[2];  // the one at hand and the next, by turns
    Upcoming upcoming;
    scratch.ring.forget();
    if (begin < end)
      fill_tile(call_.keys, blocks[0], image, window, tile_at(call_.keys, plan_.tiling, begin));
    int turn = 0;
    for (i64 index = begin; index < end; ++index, turn ^= 1) {
      const Block& block = blocks[turn];
      Block& next = blocks[turn ^ 1];
      const Tile tile = tile_at(call_.keys, plan_.tiling, index);
      const bool has_taps = plan_.needs_ring && !tile.is_prefix;
      upcoming.plan(call_.c.heads * (2 * call_.head_steps(block.count) +
                                     (has_taps ? convolve_steps<T>(tile, call_.c.padded) : 0)));
      if (index + 1 < end) {
        const Tile next_tile = tile_at(call_.keys, plan_.tiling, index + 1);
        fill_tile(call_.keys, next, image, window, next_tile);
        expect_tile(next, upcoming);
        if (plan_.needs_ring) {
          expect_ring_rows<X>(p_.grad_out, call_.keys, image, window, next_tile, plan_.shape.pad_h,
                              call_.c.count(), upcoming);
        }
      } else {
        expect_next(upcoming);
      }
      if (plan_.needs_sums) {
        if (!mapped) call_.map_keys(block, scratch.focus, features);
        for (int t = 0; t < block.count; ++t) weight[t] = features.norms.factor[t] * mean;
      }
      if (has_taps) scratch.ring.begin_tile(p_.grad_out, call_.keys, image, window, tile);
      const Rows<const X> values = rows_of<X>(call_.in.value, block);
      const Rows<X> grad_value = rows_of<X>(p_.grad_value, block);
      T dot[kBlock] = {};
      for (i64 h = 0; h < call_.c.heads; ++h) {
        if (packs_values) pack_head(values, block.count, h, call_.c, ones, scratch.packed);
        key_products(h, block.count, weight, scratch, upcoming);
        const i64 head = h * call_.c.head_stride();
        if (plan_.needs_key_rows) add_dots(features.z + head, scratch.gradient + head, block.count, dot);
        value_head(h, block.count, has_taps ? &tile : nullptr, scratch.packed, scratch.dv, scratch,
                   grad_value, upcoming);
      }
      if (plan_.needs_key_rows) key_rows(block, scratch.gradient, features.norms, dot, is_first, scratch);
      if ((index + 1) % kChainBlocks == 0 || index + 1 == end) memory_.end_chain(scratch);
    }
  }

  /// One head's dv, and its part of dweight and dbias. `tile` is null for tokens that have no taps.
  void value_head(i64 h, int count, const Tile* tile, const T* values, const T* dv, Scratch& scratch,
                  const Rows<X>& grad_value, Upcoming& upcoming) const {
    if (!tile) {
      if (p_.grad_value.data) unpack_head(dv, count, h, call_.c, grad_value, streams_.value);
      return;
    }
    scratch.ring.stage_head(h);
    const i64 weights = plan_.shape.weight_vector(h, 0);
    if (p_.grad_value.data) {
      const TapsOutput<X, T> to{dv, scratch.zero_bias, grad_value.at, h * call_.c.dim, streams_.value};
      plan_.taps.convolve(scratch.ring, scratch.weights + weights, *tile, to, upcoming);
    }
    if (p_.grad_weight) plan_.taps.correlate(scratch.ring, values, *tile, scratch.chain.weight + weights);
    if (p_.grad_bias) sum_head(scratch.ring, *tile, scratch.chain.bias + h * call_.c.padded);
  }

  /// factor dK and dV of one head of a block; `weight`: factor / M.
  void key_products(i64 h, int count, const T* weight, const Scratch& scratch, Upcoming& upcoming) const {
    if (plan_.needs_key_rows) {
      call_.gemm.product(count, call_.c.dim, call_.c.padded, scratch.packed,
                         scratch.transposed + h * call_.c.matrix(), scratch.gradients.m + h * call_.c.padded,
                         weight, scratch.gradient + h * call_.c.head_stride(), upcoming);
    }
    if (p_.grad_value.data) {
      call_.gemm.product(count, call_.c.dim, call_.c.padded,
                         scratch.key_features.z + h * call_.c.head_stride(),
                         scratch.gradients.s + h * call_.c.matrix(), nullptr, weight, scratch.dv, upcoming);
    }
  }

  /// dot[t] += z[t] . r[t]
  void add_dots(const T* z, const T* r, int count, T* dot) const {
    T head[kBlock];
    sum_rows<T>(count, head, [&](int t) FLATTEN_INLINED {
      return dot_lanes(z + t * call_.c.padded, r + t * call_.c.padded, call_.c.padded);
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
    call_.focus_query.backward(rows_of<X>(call_.in.query, block).at, {}, block.count, scratch.gradient,
                               call_.c, scratch.focus, scratch.features.norms, dot, to);
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
    call_.focus_key.backward(rows_of<X>(call_.in.key, block).at, call_.bias_rows(block), block.count, r,
                             call_.c, scratch.focus, norms, dot, to);
  }

  const AttentionBackward& p_;
  AttentionCall<X> call_;
  BackwardPlan<X> plan_;
  BackwardMemory<X> memory_;
  struct {
    bool query, key, value;
  } streams_;  // which gradients are written past the caches, see is_streamed
};

}  // namespace flatten::cpu::FLATTEN_ISA
