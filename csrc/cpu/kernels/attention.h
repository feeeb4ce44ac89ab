// What the forward and the backward pass of attention share: features of queries and keys, and the sums S and
// m.
#pragma once

#include "../workspace.h"
#include "focus.h"
#include "gemm.h"
#include "schedule.h"
#include "scores.h"
#include "taps.h"

namespace flatten::cpu::FLATTEN_ISA {

/// S (dim x padded a head) and, right behind it, m (padded a head) of one window.
template <class T>
struct Sums {
  T* s;
  T* m;
};

/// Features of a block of tokens, head-major: phi = norms.factor * z.
template <class T>
struct Features {
  T* z;
  Norms<T> norms;
  Sums<T> chain;  // see AttentionCall::in_chains
};

/// sum += the weighted rows of one head of a block. Two or four rows are summed apart, so that four or eight
/// sums are under way and hide each other's latency.
template <class T>
void add_weighted_rows(const T* rows, const T* weight, int count, i64 padded, T* sum) {
  const auto columns = [&](auto vectors, i64 d) FLATTEN_INLINED {
    constexpr int kV = decltype(vectors)::value, kChains = kV == 4 ? 2 : 4;
    Vec<T> acc[kChains][kV] = {};
    const auto add = [&](int t, auto chain) FLATTEN_INLINED {
      const Vec<T> w = broadcast(weight[t]);
      unrolled<kV>([&](auto v) FLATTEN_INLINED {
        acc[chain][v] = fma(load(rows + t * padded + d + v * kLanes<T>), w, acc[chain][v]);
      });
    };
    int t = 0;
    for (; t + kChains <= count; t += kChains)
      unrolled<kChains>([&](auto chain) FLATTEN_INLINED { add(t + chain, chain); });
    for (; t < count; ++t) add(t, Constant<0>{});
    unrolled<kV>([&](auto v) FLATTEN_INLINED {
      T* to = sum + d + v * kLanes<T>;
      Vec<T> total = load(to);
      unrolled<kChains>([&](auto chain) FLATTEN_INLINED { total = total + acc[chain][v]; });
      store(to, total);
    });
  };
  i64 d = 0;
  for (; d + 4 * kLanes<T> <= padded; d += 4 * kLanes<T>) columns(Constant<4>{}, d);
  for (; d + 2 * kLanes<T> <= padded; d += 2 * kLanes<T>) columns(Constant<2>{}, d);
  if (d < padded) columns(Constant<1>{}, d);
}

/// One call as both directions see it: what it reads, how its tokens are cut, and the functions for its
/// sizes.
template <class X>
struct AttentionCall {
  using T = Accumulate<X>;

  explicit AttentionCall(const AttentionInputs& in)
      : in(in),
        geometry(in.geometry),
        c(Channels::make<T>(in.geometry)),
        keys(Grid::make(in.geometry, in.geometry.window_keys(), static_cast<bool>(in.taps))),
        queries(Grid::make(in.geometry, in.geometry.window_queries(), static_cast<bool>(in.taps))),
        gemm(Gemm<T>::select(c.dim, c.padded)),
        focus_query(Focus<X, T>::select(in.mapping, {}, c)),
        focus_key(Focus<X, T>::select(in.mapping, in.mapping.key_bias, c)),
        eps(static_cast<T>(in.eps)) {}

  i64 pairs() const { return geometry.batch * geometry.windows(); }
  i64 image(i64 pair) const { return pair / geometry.windows(); }
  i64 window(i64 pair) const { return pair % geometry.windows(); }
  /// The first block of a pair's tokens from `position` on; an empty one if there is no such pair.
  void first_block(const Grid& grid, i64 pair, i64 position, Block& block) const {
    block.clear(0);
    if (pair >= pairs()) return;
    grid.fill(block, image(pair), window(pair), position, smaller(kBlock, grid.tokens() - position));
  }
  /// The tokens of a pair's tile; none if there is no such tile or pair.
  void tile_block(const Grid& grid, const Tiling& tiling, i64 pair, i64 index, Block& block) const {
    block.clear(0);
    if (pair >= pairs() || index >= tiling.count()) return;
    fill_tile(grid, block, image(pair), window(pair), tile_at(grid, tiling, index));
  }
  i64 sums_elements() const { return c.matrices() + c.padded_count(); }
  Sums<T> sums_at(T* memory) const { return {memory, memory + c.matrices()}; }

  /// Adds up the slots' partial sums, in order, into `sums`.
  void add_partials(const T* partials, i64 stride, int slots, const Sums<T>& sums) const {
    for (i64 i = 0; i < sums_elements(); i += kLanes<T>) {
      Vec<T> sum = load(partials + i);
      for (int s = 1; s < slots; ++s) sum = sum + load(partials + s * stride + i);
      store(sums.s + i, sum);
    }
  }

  /// Whether the windows are so small that their scores take fewer products than S does.
  bool can_score() const { return keys.prefix == 0 && scores_pay(queries.tokens(), keys.tokens(), c.dim); }

  /// How often one product of a head with `count` tokens calls Upcoming::step().
  i64 head_steps(i64 count) const { return product_steps<T>(count, c.padded, c.dim); }

  double forward_flops() const {
    const double taps = 2.0 * in.taps.kernel_h * in.taps.kernel_w;
    return static_cast<double>(geometry.batch) * c.count() *
           (2.0 * (geometry.queries + geometry.keys) * c.dim + taps * geometry.queries);
  }

  FocusParameters<T> focus_parameters(T* inverse_scale) const {
    fill_inverse_scale(in.mapping, c, inverse_scale);
    return FocusParameters<T>::make(in.mapping, in.eps, inverse_scale);
  }

  Features<T> take_features(Arena& arena) const {
    Features<T> features;
    features.z = arena.take<T>(c.block());
    features.chain = sums_at(arena.take<T>(sums_elements()));
    return features;
  }

  void map_queries(const Block& block, const FocusParameters<T>& f, Features<T>& to) const {
    focus_query.forward(rows_of<X>(in.query, block).at, {}, block.count, to.z, c, f, to.norms);
  }
  /// rest[t] = eps / factor. The factor of a query cancels in (Q S) / (Q m + eps) but for this.
  void eps_by_factor(const Norms<T>& norms, int count, T* rest) const {
    for (int t = 0; t < count; ++t) rest[t] = eps / norms.factor[t];
  }
  BiasRows bias_rows(const Block& block) const { return {in.mapping.key_bias.data, block.position}; }
  void map_keys(const Block& block, const FocusParameters<T>& f, Features<T>& to) const {
    focus_key.forward(rows_of<X>(in.key, block).at, bias_rows(block), block.count, to.z, c, f, to.norms);
  }

  /// Adds positions [begin, end) of a window to S = sum of K^T V / M and m = sum of K / M. The factors of the
  /// keys ride on the values: K^T V = z^T (factor V). `values` holds one head of a block.
  /// expect_next(upcoming) adds what the slot reads behind the last key.
  template <class Expect>
  void sum_keys(i64 pair, i64 begin, i64 end, const FocusParameters<T>& f, Features<T>& features, T* values,
                const Sums<T>& sums, const Expect& expect_next) const {
    in_chains(begin, end, features.chain, sums, [&](i64 from, i64 to, const Sums<T>& into) {
      sum_keys_chain(pair, from, to, end, f, features, values, into, expect_next);
    });
  }

  /// Calls sum(from, to, into) for each chain (kChainBlocks) of [begin, end) and adds the chains' sums up, in
  /// order.
  template <class Sum>
  void in_chains(i64 begin, i64 end, const Sums<T>& chain, const Sums<T>& total, const Sum& sum) const {
    constexpr i64 kChain = kChainBlocks * kBlock;
    if (end - begin <= kChain) return sum(begin, end, total);
    for (i64 at = begin; at < end; at += kChain) {
      set_zero(chain.s, sums_elements());
      sum(at, smaller(at + kChain, end), chain);
      add_to(total.s, chain.s, sums_elements());
    }
  }

  /// sum_keys() of one chain, keys [begin, end); the slot will read keys up to `last`.
  template <class Expect>
  void sum_keys_chain(i64 pair, i64 begin, i64 end, i64 last, const FocusParameters<T>& f,
                      Features<T>& features, T* values, const Sums<T>& sums,
                      const Expect& expect_next) const {
    const i64 size = block_size(end - begin);
    const T mean = 1 / static_cast<T>(geometry.window_keys());
    Block blocks[2];  // the one at hand and the next, by turns
    Upcoming upcoming;
    keys.fill(blocks[0], image(pair), window(pair), begin, smaller(size, end - begin));
    int turn = 0;
    for (i64 at = begin; at < end; at += size, turn ^= 1) {
      const Block& block = blocks[turn];
      Block& next = blocks[turn ^ 1];
      map_keys(block, f, features);
      const Rows<const X> rows = rows_of<X>(in.value, block);
      upcoming.plan(c.heads * product_steps<T>(c.dim, c.padded, block.count));
      if (at + size < last) {
        keys.fill(next, image(pair), window(pair), at + size, smaller(size, last - at - size));
        upcoming.add<X>(in.key, next, c.count());
        upcoming.add<X>(in.value, next, c.count());
        expect_bias(next, upcoming);
      } else {
        expect_next(upcoming);
      }
      T weight[kBlock];
      for (int t = 0; t < block.count; ++t) weight[t] = features.norms.factor[t] * mean;
      for (i64 h = 0; h < c.heads; ++h) {
        const T* z = features.z + h * c.head_stride();
        pack_head(rows, block.count, h, c, weight, values);
        gemm.outer_product(block.count, c.dim, c.padded, z, values, sums.s + h * c.matrix(), upcoming);
        add_weighted_rows(z, weight, block.count, c.padded, sums.m + h * c.padded);
      }
    }
  }

  /// Maps a small window's keys for its scores.
  void score_keys(const Block& keys, const FocusParameters<T>& f, Scores<T>& scores) const {
    focus_key.forward(rows_of<X>(in.key, keys).at, bias_rows(keys), keys.count, scores.z, c, f, scores.norms);
    scores.weigh_keys();
  }

  /// Adds the rows of key_bias that a block's keys will read.
  void expect_bias(const Block& block, Upcoming& upcoming) const {
    const Parameter& bias = in.mapping.key_bias;
    if (!bias || element_size(bias.dtype) != static_cast<i64>(sizeof(X))) return;
    upcoming.add_rows(static_cast<const X*>(bias.data), c.count(), block.position, block, c.count());
  }
  /// Adds the keys and values that a pair to come will read. (All pairs read the same key_bias.)
  void expect_keys(i64 pair, i64 position, Upcoming& upcoming) const {
    Block block;
    first_block(keys, pair, position, block);
    upcoming.add<X>(in.key, block, c.count());
    upcoming.add<X>(in.value, block, c.count());
  }

  // A state keeps S and m without padding: (saved windows, heads, dim, dim), then m, window by window.
  /// Where a state of `saved` windows holds the S and m of a pair, or -1 if it does not. The windows it holds
  /// are spread evenly over the pairs, so that every slot finds as many.
  i64 saved_at(i64 pair, i64 saved) const {
    const i64 at = pair * saved / pairs();
    return (pair + 1) * saved / pairs() > at ? at * window_state_elements(geometry) : -1;
  }
  void save_state(const Sums<T>& sums, T* state) const {
    const i64 rows = c.heads * (c.dim + 1);
    for (i64 i = 0; i < rows; ++i) unpack(sums.s + i * c.padded, state + i * c.dim, c.dim);
  }
  void load_state(const T* state, const Sums<T>& sums) const {
    const i64 rows = c.heads * (c.dim + 1);
    for (i64 i = 0; i < rows; ++i) pack(state + i * c.dim, sums.s + i * c.padded, c.dim, T(1));
  }

  const AttentionInputs& in;
  const Geometry& geometry;
  Channels c;
  Grid keys, queries;
  Gemm<T> gemm;
  Focus<X, T> focus_query, focus_key;
  T eps;
};

}  // namespace flatten::cpu::FLATTEN_ISA
