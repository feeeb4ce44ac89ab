// flatten::attention_state and flatten::attention_from_state: the two halves of attention, with all that
// queries read of their keys as a tensor between them. It has (D_k + 1) x (D_v + 1) numbers an image and
// head:
//
//     sum of w Kn v^T    sum of w Kd
//     sum of w v         W
#pragma once

#include "key_gradient.h"
#include "query_gradient.h"

namespace flatten::cpu::FLATTEN_ISA {

/// One head of a state.
template <class T>
struct StateOfHead {
  i64 dim, value_dim;
  T* at;
  T* row(i64 i) const { return at + i * (value_dim + 1); }
  T& m(i64 i) const { return row(i)[value_dim]; }
  T* u() const { return row(dim); }
  T& w() const { return row(dim)[value_dim]; }
};
template <class T, class X>
StateOfHead<T> state_of(const GeneralCall<X>& call, T* state, i64 image, i64 head) {
  const i64 elements = (call.ck.dim + 1) * (call.cv.dim + 1);
  return {call.ck.dim, call.cv.dim, state + (image * call.ck.heads + head) * elements};
}
/// Copies a head's S, m and u from a state, times a factor. u is left out where the call does not need it.
template <class X, class T>
void read_state(const GeneralCall<X>& call, const StateOfHead<const T>& state, i64 head, T factor,
                const GeneralSums<T>& sums) {
  const Channels ck = call.ck, cv = call.cv;
  T* s = sums.s + head * call.matrix();
  set_zero(sums.m + head * ck.padded, ck.padded);
  for (i64 i = 0; i < ck.dim; ++i) {
    pack(state.row(i), s + i * cv.padded, cv.dim, factor);
    sums.m[head * ck.padded + i] = state.m(i) * factor;
  }
  if (call.needs_u) pack(state.u(), sums.u + head * cv.padded, cv.dim, factor);
}
template <class X, class T>
void write_state(const GeneralCall<X>& call, const GeneralSums<T>& sums, i64 head, T factor, T w,
                 const StateOfHead<T>& state) {
  const Channels ck = call.ck, cv = call.cv;
  for (i64 i = 0; i <= ck.dim; ++i) {
    const T* from = i < ck.dim ? sums.s + head * call.matrix() + i * cv.padded : sums.u + head * cv.padded;
    const bool has = i < ck.dim || call.needs_u;
    for (i64 d = 0; d < cv.dim; ++d) state.row(i)[d] = has ? from[d] * factor : 0;
    if (i < ck.dim) state.m(i) = sums.m[head * ck.padded + i] * factor;
  }
  state.w() = w;
}

/// Shares the pairs of a state operator among slots: whole(pair, slot) does one alone; part(pair, slot) does
/// a slot's part of one, and finish(pair) is called behind the parts.
template <class Whole, class Part, class Finish>
void run_pairs(const Parallel& parallel, const Schedule& schedule, const Whole& whole, const Part& part,
               const Finish& finish) {
  auto run = [&](int slot) {
    const i64 begin = schedule.begin(schedule.whole, slot), end = schedule.begin(schedule.whole, slot + 1);
    if (begin < end) whole(begin, end, slot);
  };
  if (schedule.whole > 0) for_each_slot(parallel, schedule.slots, run);
  for (i64 pair = schedule.whole; pair < schedule.pairs; ++pair) {
    auto run_part = [&](int slot) { part(pair, slot); };
    for_each_slot(parallel, schedule.slots, run_part);
    finish(pair);
  }
}

template <class X>
class StateKernel {
  using T = Accumulate<X>;

 public:
  explicit StateKernel(const AttentionInputs& in) : call_(in, false), key_sums_(call_) {}
  StateKernel(const StateKernel&) = delete;  // its parts refer to call_

  void forward(const StateForward& p, const Parallel& parallel) const {
    const i64 tokens = call_.keys.tokens(), stride = ceil_div(call_.sums_elements(), 16) * 16;
    const Schedule schedule = plan(parallel);
    T* partials = static_cast<T*>(shared_workspace(schedule.slots * stride * sizeof(T)));
    T* state = static_cast<T*>(p.state);
    const auto nothing = [](Upcoming&) {};
    const auto whole = [&](i64 begin, i64 end, int slot) {
      Scratch s = make_scratch();
      const GeneralSums<T> sums = call_.sums_at(partials + slot * stride);
      for (i64 pair = begin; pair < end; ++pair) {
        call_.clear(sums);
        call_.begin_pair(pair, s.shares);
        key_sums_.add(pair, 0, tokens, s, sums, [&](Upcoming& upcoming) {
          call_.expect_keys(pair + 1 < end ? pair + 1 : call_.pairs(), 0, upcoming);
        });
        write(pair, sums, state, s.shares.inverse);
      }
    };
    const auto part = [&](i64 pair, int slot) {
      Scratch s = make_scratch();
      const GeneralSums<T> sums = call_.sums_at(partials + slot * stride);
      call_.clear(sums);
      call_.begin_pair(pair, s.shares);
      key_sums_.add(pair, schedule.begin(tokens, slot), schedule.begin(tokens, slot + 1), s, sums, nothing);
    };
    const auto finish = [&](i64 pair) {
      const GeneralSums<T> total = call_.sums_at(partials);
      call_.add_partials(partials, stride, schedule.slots, total);
      Scratch s = make_scratch();
      write(pair, total, state, s.shares.inverse);
    };
    run_pairs(parallel, schedule, whole, part, finish);
  }

  void backward(const StateBackward& p, const Parallel& parallel) const {
    const KeyTask task{p.grad_key,
                       p.grad_value,
                       p.grad_normalizer_key,
                       p.grad_key_weight,
                       static_cast<bool>(p.grad_scale),
                       static_cast<bool>(p.grad_key_bias),
                       false,
                       false};
    const KeyGradients<X> keys(call_, task);
    const ParameterGradients<X> parameters(call_, {p.grad_scale, p.grad_key_bias, {}, {}}, nullptr);
    const Schedule schedule = plan(parallel);
    typename ParameterGradients<X>::Shared shared;
    lay_out_in(shared_workspace, [&](Arena& arena) { parameters.lay_out(arena, shared, schedule); });
    parameters.clear(shared, schedule.slots);
    const T* grad_state = static_cast<const T*>(p.grad_state);
    const i64 tiles = keys.tiling().count();
    const auto run = [&](i64 first, i64 last, i64 begin, i64 end, int slot) {
      typename KeyGradients<X>::Scratch s;
      lay_out_in(thread_workspace, [&](Arena& arena) {
        keys.lay_out(arena, s, key_sums_);
        s.sums_of_chain = parameters.take_chain(arena);
      });
      key_sums_.prepare(s.key);
      keys.prepare(s);
      parameters.clear_chain(s.sums_of_chain);
      s.key_bias_sum = parameters.key_bias_of(slot, shared);
      for (i64 pair = first; pair < last; ++pair) {
        call_.begin_pair(pair, s.key.shares);
        for (i64 h = 0; h < call_.ck.heads; ++h) {
          const StateOfHead<const T> head = state_of(call_, grad_state, pair, h);
          read_state<X, T>(call_, head, h, T(1), s.gradients);
          s.rest[h] = head.w();
        }
        keys.run(
            pair, begin, end, s, [&] { parameters.end_chain(s.sums_of_chain, pair, slot, shared); },
            [&](Upcoming& upcoming) {
              keys.expect(pair + 1 < last ? pair + 1 : call_.pairs(), 0, upcoming);
            });
      }
    };
    run_pairs(
        parallel, schedule, [&](i64 begin, i64 end, int slot) { run(begin, end, 0, tiles, slot); },
        [&](i64 pair, int slot) {
          run(pair, pair + 1, schedule.begin(tiles, slot), schedule.begin(tiles, slot + 1), slot);
        },
        [](i64) {});
    parameters.write(parallel, shared, schedule.slots);
  }

 private:
  using Scratch = typename KeySums<X>::Scratch;

  Scratch make_scratch() const {
    Scratch s;
    lay_out_in(thread_workspace, [&](Arena& arena) { key_sums_.lay_out(arena, s); });
    key_sums_.prepare(s);
    return s;
  }
  Schedule plan(const Parallel& parallel) const {
    return Schedule::make(parallel, call_.pairs(), call_.keys.tokens(), call_.forward_flops(), false);
  }
  /// `totals`: memory for the W of every head.
  void write(i64 pair, const GeneralSums<T>& sums, T* state, double* totals) const {
    call_.total_weights(pair, totals);
    for (i64 h = 0; h < call_.ck.heads; ++h) {
      const T w = static_cast<T>(totals[call_.weight_rows == 1 ? 0 : h]);
      write_state(call_, sums, h, T(1), w, state_of(call_, state, pair, h));
    }
  }

  GeneralCall<X> call_;
  KeySums<X> key_sums_;
};

template <class X>
class FromStateKernel {
  using T = Accumulate<X>;

 public:
  explicit FromStateKernel(const AttentionInputs& in) : call_(in), forward_(call_) {}
  FromStateKernel(const FromStateKernel&) = delete;  // its parts refer to call_

  void forward(const FromStateForward& p, const Parallel& parallel) const {
    const bool streamed = is_streamed<X>(p.out, GeneralCall<X>::values(p.geometry), p.geometry.queries);
    const i64 tiles = forward_.tiling().count();
    const Schedule schedule = plan(parallel);
    const auto run = [&](i64 first, i64 last, i64 begin, i64 end, int) {
      typename QuerySide<X>::Scratch s;
      lay_out_in(thread_workspace, [&](Arena& arena) { forward_.lay_out(arena, s); });
      forward_.prepare(s);
      for (i64 pair = first; pair < last; ++pair) {
        read(pair, static_cast<const T*>(p.from), s);
        forward_.attend(pair, begin, end, s, p.out, streamed, [&](Upcoming& upcoming) {
          forward_.expect(pair + 1 < last ? pair + 1 : call_.pairs(), 0, nullptr, upcoming);
        });
      }
    };
    run_tiles(parallel, schedule, tiles, run, [](i64) {});
  }

  void backward(const FromStateBackward& p, const Parallel& parallel) const {
    const QueryTask task{p.grad_out,
                         {},
                         p.grad_query,
                         p.grad_normalizer_query,
                         p.grad_gate,
                         static_cast<bool>(p.grad_scale),
                         p.grad_from != nullptr};
    const QueryGradients<X> queries(call_, forward_, task);
    const ParameterGradients<X> parameters(call_, {p.grad_scale, {}, {}, {}}, nullptr);
    const Schedule schedule = plan(parallel);
    const i64 stride = ceil_div(call_.sums_elements(), 16) * 16, tiles = forward_.tiling().count();
    typename ParameterGradients<X>::Shared shared;
    T *partials, *sums;
    lay_out_in(shared_workspace, [&](Arena& arena) {
      parameters.lay_out(arena, shared, schedule);
      partials = arena.take<T>(schedule.slots * stride);
      sums = arena.take<T>(schedule.slots * stride);
    });
    parameters.clear(shared, schedule.slots);
    const auto run = [&](i64 first, i64 last, i64 begin, i64 end, int slot) {
      typename QueryGradients<X>::Scratch s;
      ParameterSums<T> chain;
      lay_out_in(thread_workspace, [&](Arena& arena) {
        queries.lay_out(arena, s);
        chain = parameters.take_chain(arena);
      });
      forward_.prepare(s.forward);
      parameters.clear_chain(chain);
      s.scale_sum = chain.scale;
      s.g_of_image = nullptr;
      const GeneralSums<T> gradients = call_.sums_at(partials + slot * stride);
      for (i64 pair = first; pair < last; ++pair) {
        read(pair, static_cast<const T*>(p.from), s.forward);
        call_.clear(gradients);
        queries.run(
            pair, begin, end, s, gradients, [&] { parameters.end_chain(chain, pair, slot, shared); },
            [&](Upcoming& upcoming) {
              queries.expect(pair + 1 < last ? pair + 1 : call_.pairs(), 0, upcoming);
            });
        if (begin == 0 && end == tiles && schedule.whole > pair) write(p, pair, gradients, s.forward.sums);
      }
    };
    const auto finish = [&](i64 pair) {
      const GeneralSums<T> total = call_.sums_at(partials);
      call_.add_partials(partials, stride, schedule.slots, total);
      const GeneralSums<T> means = call_.sums_at(sums);
      read_means(pair, static_cast<const T*>(p.from), means, [](i64, bool) {});
      write(p, pair, total, means);
    };
    run_tiles(parallel, schedule, tiles, run, finish);
    parameters.write(parallel, shared, schedule.slots);
  }

 private:
  template <class Run, class Finish>
  static void run_tiles(const Parallel& parallel, const Schedule& schedule, i64 tiles, const Run& run,
                        const Finish& finish) {
    run_pairs(
        parallel, schedule, [&](i64 begin, i64 end, int slot) { run(begin, end, 0, tiles, slot); },
        [&](i64 pair, int slot) {
          run(pair, pair + 1, schedule.begin(tiles, slot), schedule.begin(tiles, slot + 1), slot);
        },
        finish);
  }
  Schedule plan(const Parallel& parallel) const {
    return Schedule::make(parallel, call_.pairs(), call_.queries.tokens(), call_.forward_flops(), false);
  }
  /// S, m and u of an image: those of its state by W. set_empty(head, whether W is 0).
  template <class SetEmpty>
  void read_means(i64 pair, const T* state, const GeneralSums<T>& to, const SetEmpty& set_empty) const {
    for (i64 h = 0; h < call_.ck.heads; ++h) {
      const StateOfHead<const T> head = state_of(call_, state, pair, h);
      set_empty(h, head.w() == 0);
      read_state<X, T>(call_, head, h, head.w() == 0 ? 0 : 1 / head.w(), to);
    }
  }
  void read(i64 pair, const T* state, typename QuerySide<X>::Scratch& s) const {
    read_means(pair, state, s.sums, [&](i64 h, bool empty) { s.empty[h] = empty; });
  }
  /// The gradient by the state: of its sums by 1 / W, and of W.
  void write(const FromStateBackward& p, i64 pair, const GeneralSums<T>& gradients,
             const GeneralSums<T>& means) const {
    if (!p.grad_from) return;
    const Channels ck = call_.ck, cv = call_.cv;
    for (i64 h = 0; h < ck.heads; ++h) {
      const T w = state_of(call_, static_cast<const T*>(p.from), pair, h).w(), inverse = w == 0 ? 0 : 1 / w;
      const i64 at = h * call_.matrix();
      T along = sum(dot_lanes(means.s + at, gradients.s + at, call_.matrix())) +
                sum(dot_lanes(means.m + h * ck.padded, gradients.m + h * ck.padded, ck.padded));
      if (call_.needs_u)
        along += sum(dot_lanes(means.u + h * cv.padded, gradients.u + h * cv.padded, cv.padded));
      write_state(call_, gradients, h, inverse, -along * inverse,
                  state_of(call_, static_cast<T*>(p.grad_from), pair, h));
    }
  }

  GeneralCall<X> call_;
  QuerySide<X> forward_;
};

}  // namespace flatten::cpu::FLATTEN_ISA
