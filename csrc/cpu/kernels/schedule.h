// How a call is spread over threads: a function of its shape and the number of threads alone, so that sums
// are formed in the same order every time.
#pragma once

#include "../kernels.h"
#include "layout.h"

namespace flatten::cpu::FLATTEN_ISA {

/// Slots work in parallel, each with its own scratch and sums. First every slot takes an equal run of whole
/// (image, window) pairs; what is left is done pair by pair, all slots sharing its tokens.
struct Schedule {
  int slots;
  i64 whole, pairs;

  /// `flops` counts the whole call, `tokens` one pair. `share_all` asks that no pair is done whole.
  static Schedule make(const Parallel& parallel, i64 pairs, i64 tokens, double flops, bool share_all) {
    // Not measured for itself; chosen so that a thread's share takes 20 to 40 us (25 to 50 GFLOP/s a core), a
    // few times the 8 us by which threads were seen to meet later (benchmarks/NOTES.md).
    constexpr double kFlopsWorthAThread = 1e6;
    const i64 useful = static_cast<i64>(flops / kFlopsWorthAThread) + 1;
    const bool can_share = tokens >= 2 * kBlock;
    const i64 most = can_share ? useful : smaller(useful, pairs);
    const int slots = static_cast<int>(smaller(parallel.threads < 1 ? 1 : parallel.threads, most));
    if (slots == 1 || !can_share) return {slots, pairs, pairs};
    return {slots, share_all ? 0 : pairs - pairs % slots, pairs};
  }
  i64 begin(i64 count, int slot) const { return count * slot / slots; }
};

/// body(slot) for every slot, in parallel.
template <class Body>
void for_each_slot(const Parallel& parallel, int slots, Body& body) {
  const auto run = [](i64 begin, i64 end, void* context) {
    for (i64 slot = begin; slot < end; ++slot) (*static_cast<Body*>(context))(static_cast<int>(slot));
    finish_streams();
  };
  if (slots == 1) return run(0, 1, &body);
  parallel.run(slots, run, &body);
}

/// body(begin, end) for runs that cover [0, count), one to a slot, in parallel.
template <class Body>
void for_each_run(const Parallel& parallel, int slots, i64 count, const Body& body) {
  if (count == 0) return;
  auto run = [&](int slot) { body(count * slot / slots, count * (slot + 1) / slots); };
  for_each_slot(parallel, slots, run);
}

}  // namespace flatten::cpu::FLATTEN_ISA
