// The argument checks as operators of their own, on any device: the plain-torch fallback calls them first.
#include <torch/csrc/stable/library.h>

#include "arguments.h"

namespace flatten {
namespace {

void check_attention(Tensor q, Tensor k, Tensor v, std::int64_t num_heads, OptionalTensor scale,
                     OptionalTensor key_bias, OptionalTensor dwc_weight, OptionalTensor dwc_bias,
                     OptionalSize size, OptionalSize window, OptionalSize shift,
                     std::optional<double> focusing_factor, double eps, OptionalTensor grad_out,
                     OptionalTensor state) {
  AttentionArgs args{q,        k,    v,      num_heads, scale,           key_bias, dwc_weight,
                     dwc_bias, size, window, shift,     focusing_factor, eps};
  AttentionInputs inputs;
  check(args, inputs);
  if (grad_out) check_grad_out("attention_backward", *grad_out, args.q);
  if (state) check_state(*state, args.q, inputs);
}

void check_depthwise_conv(Tensor x, Tensor weight, OptionalTensor bias, std::vector<std::int64_t> size,
                          OptionalSize window, OptionalSize shift, OptionalTensor grad_out) {
  ConvArgs args{x, weight, bias, size, window, shift};
  ConvInputs inputs;
  check(args, inputs);
  if (grad_out) check_grad_out("depthwise_conv_backward", *grad_out, args.x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flatten, CompositeExplicitAutograd, m) {
  m.impl("check_attention", TORCH_BOX(&check_attention));
  m.impl("check_depthwise_conv", TORCH_BOX(&check_depthwise_conv));
}

}  // namespace flatten
