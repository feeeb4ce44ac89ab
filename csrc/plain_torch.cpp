#include "plain_torch.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "torch_errors.h"

namespace flatten::plain_torch {
namespace {

// The arguments of each operator, in the order of its schema (schemas.cpp).
auto in_order(const AttentionArgs& a) {
  const std::optional<std::string> feature_map =
      a.focusing_factor ? std::optional<std::string>(a.feature_map) : std::nullopt;
  return std::make_tuple(a.q, a.k, a.v, a.num_heads, a.scale, a.key_bias, a.dwc_weight, a.dwc_bias, a.size,
                         a.window, a.shift, a.focusing_factor, a.eps, feature_map, a.rotary, a.key_weight,
                         a.normalizer, a.similarity_scale, a.gate, a.gate_activation, a.normalizer_q,
                         a.normalizer_k);
}

auto in_order(const ConvArgs& a) {
  return std::make_tuple(a.x, *a.weight, a.bias, *a.size, a.window, a.shift);
}

auto in_order(const StateArgs& a) {
  return std::make_tuple(a.k, a.v, a.num_heads, a.scale, a.key_bias, a.focusing_factor, a.eps, a.feature_map,
                         a.rotary, a.key_weight, a.normalizer_k);
}

auto in_order(const FromStateArgs& a) {
  return std::make_tuple(a.q, a.state, a.num_heads, a.scale, a.focusing_factor, a.eps, a.feature_map,
                         a.rotary, a.normalizer_q, a.normalizer, a.similarity_scale, a.gate,
                         a.gate_activation);
}

template <class Result, class Tuple>
Result call(const char* op, const Tuple& arguments) {
  return std::apply(
      [&](const auto&... each) {
        StableIValue stack[] = {torch::stable::detail::from(each)...};
        STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack, TORCH_ABI_VERSION));
        return torch::stable::detail::to<Result>(stack[0]);
      },
      arguments);
}

template <class Args>
std::vector<Tensor> gradients(const char* op, const Tensor& grad_out, const Args& args,
                              const std::vector<bool>& mask) {
  // A std::vector<bool> holds no bools to point at.
  std::array<bool, 16> asked{};
  std::copy(mask.begin(), mask.end(), asked.begin());
  const torch::headeronly::HeaderOnlyArrayRef<bool> flags(asked.data(), mask.size());
  return call<std::vector<Tensor>>(
      op, std::tuple_cat(std::make_tuple(grad_out), in_order(args), std::make_tuple(flags)));
}

}  // namespace

Tensor forward(const AttentionArgs& args) {
  return call<Tensor>("flatten::reference_attention", in_order(args));
}
Tensor forward(const ConvArgs& args) {
  return call<Tensor>("flatten::reference_depthwise_conv", in_order(args));
}
Tensor forward(const StateArgs& args) {
  return call<Tensor>("flatten::reference_attention_state", in_order(args));
}
Tensor forward(const FromStateArgs& args) {
  return call<Tensor>("flatten::reference_attention_from_state", in_order(args));
}

std::vector<Tensor> backward(const Tensor& grad_out, const AttentionArgs& args,
                             const std::vector<bool>& mask) {
  return gradients("flatten::reference_attention_backward", grad_out, args, mask);
}
std::vector<Tensor> backward(const Tensor& grad_out, const ConvArgs& args, const std::vector<bool>& mask) {
  return gradients("flatten::reference_depthwise_conv_backward", grad_out, args, mask);
}
std::vector<Tensor> backward(const Tensor& grad_out, const StateArgs& args, const std::vector<bool>& mask) {
  return gradients("flatten::reference_attention_state_backward", grad_out, args, mask);
}
std::vector<Tensor> backward(const Tensor& grad_out, const FromStateArgs& args,
                             const std::vector<bool>& mask) {
  return gradients("flatten::reference_attention_from_state_backward", grad_out, args, mask);
}

}  // namespace flatten::plain_torch
