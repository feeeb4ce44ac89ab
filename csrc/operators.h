// The operators' host code, once for all devices: check, allocate, run. A device is a class with
//
//     static void check_values(const AttentionInputs&);          // of tensors whose values the host can read
//     template <class Params> static void run(const Params&, const Tensor& on);   // the kernels
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <utility>

#include "arguments.h"
#include "outputs.h"

namespace flatten {

template <class Device>
class Operators {
 public:
  /// Registers the operators; `m` is the library of STABLE_TORCH_LIBRARY_IMPL.
  template <class Library>
  static void register_in(Library& m) {
    m.impl("attention", &attention<Focus::kFocused>);
    m.impl("linear_attention", &attention<Focus::kLinear>);
    m.impl("depthwise_conv", &depthwise_conv);
    m.impl("attention_forward", &attention_forward);
    m.impl("attention_backward", &attention_backward);
    m.impl("depthwise_conv_backward", &depthwise_conv_backward);
  }

 private:
  /// Runs the forward. A `state` that is not null becomes S and m of as many windows as asked for.
  static Tensor forward(AttentionArgs& args, Tensor* state = nullptr, std::int64_t saved_windows = 0) {
    AttentionForward forward;
    check(args, forward);
    Device::check_values(forward);
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
    Device::run(forward, args.q);
    return out;
  }

  template <Focus kFocus>
  static void attention(StableIValue* stack, std::uint64_t count, std::uint64_t) {
    Arguments given(stack, count);
    AttentionArgs args = given.attention(kFocus);
    given.end();
    stack[0] = torch::stable::detail::from(forward(args));
  }

  static void attention_forward(StableIValue* stack, std::uint64_t count, std::uint64_t) {
    Arguments given(stack, count);
    AttentionArgs args = given.attention(Focus::kEither);
    const auto saved_windows = given.next<std::int64_t>();
    given.end();
    Tensor state;
    stack[0] = torch::stable::detail::from(forward(args, &state, saved_windows));
    stack[1] = torch::stable::detail::from(state);
  }

  static void attention_backward(StableIValue* stack, std::uint64_t count, std::uint64_t) {
    Arguments given(stack, count);
    auto grad_out = given.next<Tensor>();
    AttentionArgs args = given.attention(Focus::kEither);
    const auto state = given.next<Tensor>();
    const auto mask = given.next<std::vector<bool>>();
    given.end();
    AttentionBackward backward;
    check(args, backward);
    Device::check_values(backward);
    backward.grad_out = check_grad_out("attention_backward", grad_out, args.q);
    const SavedState saved = check_state(state, args.q, backward);
    backward.state = saved.data;
    backward.saved_windows = saved.windows;
    const std::vector<Tensor> gradients = allocate_gradients(args, mask, backward);
    if (!gradients.empty() && !is_empty(backward.geometry)) Device::run(backward, args.q);
    stack[0] = torch::stable::detail::from(gradients);
  }

  static void depthwise_conv(StableIValue* stack, std::uint64_t count, std::uint64_t) {
    Arguments given(stack, count);
    ConvArgs args = given.conv();
    given.end();
    ConvForward forward;
    check(args, forward);
    const Geometry& g = forward.geometry;
    const Tensor out = empty_on_device_of(args.x, {g.batch, g.queries, g.channels()}, forward.dtype);
    forward.out = writable(out);
    if (!is_empty(g)) Device::run(forward, args.x);
    stack[0] = torch::stable::detail::from(out);
  }

  static void depthwise_conv_backward(StableIValue* stack, std::uint64_t count, std::uint64_t) {
    Arguments given(stack, count);
    auto grad_out = given.next<Tensor>();
    ConvArgs args = given.conv();
    const auto mask = given.next<std::vector<bool>>();
    given.end();
    ConvBackward backward;
    check(args, backward);
    backward.grad_out = check_grad_out("depthwise_conv_backward", grad_out, args.x);
    const std::vector<Tensor> gradients = allocate_gradients(args, mask, backward);
    if (!gradients.empty() && !is_empty(backward.geometry)) Device::run(backward, args.x);
    stack[0] = torch::stable::detail::from(gradients);
  }
};

}  // namespace flatten
