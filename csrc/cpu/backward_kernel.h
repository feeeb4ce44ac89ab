// The backward pass of one call. Per window and head, with W = g S^T and the features kept as factor * z^p:
//
//     query pass   a = 1 / (z^p m + eps / factor)     b = a^2 (z^p . W)
//                  factor dQ = a W - b m              dS = sum of (z^p)^T (a g)     dm = -sum of b z^p
//     key pass     dK = (V dS^T + dm) / M             dV = K dS / M + flipped taps of g
//
// W gives both dQ and the quotient's derivative, so the output is not computed again.
#pragma once

#include "attention_kernel.h"

namespace flatten::cpu::FLATTEN_ISA {

template <class X>
class BackwardKernel : AttentionKernel<X> {
  using Base = AttentionKernel<X>;
  using Base::c_, Base::eps_, Base::focus_, Base::focus_biased_, Base::gemm_, Base::geometry_, Base::in_,
      Base::keys_, Base::queries_;
  using typename Base::T;

 public:
  explicit BackwardKernel(const AttentionBackward& p)
      : Base(p),
        p_(p),
        tiling_(Tiling::make(keys_)),
        shape_(TapsShape<T>::make(p.taps, c_, tiling_)),
        taps_(TapsKernels<X, T>::select(p.taps.kernel_w)),
        needs_key_rows_(p.grad_key.data || p.grad_scale || p.grad_key_bias),
        needs_query_rows_(p.grad_query.data || p.grad_scale),
        needs_sums_(needs_key_rows_ || p.grad_value.data),
        needs_ring_(p.taps && (p.grad_value.data || p.grad_weight || p.grad_bias)) {}

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
    Arena measure;
    lay_out(measure, shared, slots);
    Arena arena(shared_workspace(measure.used()));
    lay_out(arena, shared, slots);
    set_zero(shared.scale, slots * c_.padded_count());
    set_zero(shared.bias, slots * c_.padded_count());
    set_zero(shared.weight, slots * weight_elements());
    set_zero(shared.key_bias, shared.bias_slots * shared.bias_elements);

    auto whole = [&](int slot) {
      Scratch scratch = make_scratch(shared, slot);
      const i64 end = schedule.begin(schedule.whole, slot + 1);
      for (i64 pair = schedule.begin(schedule.whole, slot); pair < end; ++pair) {
        if (needs_attention()) {
          load_or_sum(pair, scratch);
          transpose_matrices(scratch.sums.s, scratch.transposed);
          clear(scratch.gradients);
          query_pass(pair, 0, queries_.tokens(), scratch, scratch.gradients);
          take_mean(scratch);
        }
        key_pass(pair, 0, tiling_.count(), scratch);
      }
    };
    if (schedule.whole > 0) for_each_slot(parallel, slots, whole);
    for (i64 pair = schedule.whole; pair < schedule.pairs; ++pair)
      run_shared(parallel, schedule, pair, shared);
    write_gradients(shared, slots);
  }

 private:
  /// What the slots of a call share or leave for each other; per slot unless said.
  struct Shared {
    T *partial_sums, *partial_gradients;  // of the pair at hand
    T *scale, *bias, *weight;             // dy y and dbias as padded rows, dweight in the kernels' order
    T* key_bias;                          // bias_slots times window_keys padded rows
    i64 partial_stride, bias_elements;
    int bias_slots;
  };

  struct Scratch {
    FocusParameters<T> focus;
    T* inverse_scale;
    Features<T> features;
    T* blocks[3];
    Sums<T> sums, gradients;
    T* transposed;  // S^T in the query pass, dS^T in the key pass
    T *weights, *ring;
    TapsRing<X, T> taps;
    T *scale_sum, *weight_sum, *bias_sum, *key_bias_sum;  // this slot's part of Shared
  };

  i64 weight_elements() const { return p_.grad_weight ? shape_.weight_elements() : 0; }

  void lay_out(Arena& arena, Shared& s, int slots) const {
    s.partial_stride = ceil_div(Base::sums_elements(), 16) * 16;
    s.partial_sums = arena.take<T>(slots * s.partial_stride);
    s.partial_gradients = arena.take<T>(slots * s.partial_stride);
    s.scale = arena.take<T>(slots * c_.padded_count());
    s.bias = arena.take<T>(slots * c_.padded_count());
    s.weight = arena.take<T>(slots * weight_elements());
    s.key_bias = arena.take<T>(s.bias_slots * s.bias_elements);
  }

  void lay_out(Arena& arena, Scratch& s) const {
    s.inverse_scale = arena.take<T>(c_.padded_count());
    s.features.lay_out(arena, c_);
    for (T*& block : s.blocks) block = arena.take<T>(c_.block());
    s.sums = Base::sums_at(arena.take<T>(Base::sums_elements()));
    s.gradients = Base::sums_at(arena.take<T>(Base::sums_elements()));
    s.transposed = arena.take<T>(c_.matrices());
    if (needs_ring_) {
      s.weights = arena.take<T>(shape_.weight_elements());
      s.ring = arena.take<T>(shape_.ring_elements());
    }
  }

  Scratch make_scratch(const Shared& shared, int slot) const {
    Scratch s;
    Arena measure;
    lay_out(measure, s);
    Arena arena(thread_workspace(measure.used()));
    lay_out(arena, s);
    s.focus = Base::focus_parameters(s.inverse_scale);
    if (needs_ring_) {
      fill_weights(in_.taps, shape_, true, s.weights);
      s.taps = TapsRing<X, T>(shape_, s.ring);
    }
    s.scale_sum = shared.scale + slot * c_.padded_count();
    s.bias_sum = shared.bias + slot * c_.padded_count();
    s.weight_sum = shared.weight + slot * weight_elements();
    s.key_bias_sum = shared.key_bias + (shared.bias_slots == 1 ? 0 : slot) * shared.bias_elements;
    return s;
  }

  void clear(const Sums<T>& sums) const { set_zero(sums.s, Base::sums_elements()); }

  void transpose_matrices(const T* from, T* to) const {
    for (i64 h = 0; h < c_.heads; ++h) {
      transpose(from + h * c_.matrix(), to + h * c_.matrix(), c_.dim, c_.padded);
    }
  }

  void load_or_sum(i64 pair, const Scratch& scratch) const {
    if (p_.state) return Base::load_state(pair, p_.state, scratch.sums);
    clear(scratch.sums);
    Features<T> features = scratch.features;
    Base::sum_keys(pair, 0, keys_.tokens(), scratch.focus, features, scratch.blocks[0], scratch.sums);
  }

  /// A pair whose tokens all slots share.
  void run_shared(const Parallel& parallel, const Schedule& schedule, i64 pair, const Shared& shared) const {
    const int slots = schedule.slots;
    const i64 stride = shared.partial_stride;
    auto sum = [&](int slot) {
      Scratch scratch = make_scratch(shared, slot);
      const Sums<T> sums = Base::sums_at(shared.partial_sums + slot * stride);
      clear(sums);
      Base::sum_keys(pair, schedule.begin(keys_.tokens(), slot), schedule.begin(keys_.tokens(), slot + 1),
                     scratch.focus, scratch.features, scratch.blocks[0], sums);
    };
    auto queries = [&](int slot) {
      Scratch scratch = make_scratch(shared, slot);
      if (p_.state) {
        Base::load_state(pair, p_.state, scratch.sums);
      } else {
        add_partials(shared.partial_sums, stride, slots, scratch.sums);
      }
      transpose_matrices(scratch.sums.s, scratch.transposed);
      const Sums<T> gradients = Base::sums_at(shared.partial_gradients + slot * stride);
      clear(gradients);
      query_pass(pair, schedule.begin(queries_.tokens(), slot), schedule.begin(queries_.tokens(), slot + 1),
                 scratch, gradients);
    };
    auto keys = [&](int slot) {
      Scratch scratch = make_scratch(shared, slot);
      if (needs_attention()) {
        add_partials(shared.partial_gradients, stride, slots, scratch.gradients);
        take_mean(scratch);
      }
      key_pass(pair, schedule.begin(tiling_.count(), slot), schedule.begin(tiling_.count(), slot + 1),
               scratch);
    };
    if (needs_attention()) {
      if (!p_.state) for_each_slot(parallel, slots, sum);
      for_each_slot(parallel, slots, queries);
    }
    for_each_slot(parallel, slots, keys);
  }

  bool needs_attention() const { return needs_sums_ || needs_query_rows_; }

  void add_partials(const T* partials, i64 stride, int slots, const Sums<T>& sums) const {
    clear(sums);
    for (int s = 0; s < slots; ++s) add_to(sums.s, partials + s * stride, Base::sums_elements());
  }

  /// dS and dm of the mean: over M, and dS^T beside them.
  void take_mean(const Scratch& scratch) const {
    const T mean = 1 / static_cast<T>(geometry_.window_keys());
    T* sums = scratch.gradients.s;
    for (i64 i = 0; i < Base::sums_elements(); i += kLanes<T>) store(sums + i, load(sums + i) * mean);
    transpose_matrices(sums, scratch.transposed);
  }

  /// dq of positions [begin, end) of a window, and their part of dS, dm (without the 1 / M) and dscale.
  void query_pass(i64 pair, i64 begin, i64 end, const Scratch& scratch, const Sums<T>& gradients) const {
    T *g = scratch.blocks[0], *w = scratch.blocks[1];
    Features<T> features = scratch.features;
    const i64 image = Base::image(pair);
    T ones[kBlock];
    for (T& one : ones) one = 1;
    Block block;
    for (i64 at = begin; at < end; at += kBlock) {
      queries_.fill(block, image, Base::window(pair), at, smaller(kBlock, end - at));
      Base::map_queries(block, scratch.focus, features);
      Base::pack(p_.grad_out, block, ones, g);
      T dot[kBlock] = {};
      for (i64 h = 0; h < c_.heads; ++h) {
        const i64 at_head = h * c_.head_stride();
        gemm_.product(block.count, c_.dim, c_.padded, g + at_head, scratch.transposed + h * c_.matrix(), ones,
                      w + at_head);
        query_head(block.count, features, features.z + at_head, scratch.sums.m + h * c_.padded, g + at_head,
                   w + at_head, dot, gradients.m + h * c_.padded);
        if (needs_sums_) {
          gemm_.outer_product(block.count, c_.dim, c_.padded, features.z + at_head, g + at_head,
                              gradients.s + h * c_.matrix());
        }
      }
      if (!needs_query_rows_) continue;
      for (int t = 0; t < block.count; ++t) {
        T* r = w + t * c_.padded;
        focus_.backward(token_row<X>(in_.query, image, block.token[t]), r, c_.head_stride(), c_,
                        scratch.focus, features.norms[t], dot[t],
                        p_.grad_scale ? scratch.scale_sum : nullptr);
        if (p_.grad_query.data) {
          unpack_row(r, token_row<X>(p_.grad_query, image, block.token[t]), c_.head_stride(), c_);
        }
      }
    }
  }

  /// One head of a block of queries: g becomes a g, w becomes factor dQ, dm takes its part. The row's sum of
  /// z^p (a W - b m) is b eps / factor, which needs no difference of large numbers.
  void query_head(int count, const Features<T>& features, const T* z, const T* m, T* g, T* w, T* dot,
                  T* dm) const {
    T minus_b[kBlock];
    for (int t = 0; t < count; ++t) {
      const i64 row = t * c_.padded;
      Vec<T> zm = {}, zw = {};
      for (i64 d = 0; d < c_.padded; d += kLanes<T>) {
        const Vec<T> zd = load(z + row + d);
        zm = fma(zd, load(m + d), zm);
        zw = fma(zd, load(w + row + d), zw);
      }
      const T rest = eps_ / features.factor[t];
      const T a = 1 / (sum(zm) + rest), b = sum(zw) * a * a;
      minus_b[t] = -b;
      dot[t] += b * rest;
      for (i64 d = 0; d < c_.padded; d += kLanes<T>) {
        store(w + row + d, load(w + row + d) * a - load(m + d) * b);
        store(g + row + d, load(g + row + d) * a);
      }
    }
    Base::add_weighted_rows(z, minus_b, count, dm);
  }

  /// dk, dv and their part of dscale, dkey_bias, dweight, dbias of tiles [begin, end) of a window.
  void key_pass(i64 pair, i64 begin, i64 end, Scratch& scratch) const {
    T *v = scratch.blocks[0], *r = scratch.blocks[1], *dv = scratch.blocks[2];
    Features<T>& features = scratch.features;
    const i64 image = Base::image(pair), window = Base::window(pair);
    T ones[kBlock];
    for (T& one : ones) one = 1;
    Block block;
    scratch.taps.forget();
    for (i64 index = begin; index < end; ++index) {
      const Tile tile = tile_at(keys_, tiling_, index);
      fill_tile(keys_, block, image, window, tile);
      if (needs_sums_) Base::map_keys(block, scratch.focus, features);
      if (needs_key_rows_ || p_.grad_weight) Base::pack(in_.value, block, ones, v);
      if (needs_key_rows_) key_rows(block, v, r, scratch);
      if (p_.grad_value.data) {
        for (i64 h = 0; h < c_.heads; ++h) {
          gemm_.product(block.count, c_.dim, c_.padded, features.z + h * c_.head_stride(),
                        scratch.gradients.s + h * c_.matrix(), features.factor, dv + h * c_.head_stride());
        }
      }
      if (needs_ring_ && !tile.is_prefix) {
        scratch.taps.advance(p_.grad_out, keys_, image, window, tile);
        if (p_.grad_value.data) taps_.convolve(scratch.taps, scratch.weights, keys_.rows, tile, dv);
        if (p_.grad_weight) taps_.correlate(scratch.taps, v, keys_.rows, tile, scratch.weight_sum);
        if (p_.grad_bias) sum_tile(scratch.taps, tile, scratch.bias_sum);
      }
      if (!p_.grad_value.data) continue;
      for (int t = 0; t < block.count; ++t) {
        unpack_row(dv + t * c_.padded, token_row<X>(p_.grad_value, image, block.token[t]), c_.head_stride(),
                   c_);
      }
    }
  }

  /// dk of a block, in place of factor dK in r.
  void key_rows(const Block& block, const T* v, T* r, const Scratch& scratch) const {
    const Features<T>& features = scratch.features;
    T dot[kBlock] = {};
    for (i64 h = 0; h < c_.heads; ++h) {
      const T* dm = scratch.gradients.m + h * c_.padded;
      const T* z = features.z + h * c_.head_stride();
      T* rh = r + h * c_.head_stride();
      gemm_.product(block.count, c_.dim, c_.padded, v + h * c_.head_stride(),
                    scratch.transposed + h * c_.matrix(), features.factor, rh);
      for (int t = 0; t < block.count; ++t) {
        const i64 row = t * c_.padded;
        Vec<T> zr = {};
        for (i64 d = 0; d < c_.padded; d += kLanes<T>) {
          const Vec<T> rd = fma(load(dm + d), broadcast(features.factor[t]), load(rh + row + d));
          zr = fma(load(z + row + d), rd, zr);
          store(rh + row + d, rd);
        }
        dot[t] += sum(zr);
      }
    }
    T* scale_sum = p_.grad_scale ? scratch.scale_sum : nullptr;
    for (int t = 0; t < block.count; ++t) {
      const X* x = token_row<X>(in_.key, block.image, block.token[t]);
      T* row = r + t * c_.padded;
      if (in_.mapping.key_bias) {
        add_bias_row(x, in_.mapping.key_bias, block.position[t], c_, features.bias_row);
        focus_biased_.backward(features.bias_row, row, c_.head_stride(), c_, scratch.focus, features.norms[t],
                               dot[t], scale_sum);
      } else {
        focus_.backward(x, row, c_.head_stride(), c_, scratch.focus, features.norms[t], dot[t], scale_sum);
      }
      if (p_.grad_key.data) {
        unpack_row(row, token_row<X>(p_.grad_key, block.image, block.token[t]), c_.head_stride(), c_);
      }
      if (p_.grad_key_bias) {
        T* sum = scratch.key_bias_sum + block.position[t] * c_.padded_count();
        for (i64 h = 0; h < c_.heads; ++h) add_to(sum + h * c_.padded, row + h * c_.head_stride(), c_.padded);
      }
    }
  }

  /// The slots' sums, in order, into the parameters' gradients.
  void write_gradients(const Shared& shared, int slots) const {
    const auto total = [&](const T* sums, i64 stride, int count, i64 at) {
      T sum = 0;
      for (int s = 0; s < count; ++s) sum += sums[s * stride + at];
      return sum;
    };
    for (i64 h = 0; h < c_.heads; ++h) {
      for (i64 d = 0; d < c_.dim; ++d) {
        const i64 from = h * c_.padded + d, to = h * c_.dim + d;
        if (p_.grad_scale) {
          // y = (relu(x) + eps) / scale, so dscale = -sum of dy y / scale.
          const T sum = total(shared.scale, c_.padded_count(), slots, from);
          write_parameter(p_.grad_scale, to, -sum / read_parameter<T>(in_.mapping.scale, to));
        }
        if (!p_.grad_key_bias) continue;
        for (i64 j = 0; j < keys_.tokens(); ++j) {
          write_parameter(
              p_.grad_key_bias, j * c_.count() + to,
              total(shared.key_bias, shared.bias_elements, shared.bias_slots, j * c_.padded_count() + from));
        }
      }
    }
    write_taps_gradients(shape_, shared.weight, shared.bias, slots, p_.grad_weight, p_.grad_bias);
  }

  const AttentionBackward& p_;
  Tiling tiling_;
  TapsShape<T> shape_;
  TapsKernels<X, T> taps_;
  bool needs_key_rows_, needs_query_rows_, needs_sums_, needs_ring_;
};

}  // namespace flatten::cpu::FLATTEN_ISA
