// The sums S, m and u of a window from its keys and values.
#pragma once

#include "../attention.h"
#include "call.h"

namespace flatten::cpu::FLATTEN_ISA {

template <class X>
class KeySums {
 public:
  using T = Accumulate<X>;
  using Call = GeneralCall<X>;

  /// The memory that one slot works in.
  struct Scratch {
    FocusParameters<T> focus;
    T *inverse_scale, *values;  // values: one head of a block
    HeadFeatures<T> features;
    KeyShares<X> shares;
    GeneralSums<T> chain;
  };

  explicit KeySums(const Call& call) : call_(call) {}

  void lay_out(Arena& arena, Scratch& s) const {
    s.inverse_scale = arena.take<T>(call_.ck.padded_count());
    s.features = call_.take_features(arena);
    s.shares = call_.take_shares(arena);
    s.values = arena.take<T>(call_.cv.head_stride());
    s.chain = call_.sums_at(arena.take<T>(call_.sums_elements()));
  }
  void prepare(Scratch& s) const { s.focus = call_.focus_parameters(s.inverse_scale); }

  /// Adds positions [begin, end) of a window to S, m and u. shares.inverse is the window's already.
  /// expect_next(upcoming) adds what the slot reads behind the last key.
  template <class Expect>
  void add(i64 pair, i64 begin, i64 end, Scratch& s, const GeneralSums<T>& sums,
           const Expect& expect_next) const {
    constexpr i64 kChain = kChainBlocks * kBlock;
    if (end - begin <= kChain) return add_chain(pair, begin, end, end, s, sums, expect_next);
    for (i64 at = begin; at < end; at += kChain) {
      call_.clear(s.chain);
      add_chain(pair, at, smaller(at + kChain, end), end, s, s.chain, expect_next);
      add_to(sums.s, s.chain.s, call_.sums_elements());
    }
  }

 private:
  /// add() of one chain; the slot will read keys up to `last`.
  template <class Expect>
  void add_chain(i64 pair, i64 begin, i64 end, i64 last, Scratch& s, const GeneralSums<T>& sums,
                 const Expect& expect_next) const {
    const i64 size = block_size(end - begin), image = call_.image(pair), window = call_.window(pair);
    Block blocks[2];  // the one at hand and the next, by turns
    Upcoming upcoming;
    call_.keys.fill(blocks[0], image, window, begin, smaller(size, end - begin));
    int turn = 0;
    for (i64 at = begin; at < end; at += size, turn ^= 1) {
      const Block& block = blocks[turn];
      Block& next = blocks[turn ^ 1];
      upcoming.plan(call_.ck.heads * call_.products.outer_steps(block.count));
      if (at + size < last) {
        call_.keys.fill(next, image, window, at + size, smaller(size, last - at - size));
        call_.expect_keys(next, upcoming);
      } else {
        expect_next(upcoming);
      }
      add_block(block, s, sums, upcoming);
    }
  }

  void add_block(const Block& block, Scratch& s, const GeneralSums<T>& sums, Upcoming& upcoming) const {
    const Channels ck = call_.ck, cv = call_.cv;
    const General& general = call_.general;
    const bool has_normal = general.normalizer_key.data != nullptr;
    Rows<const X> key = rows_of<X>(call_.in.key, block), value = rows_of<X>(call_.in.value, block), normal;
    if (has_normal) normal = rows_of<X>(general.normalizer_key, block);
    call_.begin_shares(block, s.shares, key, value, has_normal ? &normal : nullptr);
    call_.begin_keys(key, block, s.focus, s.features);
    T weight[kBlock];
    for (i64 h = 0; h < ck.heads; ++h) {
      const T* share = call_.share_of(h, s.shares);
      call_.weigh_keys(h, block, s.shares, s.features, weight);
      const Head<T> head = call_.key_head(h, key, has_normal ? &normal : nullptr, block, s.features);
      if (call_.needs_u && call_.focused) {  // u has no factors of keys
        pack_head(value, block.count, h, cv, share, s.values);
        add_weighted_rows(s.values, call_.ones(), block.count, cv.padded, sums.u + h * cv.padded);
      }
      pack_head(value, block.count, h, cv, weight, s.values);
      call_.products.outer(block.count, head.product, s.values, sums.s + h * call_.matrix(), upcoming);
      if (call_.normalizing.reads_m() || !call_.divides)
        add_weighted_rows(head.normal, weight, block.count, ck.padded, sums.m + h * ck.padded);
      if (call_.needs_u && !call_.focused)
        add_weighted_rows(s.values, call_.ones(), block.count, cv.padded, sums.u + h * cv.padded);
    }
  }

  const Call& call_;
};

}  // namespace flatten::cpu::FLATTEN_ISA
