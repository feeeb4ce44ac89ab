// The operators' host code, once for all devices: check, allocate, run. A device is a class with static
// members:
//
//   check_values(op, inputs)   looks at tensors whose values the host can read
//   takes(inputs)              whether it has kernels for a call, the same in both directions
//   kHasStates                 whether it has kernels for states; then takes_state(inputs) and
//                              takes_from_state(inputs) say for which calls
//   run(params, on)            the kernels
//
// A call that a device does not take runs in plain torch (plain_torch.h).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <utility>

#include "arguments.h"
#include "outputs.h"
#include "plain_torch.h"

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
    m.impl("attention_state", &attention_state);
    m.impl("attention_state_backward", &attention_state_backward);
    m.impl("attention_from_state", &attention_from_state);
    m.impl("attention_from_state_backward", &attention_from_state_backward);
  }

 private:
  /// Runs the forward. A `state` that is not null becomes S and m of as many windows as asked for.
  static Tensor forward(AttentionArgs& args, Tensor* state = nullptr, std::int64_t saved_windows = 0) {
    AttentionForward forward;
    check(args, forward);
    Device::check_values("attention", forward);
    const Geometry& g = forward.geometry;
    check_saved_windows(saved_windows, args.q, g);
    Tensor out = empty_on_device_of(args.q, {g.batch, g.queries, g.value_channels()}, forward.dtype);
    const std::int64_t elements = state ? saved_windows * window_state_elements(forward) : 0;
    if (is_empty(g)) {
      if (state) {
        *state = empty_on_device_of(args.q, {elements}, accumulate_dtype(forward.dtype));
        torch::stable::zero_(*state);
      }
      return out;
    }
    if (!Device::takes(forward)) {
      if (state) *state = unfilled_state(args.q, elements, accumulate_dtype(forward.dtype));
      return plain_torch::forward(args);
    }
    if (state) *state = empty_on_device_of(args.q, {elements}, accumulate_dtype(forward.dtype));
    // A state has room for u and W of every call that may need them, and kernels leave what theirs does not.
    if (elements > 0 && forward.general.has_sums()) torch::stable::zero_(*state);
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
    given.general(Focus::kEither, args);
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
    given.general(Focus::kEither, args);
    auto out = given.next<OptionalTensor>();
    given.end();
    AttentionBackward backward;
    check(args, backward);
    Device::check_values("attention", backward);
    backward.grad_out = check_like_out("attention_backward", "grad_out", grad_out, args.q, backward.geometry);
    if (out) backward.out = check_like_out("attention_backward", "out", *out, args.q, backward.geometry);
    const SavedState saved = check_state(state, args.q, backward);
    backward.state = saved.data;
    backward.saved_windows = saved.windows;
    stack[0] = torch::stable::detail::from(gradients_of(args, grad_out, mask, backward, args.q));
  }

  /// The gradients that the mask asks for, by kernels or, where the device does not take the call, in plain
  /// torch.
  template <class Args, class Params>
  static std::vector<Tensor> gradients_of(const Args& args, const Tensor& grad_out,
                                          const std::vector<bool>& mask, Params& backward, const Tensor& on) {
    std::vector<Tensor> gradients = allocate_gradients(args, mask, backward);
    if (gradients.empty() || is_empty(backward.geometry)) return gradients;
    if (!Device::takes(backward)) return plain_torch::backward(grad_out, args, mask);
    Device::run(backward, on);
    return gradients;
  }

  static void depthwise_conv(StableIValue* stack, std::uint64_t count, std::uint64_t) {
    Arguments given(stack, count);
    ConvArgs args = given.conv();
    given.end();
    ConvForward forward;
    check(args, forward);
    const Geometry& g = forward.geometry;
    Tensor out = empty_on_device_of(args.x, {g.batch, g.queries, g.channels()}, forward.dtype);
    forward.out = writable(out);
    if (!is_empty(g) && !Device::takes(forward)) {
      out = plain_torch::forward(args);
    } else if (!is_empty(g)) {
      Device::run(forward, args.x);
    }
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
    backward.grad_out =
        check_like_out("depthwise_conv_backward", "grad_out", grad_out, args.x, backward.geometry);
    stack[0] = torch::stable::detail::from(gradients_of(args, grad_out, mask, backward, args.x));
  }

  static void attention_state(StableIValue* stack, std::uint64_t count, std::uint64_t) {
    Arguments given(stack, count);
    StateArgs args = take_state(given);
    given.end();
    StateForward forward;
    check(args, forward);
    Device::check_values("attention_state", forward);
    const Geometry& g = forward.geometry;
    Tensor state = empty_on_device_of(args.k, {g.batch, g.heads, g.head_dim + 1, g.value_dim + 1},
                                      accumulate_dtype(forward.dtype));
    if (is_empty(g)) {  // of no keys
      torch::stable::zero_(state);
    } else if (takes_state(forward)) {
      forward.state = state.mutable_data_ptr();
      run_state(forward, args.k);
    } else {
      state = plain_torch::forward(args);
    }
    stack[0] = torch::stable::detail::from(state);
  }

  static void attention_state_backward(StableIValue* stack, std::uint64_t count, std::uint64_t) {
    Arguments given(stack, count);
    auto grad_out = given.next<Tensor>();
    StateArgs args = take_state(given);
    const auto mask = given.next<std::vector<bool>>();
    given.end();
    StateBackward backward;
    check(args, backward);
    Device::check_values("attention_state", backward);
    backward.grad_state =
        check_whole_state("attention_state_backward", "grad_out", grad_out, args.k, backward);
    std::vector<Tensor> gradients = allocate_gradients(args, mask, backward);
    if (!gradients.empty() && !is_empty(backward.geometry)) {
      if (takes_state(backward)) {
        run_state(backward, args.k);
      } else {
        gradients = plain_torch::backward(grad_out, args, mask);
      }
    }
    stack[0] = torch::stable::detail::from(gradients);
  }

  static void attention_from_state(StableIValue* stack, std::uint64_t count, std::uint64_t) {
    Arguments given(stack, count);
    FromStateArgs args = take_from_state(given);
    given.end();
    FromStateForward forward;
    check(args, forward);
    Device::check_values("attention_from_state", forward);
    const Geometry& g = forward.geometry;
    Tensor out = empty_on_device_of(args.q, {g.batch, g.queries, g.value_channels()}, forward.dtype);
    if (!is_empty(g) && !takes_from_state(forward)) {
      out = plain_torch::forward(args);
    } else if (!is_empty(g)) {
      forward.from = args.state.const_data_ptr();
      forward.out = writable(out);
      run_state(forward, args.q);
    }
    stack[0] = torch::stable::detail::from(out);
  }

  static void attention_from_state_backward(StableIValue* stack, std::uint64_t count, std::uint64_t) {
    Arguments given(stack, count);
    auto grad_out = given.next<Tensor>();
    FromStateArgs args = take_from_state(given);
    const auto mask = given.next<std::vector<bool>>();
    given.end();
    FromStateBackward backward;
    check(args, backward);
    Device::check_values("attention_from_state", backward);
    backward.grad_out =
        check_like_out("attention_from_state_backward", "grad_out", grad_out, args.q, backward.geometry);
    backward.from = args.state.const_data_ptr();
    std::vector<Tensor> gradients = allocate_gradients(args, mask, backward);
    if (!gradients.empty() && !is_empty(backward.geometry)) {
      if (takes_from_state(backward)) {
        run_state(backward, args.q);
      } else {
        gradients = plain_torch::backward(grad_out, args, mask);
      }
    }
    stack[0] = torch::stable::detail::from(gradients);
  }

  static bool takes_state(const AttentionInputs& in) {
    if constexpr (Device::kHasStates) return Device::takes_state(in);
    return false;
  }
  static bool takes_from_state(const AttentionInputs& in) {
    if constexpr (Device::kHasStates) return Device::takes_from_state(in);
    return false;
  }
  template <class Params>
  static void run_state(const Params& params, const Tensor& on) {
    if constexpr (Device::kHasStates) Device::run(params, on);
  }
};

}  // namespace flatten
