// The query pass of the backward: dq, dgate, and a window's dS, dm and du, tile by tile. With o = a Qn S + b
// u (normalize.h) and g = act(gate) grad_out:
//
//     P = (a g) S^T     s = Qn . P     factor dQn = P     factor dQd = means m
//     dS = sum of Qn^T (a g)           dm = sum of means Qd              du = sum of b g
#pragma once

#include "../attention.h"
#include "queries.h"

namespace flatten::cpu::FLATTEN_ISA {

/// What the query pass of a call has to compute, and from what.
struct QueryTask {
  Tokens grad_out;
  Tokens out;                         // of the forward, from which dgate follows without it; or null
  MutableTokens query, normal, gate;  // gradients, each may be null
  bool scale = false;                 // whether that of scale is wanted
  bool sums = false;                  // whether dS, dm and du are
  bool needs_rows() const { return query.data || normal.data || scale; }
  bool needs_attention() const { return needs_rows() || sums; }
  /// Whether the ungated output is computed again for dgate in every tile, or only where it has to be.
  bool recomputes() const { return gate.data && !out.data; }
};

template <class X>
class QueryGradients {
 public:
  using T = Accumulate<X>;
  using Call = GeneralCall<X>;
  using Forward = QuerySide<X>;

  QueryGradients(const Call& call, const Forward& forward, const QueryTask& task)
      : call_(call),
        forward_(forward),
        task_(of_call(task, forward)),
        scales_at_once_(!call.normalizing.reads_u() && task.needs_attention()),
        streamed_(is_streamed<X>(task.query, call.geometry, call.geometry.queries)) {}

  struct Scratch {
    typename Forward::Scratch forward;
    T *g, *gradient;  // g: one head of a block; gradient: of the features, one head or, where focused, all
    T* transposed;    // S^T
    T* scale_sum;     // a padded row: the sum of dy y
    GeneralSums<T> chain;
    /// Where g is left for the taps: rows of D_v * heads elements by token, or null.
    T* g_of_image;
  };
  void lay_out(Arena& arena, Scratch& s) const {
    forward_.lay_out(arena, s.forward);
    s.g = arena.take<T>(call_.cv.head_stride());
    s.gradient = arena.take<T>(call_.focused ? call_.ck.block() : call_.ck.head_stride());
    s.transposed = arena.take<T>(call_.transposed_elements());
    s.chain = call_.sums_at(arena.take<T>(call_.sums_elements()));
  }

  /// Tiles [begin, end) of a window, whose S, m and u are in s.forward.sums; `gradients` are added to.
  /// end_chain() is called after every kChainBlocks tiles and after the last.
  template <class EndChain, class Expect>
  void run(i64 pair, i64 begin, i64 end, Scratch& s, const GeneralSums<T>& gradients,
           const EndChain& end_chain, const Expect& expect_next) const {
    const i64 image = call_.image(pair), window = call_.window(pair);
    const Tiling& tiling = forward_.tiling();
    Block blocks[2];  // the one at hand and the next, by turns
    Upcoming upcoming;
    if (task_.needs_attention()) call_.transpose_matrices(s.forward.sums.s, s.transposed);
    if (task_.recomputes()) forward_.begin_window(image, s.forward);
    if (begin < end)
      fill_tile(call_.queries, blocks[0], image, window, tile_at(call_.queries, tiling, begin));
    const bool chained = end - begin > kChainBlocks;
    const GeneralSums<T>& into = chained ? s.chain : gradients;
    if (chained) call_.clear(s.chain);
    int turn = 0;
    for (i64 index = begin; index < end; ++index, turn ^= 1) {
      const Block& block = blocks[turn];
      Block& next = blocks[turn ^ 1];
      const Tile tile = tile_at(call_.queries, tiling, index);
      upcoming.plan(call_.ck.heads * (2 * call_.products.steps(block.count) +
                                      (task_.recomputes() ? forward_.tap_steps(tile) : 0)));
      if (index + 1 < end) {
        const Tile next_tile = tile_at(call_.queries, tiling, index + 1);
        fill_tile(call_.queries, next, image, window, next_tile);
        expect(next, upcoming);
        if (task_.recomputes()) forward_.expect_ring(image, window, next_tile, upcoming);
      } else {
        expect_next(upcoming);
      }
      run_tile(block, window, tile, s, into, upcoming);
      if ((index + 1 - begin) % kChainBlocks != 0 && index + 1 != end) continue;
      end_chain();
      if (!chained) continue;
      add_to(gradients.s, s.chain.s, call_.sums_elements());
      call_.clear(s.chain);
    }
  }

  /// Expects what a tile reads and writes.
  void expect(const Block& block, Upcoming& upcoming) const {
    forward_.expect(block, task_.query.data && !streamed_ ? &task_.query : nullptr, upcoming);
    upcoming.add<X>(task_.grad_out, block, call_.cv.count());
    if (task_.gate.data) upcoming.add<X>(task_.gate, block, call_.cv.count());
    if (task_.out.data) upcoming.add<X>(task_.out, block, call_.cv.count());
  }
  void expect(i64 pair, i64 index, Upcoming& upcoming) const {
    Block block;
    call_.tile_block(call_.queries, forward_.tiling(), pair, index, block);
    expect(block, upcoming);
  }

 private:
  /// Without an output that nobody reads.
  static QueryTask of_call(QueryTask task, const Forward& forward) {
    if (!task.gate.data || !forward.gate().backward_from_output) task.out.data = nullptr;
    return task;
  }

  void run_tile(const Block& block, i64 window, const Tile& tile, Scratch& s, const GeneralSums<T>& into,
                Upcoming& upcoming) const {
    const General& general = call_.general;
    const Channels ck = call_.ck;
    const bool attends = task_.needs_attention() || task_.gate.data;
    const Rows<const X> query = rows_of<X>(call_.in.query, block),
                        grad_out = rows_of<X>(task_.grad_out, block);
    Rows<const X> normal;
    if (general.normalizer_query.data) normal = rows_of<X>(general.normalizer_query, block);
    if (attends) call_.begin_queries(query, block, s.forward.focus, s.forward.features);
    GatedTile gated(*this, block, window, tile, grad_out, s);
    T dot[kBlock] = {};
    for (i64 h = 0; h < ck.heads; ++h) {
      Head<T> head{};
      if (attends)
        head = forward_.begin_head(h, query, general.normalizer_query.data ? &normal : nullptr, block,
                                   s.forward);
      if (general.gate.data) {
        gated.run(h, head, upcoming);
      } else {
        const T* a = scales_at_once_ ? s.forward.coefficients.a : call_.ones();
        pack_head(grad_out, block.count, h, call_.cv, s.g_of_image ? call_.ones() : a, s.g);
        if (s.g_of_image) {
          keep(h, block, s);
          if (scales_at_once_) scale_rows(a, block.count, call_.cv.padded, s.g);
        }
      }
      if (task_.needs_attention()) differentiate(h, head, block, s, into, dot, upcoming);
    }
    if (!call_.focused || !(task_.query.data || task_.scale)) return;
    const Rows<X> dx = rows_of<X>(task_.query, block);
    if (all_empty(s.forward)) {  // a row of NaN has the gradient 0 too
      for (int t = 0; task_.query.data && t < block.count; ++t) set_zero(dx[t], ck.count());
      return;
    }
    RowGradients<X, T> to;
    if (task_.query.data) to.dx = dx.at;
    if (task_.scale) to.scale_sum = s.scale_sum;
    to.streamed = streamed_;
    call_.focus_query().backward(query.at, {}, block.count, s.gradient, ck, s.forward.focus,
                                 s.forward.features.norms, dot, to);
  }

  /// The gate's part of a tile: g of its heads, times a where scales_at_once_, and dgate.
  struct GatedTile {
    GatedTile(const QueryGradients& of, const Block& block, i64 window, const Tile& tile,
              const Rows<const X>& grad_out, Scratch& s)
        : of_(of), block_(block), window_(window), tile_(tile), grad_out_(grad_out), s_(s) {
      if (!of.call_.general.gate.data) return;
      gate_ = rows_of<X>(of.call_.general.gate, block);
      grad_gate_ = rows_of<X>(of.task_.gate, block);
      if (of.task_.out.data) out_ = rows_of<X>(of.task_.out, block);
      if (of.task_.recomputes()) begin();
    }
    void run(i64 h, const Head<T>& head, Upcoming& upcoming) {
      const Channels cv = of_.call_.cv;
      const Gate<X, T>& gate = of_.forward_.gate();
      T* kept[kBlock];
      for (int t = 0; s_.g_of_image && t < block_.count; ++t)
        kept[t] = s_.g_of_image + block_.token[t] * cv.count() + h * cv.dim;
      const UngatedGradient<T> to{of_.scales_at_once_ ? s_.forward.coefficients.a : of_.call_.ones(), s_.g,
                                  s_.g_of_image ? kept : nullptr};
      if (of_.task_.out.data &&
          gate.backward_from_output(out_.at, gate_.at, grad_out_.at, block_.count, h, cv, to, grad_gate_.at))
        return;
      if (of_.task_.gate.data) {
        if (!began_) of_.forward_.begin_window(block_.image, s_.forward);
        if (!began_) begin();
        of_.forward_.attend_head(h, head, block_.count, s_.forward, upcoming);
        if (has_taps()) of_.forward_.add_taps(h, tile_, s_.forward, upcoming);
      }
      gate.backward(s_.forward.attended, gate_.at, grad_out_.at, block_.count, h, cv, to,
                    of_.task_.gate.data ? grad_gate_.at : nullptr);
    }

   private:
    bool has_taps() const { return of_.call_.in.taps && !tile_.is_prefix; }
    /// Before the first head whose ungated output is computed again.
    void begin() {
      began_ = true;
      if (has_taps())
        s_.forward.ring.begin_tile(of_.call_.in.value, of_.call_.queries, block_.image, window_, tile_);
    }

    const QueryGradients& of_;
    const Block& block_;
    i64 window_;
    const Tile& tile_;
    const Rows<const X>& grad_out_;
    Scratch& s_;
    Rows<const X> gate_, out_;
    Rows<X> grad_gate_;
    bool began_ = false;
  };

  /// One head of a tile, from its features and g.
  void differentiate(i64 h, const Head<T>& head, const Block& block, Scratch& s, const GeneralSums<T>& into,
                     T* dot, Upcoming& upcoming) const {
    const Channels ck = call_.ck, cv = call_.cv;
    const GeneralSums<T>& sums = s.forward.sums;
    Coefficients<T>& k = s.forward.coefficients;
    const int count = block.count;
    T* gradient = s.gradient + (call_.focused ? h * ck.head_stride() : 0);
    const T* m = sums.m + h * ck.padded;
    if (s.forward.empty[h]) {
      set_zero(gradient, count * ck.padded);
      if (task_.normal.data) write_multiples(h, m, k.means, block);  // zeros
      if (call_.focused || !task_.query.data) return;
      const Rows<X> dx = rows_of<X>(task_.query, block);
      return call_.map_backward(h, head.z, block, gradient, {dx.at, nullptr, streamed_});
    }
    T gu[kBlock], qp[kBlock];
    if (call_.normalizing.reads_u()) {
      row_dots(s.g, sums.u + h * cv.padded, count, cv.padded, gu);
      if (task_.sums) add_weighted_rows(s.g, k.b, count, cv.padded, into.u + h * cv.padded);
    }
    if (!scales_at_once_) scale_rows(k.a, count, cv.padded, s.g);
    call_.products.to_keys(count, s.g, s.transposed + h * cv.dim * ck.padded, nullptr, call_.ones(), gradient,
                           upcoming);
    sum_rows<T>(count, qp, [&](int t) FLATTEN_INLINED {
      return dot_lanes(head.product + t * ck.padded, gradient + t * ck.padded, ck.padded);
    });
    call_.normalizing.differentiate(count, s.forward.features.norms.factor, s.forward.empty[h], qp, gu, k,
                                    dot);
    if (task_.sums) {
      if (call_.normalizing.reads_m())
        add_weighted_rows(head.normal, k.means, count, ck.padded, into.m + h * ck.padded);
      call_.products.outer(count, head.product, s.g, into.s + h * call_.matrix(), upcoming);
    }
    if (!task_.needs_rows()) return;
    const bool has_normal = call_.general.normalizer_query.data != nullptr;
    if (has_normal && task_.normal.data) write_multiples(h, m, k.means, block);
    const T* start = has_normal || !call_.normalizing.reads_m() ? nullptr : m;
    if (call_.focused || !task_.query.data) return call_.finish_features(h, block, gradient, start, k.means);
    const Rows<X> dx = rows_of<X>(task_.query, block);
    call_.finish_head(h, head.z, block, gradient, start, k.means, {dx.at, nullptr, streamed_});
  }

  bool all_empty(const typename Forward::Scratch& s) const {
    bool all = true;
    for (i64 h = 0; h < call_.ck.heads; ++h) all &= s.empty[h];
    return all;
  }

  static void scale_rows(const T* factor, int count, i64 padded, T* rows) {
    for (int t = 0; t < count; ++t, rows += padded) {
      const Vec<T> f = broadcast(factor[t]);
      for (i64 d = 0; d < padded; d += kLanes<T>) store(rows + d, load(rows + d) * f);
    }
  }
  /// The gradient of the normalizer's features of one head: means[t] * m.
  void write_multiples(i64 h, const T* m, const T* means, const Block& block) const {
    const Rows<X> rows = rows_of<X>(task_.normal, block);
    for (int t = 0; t < block.count; ++t) {
      X* to = rows[t] + h * call_.ck.dim;
      for (i64 d = 0; d < call_.ck.dim; d += kLanes<T>)
        store_at_most(to + d, load(m + d) * means[t], call_.ck.dim - d);
    }
  }
  void keep(i64 h, const Block& block, const Scratch& s) const {
    const Channels cv = call_.cv;
    for (int t = 0; t < block.count; ++t)
      unpack(s.g + t * cv.padded, s.g_of_image + block.token[t] * cv.count() + h * cv.dim, cv.dim);
  }

  const Call& call_;
  const Forward& forward_;
  QueryTask task_;
  bool scales_at_once_;  // g is multiplied by a where it is formed: nobody reads it without
  bool streamed_;
};

}  // namespace flatten::cpu::FLATTEN_ISA
