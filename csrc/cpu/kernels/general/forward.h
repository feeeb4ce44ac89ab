// The forward pass of one call of the general form.
#pragma once

#include "keys.h"
#include "queries.h"

namespace flatten::cpu::FLATTEN_ISA {

template <class X>
class GeneralForward {
  using T = Accumulate<X>;

 public:
  explicit GeneralForward(const AttentionForward& p)
      : p_(p),
        call_(p),
        keys_(call_),
        queries_(call_),
        streamed_(is_streamed<X>(p.out, GeneralCall<X>::values(p.geometry), p.geometry.queries)) {}
  GeneralForward(const GeneralForward&) = delete;  // its parts refer to call_

  void run(const Parallel& parallel) const {
    const i64 key_tokens = call_.keys.tokens(), tiles = queries_.tiling().count();
    const Schedule schedule =
        Schedule::make(parallel, call_.pairs(), call_.queries.tokens(), call_.forward_flops(), false);
    auto whole = [&](int slot) {
      Scratch s = make_scratch();
      const i64 end = schedule.begin(schedule.whole, slot + 1);
      for (i64 pair = schedule.begin(schedule.whole, slot); pair < end; ++pair) {
        const i64 next_pair = pair + 1 < end ? pair + 1 : call_.pairs();
        begin_pair(pair, s);
        call_.clear(s.query.sums);
        keys_.add(pair, 0, key_tokens, s.key, s.query.sums,
                  [&](Upcoming& upcoming) { queries_.expect(pair, 0, nullptr, upcoming); });
        save(pair, s.query.sums);
        queries_.attend(pair, 0, tiles, s.query, p_.out, streamed_,
                        [&](Upcoming& upcoming) { call_.expect_keys(next_pair, 0, upcoming); });
      }
    };
    if (schedule.whole > 0) for_each_slot(parallel, schedule.slots, whole);
    if (schedule.whole == schedule.pairs) return;

    const i64 stride = ceil_div(call_.sums_elements(), 16) * 16;
    T* partials = static_cast<T*>(shared_workspace(schedule.slots * stride * sizeof(T)));
    for (i64 pair = schedule.whole; pair < schedule.pairs; ++pair) {
      auto sum = [&](int slot) {
        Scratch s = make_scratch();
        begin_pair(pair, s);
        const GeneralSums<T> sums = call_.sums_at(partials + slot * stride);
        call_.clear(sums);
        keys_.add(pair, schedule.begin(key_tokens, slot), schedule.begin(key_tokens, slot + 1), s.key, sums,
                  [&](Upcoming& upcoming) {
                    queries_.expect(pair, schedule.begin(tiles, slot), nullptr, upcoming);
                  });
      };
      auto apply = [&](int slot) {
        Scratch s = make_scratch();
        begin_pair(pair, s);
        call_.add_partials(partials, stride, schedule.slots, s.query.sums);
        if (slot == 0) save(pair, s.query.sums);
        queries_.attend(pair, schedule.begin(tiles, slot), schedule.begin(tiles, slot + 1), s.query, p_.out,
                        streamed_, [&](Upcoming& upcoming) {
                          call_.expect_keys(pair + 1, schedule.begin(key_tokens, slot), upcoming);
                        });
      };
      for_each_slot(parallel, schedule.slots, sum);
      for_each_slot(parallel, schedule.slots, apply);
    }
  }

 private:
  struct Scratch {
    typename KeySums<X>::Scratch key;
    typename QuerySide<X>::Scratch query;
  };

  Scratch make_scratch() const {
    Scratch s;
    lay_out_in(thread_workspace, [&](Arena& arena) {
      keys_.lay_out(arena, s.key);
      queries_.lay_out(arena, s.query);
    });
    keys_.prepare(s.key);
    queries_.prepare(s.query);
    return s;
  }
  void begin_pair(i64 pair, Scratch& s) const {
    call_.begin_pair(pair, s.key.shares);
    for (i64 h = 0; h < call_.ck.heads; ++h) s.query.empty[h] = call_.is_empty(h, s.key.shares);
  }
  void save(i64 pair, const GeneralSums<T>& sums) const {
    const i64 at = p_.state ? call_.saved_at(pair, p_.saved_windows) : -1;
    if (at >= 0) call_.save_state(sums, static_cast<T*>(p_.state) + at);
  }

  const AttentionForward& p_;
  GeneralCall<X> call_;
  KeySums<X> keys_;
  QuerySide<X> queries_;
  bool streamed_;
};

}  // namespace flatten::cpu::FLATTEN_ISA
