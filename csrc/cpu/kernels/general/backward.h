// The backward pass of one call of the general form: per window S, m and u again, unless they were saved, the
// query pass, the key pass.
#pragma once

#include "key_gradient.h"
#include "query_gradient.h"

namespace flatten::cpu::FLATTEN_ISA {

template <class X>
class GeneralBackward {
  using T = Accumulate<X>;

 public:
  explicit GeneralBackward(const AttentionBackward& p)
      : p_(p),
        call_(p),
        key_sums_(call_),
        forward_(call_),
        keys_(call_, key_task(p)),
        queries_(call_, forward_, query_task(p)),
        shape_(keys_.shape()),
        parameters_(call_, {p.grad_scale, p.grad_key_bias, p.grad_weight, p.grad_bias}, &shape_),
        needs_keys_(key_task(p).needs_sums() || keys_.needs_ring()),
        keeps_g_(keys_.needs_ring() && (p.general.gate.data || !std::is_same_v<X, T>)),
        needs_sums_(query_task(p).needs_attention() || p.grad_gate.data),
        needs_queries_(needs_sums_ || keeps_g_) {}
  GeneralBackward(const GeneralBackward&) = delete;  // its parts refer to call_

  void run(const Parallel& parallel) const {
    // Slots that do whole pairs each sum the gradient of key_bias; the limit [bytes] is that of
    // BackwardKernel::run, for the same reason.
    constexpr i64 kMostBiasBytes = 8 << 20;
    const i64 key_tokens = call_.keys.tokens(), tiles = forward_.tiling().count(),
              key_tiles = keys_.tiling().count();
    const i64 bias_bytes = parameters_.key_bias_elements() * static_cast<i64>(sizeof(T));
    const Schedule schedule = Schedule::make(parallel, call_.pairs(), key_tokens, 2 * call_.forward_flops(),
                                             bias_bytes * parallel.threads > kMostBiasBytes);
    const int slots = schedule.slots;
    Shared shared;
    lay_out_in(shared_workspace, [&](Arena& arena) { lay_out(arena, shared, schedule); });
    parameters_.clear(shared.parameters, slots);

    auto whole = [&](int slot) {
      Scratch s = make_scratch(shared, slot, true);
      const i64 end = schedule.begin(schedule.whole, slot + 1);
      for (i64 pair = schedule.begin(schedule.whole, slot); pair < end; ++pair) {
        const i64 next_pair = pair + 1 < end ? pair + 1 : call_.pairs();
        begin_pair(pair, s);
        if (needs_sums_ && !load(pair, s)) {
          call_.clear(s.query.forward.sums);
          key_sums_.add(pair, 0, key_tokens, s.key.key, s.query.forward.sums,
                        [&](Upcoming& upcoming) { queries_.expect(pair, 0, upcoming); });
        }
        call_.clear(s.key.gradients);
        if (needs_queries_) {
          queries_.run(pair, 0, tiles, s.query, s.key.gradients, end_chain(pair, slot, shared, s),
                       [&](Upcoming& upcoming) { keys_.expect(pair, 0, upcoming); });
        }
        if (!needs_keys_) continue;
        keys_.subtract_mean(s.key);
        keys_.run(pair, 0, key_tiles, s.key, end_chain(pair, slot, shared, s),
                  [&](Upcoming& upcoming) { call_.expect_keys(next_pair, 0, upcoming); });
      }
    };
    if (schedule.whole > 0) for_each_slot(parallel, slots, whole);
    for (i64 pair = schedule.whole; pair < schedule.pairs; ++pair) {
      auto sum = [&](int slot) {
        Scratch s = make_scratch(shared, slot, false);
        begin_pair(pair, s);
        const GeneralSums<T> sums = call_.sums_at(shared.sums + slot * shared.stride);
        call_.clear(sums);
        key_sums_.add(
            pair, schedule.begin(key_tokens, slot), schedule.begin(key_tokens, slot + 1), s.key.key, sums,
            [&](Upcoming& upcoming) { queries_.expect(pair, schedule.begin(tiles, slot), upcoming); });
      };
      auto query = [&](int slot) {
        Scratch s = make_scratch(shared, slot, false);
        begin_pair(pair, s);
        take_sums(pair, slots, shared, s);
        const GeneralSums<T> gradients = call_.sums_at(shared.gradients + slot * shared.stride);
        call_.clear(gradients);
        queries_.run(pair, schedule.begin(tiles, slot), schedule.begin(tiles, slot + 1), s.query, gradients,
                     end_chain(pair, slot, shared, s), [&](Upcoming& upcoming) {
                       keys_.expect(pair, schedule.begin(key_tiles, slot), upcoming);
                     });
      };
      auto key = [&](int slot) {
        Scratch s = make_scratch(shared, slot, false);
        begin_pair(pair, s);
        if (needs_queries_) call_.add_partials(shared.gradients, shared.stride, slots, s.key.gradients);
        if (p_.grad_key_weight) {
          take_sums(pair, slots, shared, s);
          keys_.subtract_mean(s.key);
        }
        keys_.run(pair, schedule.begin(key_tiles, slot), schedule.begin(key_tiles, slot + 1), s.key,
                  end_chain(pair, slot, shared, s), [&](Upcoming& upcoming) {
                    call_.expect_keys(pair + 1, schedule.begin(key_tokens, slot), upcoming);
                  });
      };
      if (needs_sums_ && !saved(pair)) for_each_slot(parallel, slots, sum);
      if (needs_queries_) for_each_slot(parallel, slots, query);
      if (needs_keys_) for_each_slot(parallel, slots, key);
    }
    parameters_.write(parallel, shared.parameters, slots);
  }

 private:
  /// The memory that the slots share, or leave for each other.
  struct Shared {
    T *sums = nullptr, *gradients = nullptr;  // of the pair at hand, one of each a slot
    T* g = nullptr;                           // of its image, see QueryGradients::Scratch::g_of_image
    i64 stride = 0;
    typename ParameterGradients<X>::Shared parameters;
  };
  struct Scratch {
    typename QueryGradients<X>::Scratch query;
    typename KeyGradients<X>::Scratch key;
    ParameterSums<T> chain;
  };

  static KeyTask key_task(const AttentionBackward& p) {
    return {p.grad_key,
            p.grad_value,
            p.grad_normalizer_key,
            p.grad_key_weight,
            static_cast<bool>(p.grad_scale),
            static_cast<bool>(p.grad_key_bias),
            static_cast<bool>(p.grad_weight),
            static_cast<bool>(p.grad_bias)};
  }
  static QueryTask query_task(const AttentionBackward& p) {
    return {p.grad_out,
            p.out,
            p.grad_query,
            p.grad_normalizer_query,
            p.grad_gate,
            static_cast<bool>(p.grad_scale),
            key_task(p).needs_sums()};
  }

  i64 g_elements() const { return keeps_g_ ? call_.geometry.keys * call_.cv.count() : 0; }

  void lay_out(Arena& arena, Shared& s, const Schedule& schedule) const {
    s.stride = ceil_div(call_.sums_elements(), 16) * 16;
    parameters_.lay_out(arena, s.parameters, schedule);
    if (schedule.whole == schedule.pairs) return;
    s.sums = arena.take<T>(schedule.slots * s.stride);
    s.gradients = arena.take<T>(schedule.slots * s.stride);
    s.g = arena.take<T>(g_elements());
  }

  /// `owns_g`: the slot does whole pairs, and has a g of its own.
  Scratch make_scratch(const Shared& shared, int slot, bool owns_g) const {
    Scratch s;
    T* g = shared.g;
    lay_out_in(thread_workspace, [&](Arena& arena) {
      queries_.lay_out(arena, s.query);
      keys_.lay_out(arena, s.key, key_sums_);
      s.chain = parameters_.take_chain(arena);
      if (owns_g) g = arena.take<T>(g_elements());
    });
    forward_.prepare(s.query.forward);
    key_sums_.prepare(s.key.key);
    keys_.prepare(s.key);
    parameters_.clear_chain(s.chain);
    s.key.sums = s.query.forward.sums;
    s.key.sums_of_chain = s.chain;
    s.query.scale_sum = s.chain.scale;
    s.query.g_of_image = keeps_g_ ? g : nullptr;
    s.key.g = keeps_g_ ? Tokens{g, 0, call_.cv.count()} : p_.grad_out;
    s.key.key_bias_sum = parameters_.key_bias_of(slot, shared.parameters);
    return s;
  }

  auto end_chain(i64 pair, int slot, const Shared& shared, const Scratch& s) const {
    return [this, pair, slot, &shared, &s] {
      parameters_.end_chain(s.chain, call_.image(pair), slot, shared.parameters);
    };
  }

  void begin_pair(i64 pair, Scratch& s) const {
    call_.begin_pair(pair, s.key.key.shares);
    for (i64 h = 0; h < call_.ck.heads; ++h) s.query.forward.empty[h] = call_.is_empty(h, s.key.key.shares);
  }

  /// The S, m and u of a pair that the forward saved, or null.
  const T* saved(i64 pair) const {
    const i64 at = p_.state ? call_.saved_at(pair, p_.saved_windows) : -1;
    return at < 0 ? nullptr : static_cast<const T*>(p_.state) + at;
  }
  bool load(i64 pair, const Scratch& s) const {
    const T* state = saved(pair);
    if (state) call_.load_state(state, s.query.forward.sums);
    return state != nullptr;
  }
  void take_sums(i64 pair, int slots, const Shared& shared, const Scratch& s) const {
    if (needs_sums_ && !load(pair, s))
      call_.add_partials(shared.sums, shared.stride, slots, s.query.forward.sums);
  }

  const AttentionBackward& p_;
  GeneralCall<X> call_;
  KeySums<X> key_sums_;
  QuerySide<X> forward_;
  KeyGradients<X> keys_;
  QueryGradients<X> queries_;
  TapsShape<T> shape_;
  ParameterGradients<X> parameters_;
  bool needs_keys_, keeps_g_, needs_sums_, needs_queries_;
};

}  // namespace flatten::cpu::FLATTEN_ISA
