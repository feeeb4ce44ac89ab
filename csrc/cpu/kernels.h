// The CPU kernels as the host sees them: one table of functions per instruction set. No torch.
#pragma once

#include <cstdint>

#include "../params.h"

namespace flatten::cpu {

/// How a kernel spreads its work: `run` calls task(begin, end, context) for disjoint ranges that cover
/// [0, count), on up to `threads` threads, and returns when all are done. Running everything in the
/// calling thread is allowed; results depend on `threads` alone, not on how the ranges were cut.
struct Parallel {
  int threads;
  void (*run)(std::int64_t count, void (*task)(std::int64_t begin, std::int64_t end, void* context),
              void* context);
};

/// The kernels of one instruction set. Batch, queries and keys must be positive.
struct Kernels {
  const char* isa;
  void (*attention_forward)(const AttentionForward&, const Parallel&);
  void (*attention_backward)(const AttentionBackward&, const Parallel&);
  void (*conv_forward)(const ConvForward&, const Parallel&);
  void (*conv_backward)(const ConvBackward&, const Parallel&);
  void (*state_forward)(const StateForward&, const Parallel&);
  void (*state_backward)(const StateBackward&, const Parallel&);
  void (*from_state_forward)(const FromStateForward&, const Parallel&);
  void (*from_state_backward)(const FromStateBackward&, const Parallel&);
};

/// Results of this many bytes and more are written past the caches, where whole lines can be: 16 MiB on AMD's
/// processors, never on others, or what FLATTEN_CPU_STREAM_FROM says. Chosen once. Throws std::runtime_error
/// when that is not a number of bytes.
std::int64_t streamed_from();

/// Throws std::logic_error: a kernel met a dtype that the host should have refused. It lies here because a
/// `throw` in the units would leave symbols that they share.
[[noreturn]] void refuse_dtype();

/// The set in use: the widest this processor runs, or the one FLATTEN_CPU_ISA names. Chosen once.
/// Throws std::runtime_error when the variable names a set that is unknown or that cannot run here.
const Kernels& kernels();

}  // namespace flatten::cpu
