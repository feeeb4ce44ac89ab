// The argument checks as operators of their own, on any device: the plain-torch fallback calls them first.
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "states.h"

namespace flatten {
namespace {

void check_attention(StableIValue* stack, std::uint64_t count, std::uint64_t) {
  Arguments given(stack, count);
  AttentionArgs args = given.attention(Focus::kEither);
  OptionalTensor grad_out = given.next<OptionalTensor>();
  const OptionalTensor state = given.next<OptionalTensor>();
  given.general(Focus::kEither, args);
  given.end();
  AttentionInputs inputs;
  check(args, inputs);
  if (grad_out) check_like_out("attention_backward", "grad_out", *grad_out, args.q, inputs.geometry);
  if (state) check_state(*state, args.q, inputs);
}

void check_depthwise_conv(StableIValue* stack, std::uint64_t count, std::uint64_t) {
  Arguments given(stack, count);
  ConvArgs args = given.conv();
  OptionalTensor grad_out = given.next<OptionalTensor>();
  given.end();
  ConvInputs inputs;
  check(args, inputs);
  if (grad_out) check_like_out("depthwise_conv_backward", "grad_out", *grad_out, args.x, inputs.geometry);
}

void check_attention_state(StableIValue* stack, std::uint64_t count, std::uint64_t) {
  Arguments given(stack, count);
  StateArgs args = take_state(given);
  OptionalTensor grad_out = given.next<OptionalTensor>();
  given.end();
  AttentionInputs inputs;
  check(args, inputs);
  if (grad_out) check_whole_state("attention_state_backward", "grad_out", *grad_out, args.k, inputs);
}

void check_attention_from_state(StableIValue* stack, std::uint64_t count, std::uint64_t) {
  Arguments given(stack, count);
  FromStateArgs args = take_from_state(given);
  OptionalTensor grad_out = given.next<OptionalTensor>();
  given.end();
  AttentionInputs inputs;
  check(args, inputs);
  if (grad_out)
    check_like_out("attention_from_state_backward", "grad_out", *grad_out, args.q, inputs.geometry);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flatten, CompositeExplicitAutograd, m) {
  m.impl("check_attention", &check_attention);
  m.impl("check_depthwise_conv", &check_depthwise_conv);
  m.impl("check_attention_state", &check_attention_state);
  m.impl("check_attention_from_state", &check_attention_from_state);
}

}  // namespace flatten
