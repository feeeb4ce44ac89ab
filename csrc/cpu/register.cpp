// The operators on the CPU: check, allocate, run the kernels of the instruction set in use.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../dtypes.h"
#include "../operators.h"
#include "../torch_errors.h"
#include "kernels.h"

namespace flatten::cpu {
namespace {

/// torch's thread pool, as the kernels see it.
Parallel torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](std::int64_t count, void (*task)(std::int64_t, std::int64_t, void*), void* context) {
            STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, task, context));
          }};
}

/// The bit patterns between which a divisor and its reciprocal are normal numbers of the dtype that the
/// kernels accumulate in: from 2^-126 to 2^126, and for float64 from 2^-1022 to 2^1022. A float16 number
/// above 0 is. Positive IEEE numbers are ordered as their bits are.
template <Dtype kDtype>
struct Divisors;
template <>
struct Divisors<Dtype::kFloat64> {
  using Bits = std::uint64_t;
  static constexpr Bits kLeast = 0x0010000000000000, kMost = 0x7fd0000000000000,
                        kInfinity = 0x7ff0000000000000;
};
template <>
struct Divisors<Dtype::kFloat32> {
  using Bits = std::uint32_t;
  static constexpr Bits kLeast = 0x00800000, kMost = 0x7e800000, kInfinity = 0x7f800000;
};
template <>
struct Divisors<Dtype::kBFloat16> {
  using Bits = std::uint16_t;
  static constexpr Bits kLeast = 0x0080, kMost = 0x7e80, kInfinity = 0x7f80;
};
template <>
struct Divisors<Dtype::kFloat16> {
  using Bits = std::uint16_t;
  static constexpr Bits kLeast = 0x0001, kMost = 0x7bff, kInfinity = 0x7c00;
};

/// On the CPU the values of `scale` are at hand, so a divisor that is none is found before anything is
/// computed.
void check_scale_values(const char* op, const AttentionInputs& in) {
  const Parameter& scale = in.mapping.scale;
  if (!scale) return;
  const std::int64_t channels = in.geometry.channels();
  with_dtype(scale.dtype, [&](auto dtype) {
    using D = Divisors<dtype()>;
    const auto* bits = static_cast<const typename D::Bits*>(scale.data);
    for (std::int64_t i = 0; i < channels; ++i) {
      if (bits[i] >= D::kLeast && bits[i] <= D::kMost) continue;
      const bool positive = bits[i] > 0 && bits[i] < D::kInfinity;
      throw std::runtime_error("flatten." + std::string(op) + ": scale[" + std::to_string(i) + "] is " +
                               (positive
                                    ? "below 2^-126 or above 2^126 (float64: 2^-1022, 2^1022), expected a "
                                      "number that has a reciprocal"
                                    : "zero, negative, infinite or NaN, expected finite positive numbers"));
    }
  });
}

struct Cpu {
  static constexpr bool kHasStates = true;

  static void check_values(const char* op, const AttentionInputs& in) { check_scale_values(op, in); }

  template <class Inputs>
  static bool takes(const Inputs&) {
    return true;  // the kernels do every call
  }
  static bool takes_state(const AttentionInputs&) { return true; }
  static bool takes_from_state(const AttentionInputs&) { return true; }

  static void run(const AttentionForward& p, const Tensor&) {
    kernels().attention_forward(p, torch_threads());
  }
  static void run(const AttentionBackward& p, const Tensor&) {
    kernels().attention_backward(p, torch_threads());
  }
  static void run(const ConvForward& p, const Tensor&) { kernels().conv_forward(p, torch_threads()); }
  static void run(const ConvBackward& p, const Tensor&) { kernels().conv_backward(p, torch_threads()); }
  static void run(const StateForward& p, const Tensor&) { kernels().state_forward(p, torch_threads()); }
  static void run(const StateBackward& p, const Tensor&) { kernels().state_backward(p, torch_threads()); }
  static void run(const FromStateForward& p, const Tensor&) {
    kernels().from_state_forward(p, torch_threads());
  }
  static void run(const FromStateBackward& p, const Tensor&) {
    kernels().from_state_backward(p, torch_threads());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flatten, CPU, m) { Operators<Cpu>::register_in(m); }

}  // namespace flatten::cpu
