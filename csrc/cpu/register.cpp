// The operators on the CPU: check, allocate, run the kernels of the instruction set in use.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "../arguments.h"
#include "../dtypes.h"
#include "../outputs.h"
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
void check_scale_values(const AttentionInputs& in) {
  const Parameter& scale = in.mapping.scale;
  if (!scale) return;
  const std::int64_t channels = in.geometry.channels();
  with_dtype(scale.dtype, [&](auto dtype) {
    using D = Divisors<dtype()>;
    const auto* bits = static_cast<const typename D::Bits*>(scale.data);
    for (std::int64_t i = 0; i < channels; ++i) {
      if (bits[i] >= D::kLeast && bits[i] <= D::kMost) continue;
      const bool positive = bits[i] > 0 && bits[i] < D::kInfinity;
      throw std::runtime_error("flatten.attention: scale[" + std::to_string(i) + "] is " +
                               (positive
                                    ? "below 2^-126 or above 2^126 (float64: 2^-1022, 2^1022), expected a "
                                      "number that has a reciprocal"
                                    : "zero, negative, infinite or NaN, expected finite positive numbers"));
    }
  });
}

/// Runs the forward. A `state` that is not null becomes S and m of as many windows as asked for.
Tensor run_forward(AttentionArgs& args, Tensor* state = nullptr, std::int64_t saved_windows = 0) {
  AttentionForward forward;
  check(args, forward);
  check_scale_values(forward);
  const Geometry& g = forward.geometry;
  check_saved_windows(saved_windows, args.q, g);
  Tensor out = empty_on_device_of(args.q, {g.batch, g.queries, g.channels()}, forward.dtype);
  if (state) {
    *state = empty_on_device_of(args.q, {saved_windows * window_state_elements(g)},
                                accumulate_dtype(forward.dtype));
  }
  if (is_empty(g)) {
    if (state) torch::stable::zero_(*state);
    return out;
  }
  forward.out = writable(out);
  forward.saved_windows = saved_windows;
  if (saved_windows > 0) forward.state = state->mutable_data_ptr();
  kernels().attention_forward(forward, torch_threads());
  return out;
}

std::tuple<Tensor, Tensor> attention_forward(Tensor q, Tensor k, Tensor v, std::int64_t num_heads,
                                             OptionalTensor scale, OptionalTensor key_bias,
                                             OptionalTensor dwc_weight, OptionalTensor dwc_bias,
                                             OptionalSize size, OptionalSize window, OptionalSize shift,
                                             std::optional<double> focusing_factor, double eps,
                                             std::int64_t saved_windows) {
  AttentionArgs args{q,        k,    v,      num_heads, scale,           key_bias, dwc_weight,
                     dwc_bias, size, window, shift,     focusing_factor, eps};
  Tensor state;
  Tensor out = run_forward(args, &state, saved_windows);
  return {std::move(out), std::move(state)};
}

Tensor attention(Tensor q, Tensor k, Tensor v, std::int64_t num_heads, OptionalTensor scale,
                 OptionalTensor key_bias, OptionalTensor dwc_weight, OptionalTensor dwc_bias,
                 OptionalSize size, OptionalSize window, OptionalSize shift, double focusing_factor,
                 double eps) {
  AttentionArgs args{q,        k,    v,      num_heads, scale,           key_bias, dwc_weight,
                     dwc_bias, size, window, shift,     focusing_factor, eps};
  return run_forward(args);
}

Tensor linear_attention(Tensor q, Tensor k, Tensor v, std::int64_t num_heads, OptionalTensor dwc_weight,
                        OptionalTensor dwc_bias, OptionalSize size, OptionalSize window, OptionalSize shift,
                        double eps) {
  AttentionArgs args{q,        k,    v,      num_heads, {},           {}, dwc_weight,
                     dwc_bias, size, window, shift,     std::nullopt, eps};
  return run_forward(args);
}

std::vector<Tensor> attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, std::int64_t num_heads,
                                       OptionalTensor scale, OptionalTensor key_bias,
                                       OptionalTensor dwc_weight, OptionalTensor dwc_bias, OptionalSize size,
                                       OptionalSize window, OptionalSize shift,
                                       std::optional<double> focusing_factor, double eps, Tensor state,
                                       std::vector<bool> output_mask) {
  AttentionArgs args{q,        k,    v,      num_heads, scale,           key_bias, dwc_weight,
                     dwc_bias, size, window, shift,     focusing_factor, eps};
  AttentionBackward backward;
  check(args, backward);
  check_scale_values(backward);
  backward.grad_out = check_grad_out("attention_backward", grad_out, args.q);
  const SavedState saved = check_state(state, args.q, backward);
  backward.state = saved.data;
  backward.saved_windows = saved.windows;
  std::vector<Tensor> gradients = allocate_gradients(args, output_mask, backward);
  if (!gradients.empty() && !is_empty(backward.geometry))
    kernels().attention_backward(backward, torch_threads());
  return gradients;
}

Tensor depthwise_conv(Tensor x, Tensor weight, OptionalTensor bias, std::vector<std::int64_t> size,
                      OptionalSize window, OptionalSize shift) {
  ConvArgs args{x, weight, bias, size, window, shift};
  ConvForward forward;
  check(args, forward);
  const Geometry& g = forward.geometry;
  Tensor out = empty_on_device_of(args.x, {g.batch, g.queries, g.channels()}, forward.dtype);
  forward.out = writable(out);
  if (!is_empty(g)) kernels().conv_forward(forward, torch_threads());
  return out;
}

std::vector<Tensor> depthwise_conv_backward(Tensor grad_out, Tensor x, Tensor weight, OptionalTensor bias,
                                            std::vector<std::int64_t> size, OptionalSize window,
                                            OptionalSize shift, std::vector<bool> output_mask) {
  ConvArgs args{x, weight, bias, size, window, shift};
  ConvBackward backward;
  check(args, backward);
  backward.grad_out = check_grad_out("depthwise_conv_backward", grad_out, args.x);
  std::vector<Tensor> gradients = allocate_gradients(args, output_mask, backward);
  if (!gradients.empty() && !is_empty(backward.geometry)) kernels().conv_backward(backward, torch_threads());
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flatten, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("linear_attention", TORCH_BOX(&linear_attention));
  m.impl("depthwise_conv", TORCH_BOX(&depthwise_conv));
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("depthwise_conv_backward", TORCH_BOX(&depthwise_conv_backward));
}

}  // namespace flatten::cpu
