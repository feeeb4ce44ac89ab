// What a backward call works in: the scratch of a slot, what the slots share, and the sums that become the
// parameters' gradients.
#pragma once

#include "attention.h"

namespace flatten::cpu::FLATTEN_ISA {

/// What a backward call computes, and how it cuts the keys.
template <class X>
struct BackwardPlan {
  using T = Accumulate<X>;

  BackwardPlan(const AttentionBackward& p, const AttentionCall<X>& call)
      : tiling(Tiling::make(call.keys)),
        shape(TapsShape<T>::make(p.taps, call.c, tiling)),
        taps(TapsKernels<X, T>::select(p.taps.kernel_w)),
        needs_key_rows(p.grad_key.data || p.grad_scale || p.grad_key_bias),
        needs_query_rows(p.grad_query.data || p.grad_scale),
        needs_sums(needs_key_rows || p.grad_value.data),
        needs_ring(p.taps && (p.grad_value.data || p.grad_weight || p.grad_bias)),
        by_scores(needs_attention() && call.can_score()),
        one_tile(tiling.count() == 1) {}

  bool needs_attention() const { return needs_sums || needs_query_rows; }

  Tiling tiling;
  TapsShape<T> shape;
  TapsKernels<X, T> taps;
  bool needs_key_rows, needs_query_rows, needs_sums, needs_ring, by_scores;
  bool one_tile;  // a window's keys are one tile, whose features outlive the query pass
};

template <class X>
class BackwardMemory {
 public:
  using T = Accumulate<X>;

  BackwardMemory(const AttentionBackward& p, const AttentionCall<X>& call, const BackwardPlan<X>& plan)
      : p_(p), call_(call), plan_(plan) {}

  /// Sums that become gradients: of dy * y (scale) and of the taps' bias as padded rows, of the taps' weight
  /// in the kernels' order.
  struct ParameterSums {
    T *scale, *bias, *weight;
  };

  /// What the slots of a call share or leave for each other: one of each per slot, unless said otherwise.
  struct Shared {
    T *partial_sums, *partial_gradients;  // S and m, dS and dm of the pair at hand
    ParameterSums parameters;
    T* key_bias;  // the sum of its gradient: window_keys padded rows for each of bias_slots
    i64 partial_stride, bias_elements;
    int bias_slots;
    bool bias_in_place;  // key_bias is the gradient's own memory
    bool bias_streamed;  // every row of it is stored once, see is_streamed
  };

  struct Scratch {
    FocusParameters<T> focus;
    Features<T> features, key_features;
    T* inverse_scale;
    T* gradient;     // factor dQ or factor dK of a block
    T *packed, *dv;  // of one head of a block
    Sums<T> sums, gradients;
    T* transposed;  // S^T in the query pass, dS^T in the key pass
    Scores<T> scores;
    T *weights, *zero_bias;
    TapsRing<X, T> ring;
    ParameterSums chain;  // of the tokens since the last end_chain()
    ParameterSums total;  // of this slot, in Shared
    T* key_bias_sum;      // this slot's part of Shared::key_bias, null where nobody asked for it
    bool bias_streamed;   // as in Shared
  };

  i64 weight_elements() const { return p_.grad_weight ? plan_.shape.weight_elements() : 0; }

  ParameterSums take_parameter_sums(Arena& arena, int slots) const {
    return {arena.take<T>(slots * call_.c.padded_count()), arena.take<T>(slots * call_.c.padded_count()),
            arena.take<T>(slots * weight_elements())};
  }
  void clear(const ParameterSums& sums, int slots) const {
    set_zero(sums.scale, slots * call_.c.padded_count());
    set_zero(sums.bias, slots * call_.c.padded_count());
    set_zero(sums.weight, slots * weight_elements());
  }
  /// Adds the sums of a chain of tokens to the slot's own (see in_chains) and starts a new one.
  void end_chain(const Scratch& scratch) const {
    add_to(scratch.total.scale, scratch.chain.scale, call_.c.padded_count());
    add_to(scratch.total.bias, scratch.chain.bias, call_.c.padded_count());
    add_to(scratch.total.weight, scratch.chain.weight, weight_elements());
    clear(scratch.chain, 1);
  }

  void lay_out(Arena& arena, Shared& s, int slots) const {
    s.partial_stride = ceil_div(call_.sums_elements(), 16) * 16;
    s.partial_sums = arena.take<T>(slots * s.partial_stride);
    s.partial_gradients = arena.take<T>(slots * s.partial_stride);
    s.parameters = take_parameter_sums(arena, slots);
    s.key_bias = s.bias_in_place ? static_cast<T*>(p_.grad_key_bias.data)
                                 : arena.take<T>(s.bias_slots * s.bias_elements);
  }

  void lay_out(Arena& arena, Scratch& s) const {
    s.inverse_scale = arena.take<T>(call_.c.padded_count());
    s.features = s.key_features = call_.take_features(arena);
    if (plan_.one_tile) s.key_features.z = arena.take<T>(call_.c.block());
    s.gradient = arena.take<T>(call_.c.block());
    s.packed = arena.take<T>(call_.c.head_stride());
    s.dv = arena.take<T>(call_.c.head_stride());
    s.sums = call_.sums_at(arena.take<T>(call_.sums_elements()));
    s.gradients = call_.sums_at(arena.take<T>(call_.sums_elements()));
    s.transposed = arena.take<T>(call_.c.matrices());
    s.chain = take_parameter_sums(arena, 1);
    if (plan_.by_scores) s.scores.take(arena, call_.c, static_cast<int>(call_.keys.tokens()), true);
    if (!plan_.needs_ring) return;
    s.weights = arena.take<T>(plan_.shape.weight_elements());
    s.zero_bias = arena.take<T>(call_.c.padded);
    s.ring = TapsRing<X, T>(plan_.shape, arena, false);
  }

  Scratch make_scratch(const Shared& shared, int slot) const {
    Scratch s;
    lay_out_in(thread_workspace, [&](Arena& arena) { lay_out(arena, s); });
    s.focus = call_.focus_parameters(s.inverse_scale);
    const i64 bias_slot = shared.bias_slots == 1 ? 0 : slot;
    clear(s.chain, 1);
    if (plan_.by_scores) s.scores.clear();
    s.total = {shared.parameters.scale + slot * call_.c.padded_count(),
               shared.parameters.bias + slot * call_.c.padded_count(),
               shared.parameters.weight + slot * weight_elements()};
    s.bias_streamed = shared.bias_streamed;
    s.key_bias_sum = p_.grad_key_bias ? shared.key_bias + bias_slot * shared.bias_elements : nullptr;
    return s;
  }

  void prepare_taps(Scratch& s) const {
    if (!plan_.needs_ring) return;
    fill_weights(call_.in.taps, plan_.shape, true, s.weights);
    set_zero(s.zero_bias, call_.c.padded);
    s.ring.clear();
  }

  void clear(const Sums<T>& sums) const { set_zero(sums.s, call_.sums_elements()); }

  void transpose_matrices(const T* from, T* to) const {
    for (i64 h = 0; h < call_.c.heads; ++h) {
      transpose(from + h * call_.c.matrix(), to + h * call_.c.matrix(), call_.c.dim, call_.c.dim,
                call_.c.padded);
    }
  }

  /// The S and m of a pair that the forward saved, or null.
  const T* state_of(i64 pair) const {
    const i64 at = p_.state ? call_.saved_at(pair, p_.saved_windows) : -1;
    return at < 0 ? nullptr : static_cast<const T*>(p_.state) + at;
  }

  /// Prepares S^T and m for the query pass, from the state if it has them, else from `sums`.
  void take_sums(i64 pair, const Scratch& scratch) const {
    const T* state = state_of(pair);
    if (state && call_.c.dim == call_.c.padded) {  // the state is laid out as `sums` are
      transpose_matrices(state, scratch.transposed);
      __builtin_memcpy(scratch.sums.m, state + call_.c.matrices(),
                       static_cast<std::size_t>(call_.c.count()) * sizeof(T));
      return;
    }
    if (state) call_.load_state(state, scratch.sums);
    transpose_matrices(scratch.sums.s, scratch.transposed);
  }

  /// Adds up the slots' sums, in order, into the parameters' gradients.
  void write_gradients(const Shared& shared, int slots) const {
    for (i64 c = 0; p_.grad_scale && c < call_.c.count(); ++c) {
      // y = (relu(x) + eps) / scale, so dscale = -sum of dy y / scale.
      T sum = 0;
      for (int s = 0; s < slots; ++s) {
        sum += shared.parameters
                   .scale[s * call_.c.padded_count() + c / call_.c.dim * call_.c.padded + c % call_.c.dim];
      }
      write_parameter(p_.grad_scale, c, -sum / read_parameter<T>(call_.in.mapping.scale, c));
    }
    write_taps_gradients(plan_.shape, shared.parameters.weight, weight_elements(), shared.parameters.bias,
                         slots, p_.grad_weight, p_.grad_bias);
  }

  /// The same for rows [begin, end) of key_bias.
  void write_key_bias_gradient(const Shared& shared, i64 begin, i64 end) const {
    for (i64 j = begin; j < end; ++j) {
      for (i64 h = 0; h < call_.c.heads; ++h) {
        for (i64 d = 0; d < call_.c.padded; d += kLanes<T>) {
          const T* from = shared.key_bias + j * call_.c.padded_count() + h * call_.c.padded + d;
          Vec<T> sum = load(from);
          for (int s = 1; s < shared.bias_slots; ++s) sum = sum + load(from + s * shared.bias_elements);
          store_parameter<T>(p_.grad_key_bias, j * call_.c.count() + h * call_.c.dim + d, sum,
                             call_.c.dim - d);
        }
      }
    }
  }

 private:
  const AttentionBackward& p_;
  const AttentionCall<X>& call_;
  const BackwardPlan<X>& plan_;
};

}  // namespace flatten::cpu::FLATTEN_ISA
