// Chooses the kernels' instruction set, and from what size on they write past the caches, once per process.
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "isa.h"
#include "kernels.h"

namespace flatten::cpu {

#define FLATTEN_ON_any(...) __VA_ARGS__
#if defined(__x86_64__)
#define FLATTEN_ON_x86_64(...) __VA_ARGS__
#else
#define FLATTEN_ON_x86_64(...)
#endif

#define FLATTEN_INSTRUCTION_SET(name, architecture, features) \
  FLATTEN_ON_##architecture(namespace name { extern const Kernels kKernels; })
#include "isa/isas.inc"
#undef FLATTEN_INSTRUCTION_SET

namespace {

/// The sets this processor runs, least first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#define FEATURE(name) &&__builtin_cpu_supports(#name)
#define FLATTEN_INSTRUCTION_SET(name, architecture, features) \
  FLATTEN_ON_##architecture(if (true features) sets.push_back(&name::kKernels);)
#include "isa/isas.inc"
#undef FLATTEN_INSTRUCTION_SET
#undef FEATURE
  return sets;
}

const Kernels& choose() {
  const std::vector<const Kernels*> sets = runnable();
  const char* asked = std::getenv("FLATTEN_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return *sets.back();
  std::string possible;
  for (const Kernels* set : sets) {
    if (std::string(asked) == set->isa) return *set;
    possible += possible.empty() ? "" : ", ";
    possible += set->isa;
  }
  throw std::runtime_error("flatten: FLATTEN_CPU_ISA is \"" + std::string(asked) +
                           "\", expected one of the sets this processor runs: " + possible);
}

// [bytes] Whoever reads a result of this size after the call does not find it in the caches. Measured:
// benchmarks/NOTES.md.
constexpr std::int64_t kStreamedFrom = 16 << 20;

std::int64_t choose_streamed_from() {
  const char* asked = std::getenv("FLATTEN_CPU_STREAM_FROM");
  if (asked == nullptr || *asked == '\0') {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd")) return kStreamedFrom;
#endif
    return std::numeric_limits<std::int64_t>::max();
  }
  std::int64_t bytes = -1;
  const char* end = asked + std::strlen(asked);
  const auto [stop, error] = std::from_chars(asked, end, bytes);
  if (error != std::errc() || stop != end || bytes < 0) {
    throw std::runtime_error("flatten: FLATTEN_CPU_STREAM_FROM is \"" + std::string(asked) +
                             "\", expected a number of bytes");
  }
  return bytes;
}

}  // namespace

std::int64_t streamed_from() {
  static const std::int64_t bytes = choose_streamed_from();
  return bytes;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

void refuse_dtype() { throw std::logic_error("flatten: the CPU kernels do not take this dtype here"); }

std::string isa_in_use() { return kernels().isa; }

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const Kernels* set : runnable()) names.emplace_back(set->isa);
  return names;
}

}  // namespace flatten::cpu
