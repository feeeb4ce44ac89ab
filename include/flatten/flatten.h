// The operators for C++ programs: each function is one call of torch.ops.flatten through torch's dispatcher.
// Link flatten_ext::flatten, and flatten_ext::flatten_cuda for CUDA tensors.
//
// Arguments, shapes and dtypes are those of the Python functions (flatten_ext/ops.py). A bad argument throws
// std::runtime_error; torch prints the reason to its log. Derivatives are the business of Python's autograd:
// a C++ program calls flatten::attention_backward itself (csrc/schemas.cpp).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// The headers of torch 2.11 lack the check that passes torch's own words on.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace flatten {

using OptionalTensor = std::optional<torch::stable::Tensor>;
using OptionalSize = std::optional<std::vector<std::int64_t>>;

/// Where the tokens lie: size (H, W) of the map, window (wh, ww) and shift (sh, sw).
struct MapOptions {
  OptionalSize size, window, shift;
};

/// The depthwise kernel, (D, 1, kh, kw) or (C, 1, kh, kw), and its bias, (D,) or (C,); or (B, C, 1, kh, kw),
/// each image's own, without bias.
struct ConvOptions {
  OptionalTensor weight, bias;
};

/// phi_p: the divisor (C,) of the features, the keys' positional encoding (M, C), and p.
struct FocusOptions {
  OptionalTensor scale, key_bias;
  double focusing_factor = 3.0;
  std::string feature_map = "focused";  // "elu", "relu", "none"
};

/// What the general form has beyond focused linear attention; flatten_ext/ops.py describes each. Calls that a
/// device has no kernels for run in plain torch, which Python registers (`import flatten_ext`): without
/// Python they are errors.
struct GeneralOptions {
  OptionalTensor rotary, key_weight;
  std::string normalizer = "divide";  // "none", "subtract", "magnitude"
  double similarity_scale = 1.0;
  OptionalTensor gate;
  std::string gate_activation = "none";       // "silu", "sigmoid"
  OptionalTensor normalizer_q, normalizer_k;  // with features that are mapped already
};

namespace detail {

template <class... Args>
torch::stable::Tensor call(const char* op, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

}  // namespace detail

/// Focused linear attention of q (B, N, C) over k, v (B, M, C): (B, N, C) in q's dtype.
inline torch::stable::Tensor attention(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                                       const torch::stable::Tensor& v, std::int64_t num_heads,
                                       const FocusOptions& focus = {}, const ConvOptions& conv = {},
                                       const MapOptions& map = {}, double eps = 1e-6,
                                       const GeneralOptions& general = {}) {
  return detail::call("flatten::attention", q, k, v, num_heads, focus.scale, focus.key_bias, conv.weight,
                      conv.bias, map.size, map.window, map.shift, focus.focusing_factor, eps,
                      focus.feature_map, general.rotary, general.key_weight, general.normalizer,
                      general.similarity_scale, general.gate, general.gate_activation);
}

/// The same on features that are mapped already.
inline torch::stable::Tensor linear_attention(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                                              const torch::stable::Tensor& v, std::int64_t num_heads,
                                              const ConvOptions& conv = {}, const MapOptions& map = {},
                                              double eps = 1e-6, const GeneralOptions& general = {}) {
  return detail::call("flatten::linear_attention", q, k, v, num_heads, conv.weight, conv.bias, map.size,
                      map.window, map.shift, eps, general.normalizer_q, general.normalizer_k, general.rotary,
                      general.key_weight, general.normalizer, general.similarity_scale, general.gate,
                      general.gate_activation);
}

/// All that attention knows of its keys, (B, num_heads, D_k + 1, D_v + 1), additive over them. Of `general`
/// rotary, key_weight and normalizer_k are read.
inline torch::stable::Tensor attention_state(const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                                             std::int64_t num_heads, const FocusOptions& focus = {},
                                             double eps = 1e-6, const GeneralOptions& general = {}) {
  return detail::call("flatten::attention_state", k, v, num_heads, focus.scale, focus.key_bias,
                      focus.focusing_factor, eps, focus.feature_map, general.rotary, general.key_weight,
                      general.normalizer_k);
}

/// The attention of q to the keys of a state. Of `general` all but key_weight and normalizer_k is read.
inline torch::stable::Tensor attention_from_state(const torch::stable::Tensor& q,
                                                  const torch::stable::Tensor& state, std::int64_t num_heads,
                                                  const FocusOptions& focus = {}, double eps = 1e-6,
                                                  const GeneralOptions& general = {}) {
  return detail::call("flatten::attention_from_state", q, state, num_heads, focus.scale,
                      focus.focusing_factor, eps, focus.feature_map, general.rotary, general.normalizer_q,
                      general.normalizer, general.similarity_scale, general.gate, general.gate_activation);
}

/// The depthwise branch alone, over x (B, N, C).
inline torch::stable::Tensor depthwise_conv(const torch::stable::Tensor& x,
                                            const torch::stable::Tensor& weight, const OptionalTensor& bias,
                                            const std::vector<std::int64_t>& size,
                                            const OptionalSize& window = {}, const OptionalSize& shift = {}) {
  return detail::call("flatten::depthwise_conv", x, weight, bias, size, window, shift);
}

}  // namespace flatten
