// The operators on CUDA: check, allocate, enqueue on the current stream.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <tuple>
#include <utility>

#include "../arguments.h"
#include "../outputs.h"
#include "../torch_errors.h"
#include "launch.h"

namespace flatten::cuda {
namespace {

/// Makes the tensors' device current and enqueues the call on its current stream. The workspace goes back to
/// torch's allocator at once, which hands it out again only to later work of the same stream.
template <class Params>
void run(const Params& params, const Tensor& on_device) {
  const std::int32_t index = on_device.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  Device device;
  STD_CUDA_CHECK(current_device(&device));
  const std::int64_t bytes = workspace_bytes(params, device);
  const Tensor workspace = empty_on_device_of(on_device, {(bytes + 7) / 8}, Dtype::kFloat64);
  STD_CUDA_CHECK(launch(params, device, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(stream)));
}

std::tuple<Tensor, Tensor> run_forward(AttentionArgs& args, std::int64_t saved_windows) {
  AttentionForward forward;
  check(args, forward);
  const Geometry& g = forward.geometry;
  check_saved_windows(saved_windows, args.q, g);
  Tensor out = empty_on_device_of(args.q, {g.batch, g.queries, g.channels()}, forward.dtype);
  Tensor state =
      empty_on_device_of(args.q, {saved_windows * window_state_elements(g)}, accumulate_dtype(forward.dtype));
  if (is_empty(g)) {
    torch::stable::zero_(state);
    return {std::move(out), std::move(state)};
  }
  forward.out = writable(out);
  forward.saved_windows = saved_windows;
  if (saved_windows > 0) forward.state = state.mutable_data_ptr();
  run(forward, args.q);
  return {std::move(out), std::move(state)};
}

std::tuple<Tensor, Tensor> attention_forward(Tensor q, Tensor k, Tensor v, std::int64_t num_heads,
                                             OptionalTensor scale, OptionalTensor key_bias,
                                             OptionalTensor dwc_weight, OptionalTensor dwc_bias,
                                             OptionalSize size, OptionalSize window, OptionalSize shift,
                                             std::optional<double> focusing_factor, double eps,
                                             std::int64_t saved_windows) {
  AttentionArgs args{q,        k,    v,      num_heads, scale,           key_bias, dwc_weight,
                     dwc_bias, size, window, shift,     focusing_factor, eps};
  return run_forward(args, saved_windows);
}

Tensor attention(Tensor q, Tensor k, Tensor v, std::int64_t num_heads, OptionalTensor scale,
                 OptionalTensor key_bias, OptionalTensor dwc_weight, OptionalTensor dwc_bias,
                 OptionalSize size, OptionalSize window, OptionalSize shift, double focusing_factor,
                 double eps) {
  AttentionArgs args{q,        k,    v,      num_heads, scale,           key_bias, dwc_weight,
                     dwc_bias, size, window, shift,     focusing_factor, eps};
  return std::get<0>(run_forward(args, /*saved_windows=*/0));
}

Tensor linear_attention(Tensor q, Tensor k, Tensor v, std::int64_t num_heads, OptionalTensor dwc_weight,
                        OptionalTensor dwc_bias, OptionalSize size, OptionalSize window, OptionalSize shift,
                        double eps) {
  AttentionArgs args{q,        k,    v,      num_heads, {},           {}, dwc_weight,
                     dwc_bias, size, window, shift,     std::nullopt, eps};
  return std::get<0>(run_forward(args, /*saved_windows=*/0));
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
  backward.grad_out = check_grad_out("attention_backward", grad_out, args.q);
  const SavedState saved = check_state(state, args.q, backward);
  backward.state = saved.data;
  backward.saved_windows = saved.windows;
  std::vector<Tensor> gradients = allocate_gradients(args, output_mask, backward);
  if (!gradients.empty() && !is_empty(backward.geometry)) run(backward, args.q);
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
  if (!is_empty(g)) run(forward, args.x);
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
  if (!gradients.empty() && !is_empty(backward.geometry)) run(backward, args.x);
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flatten, CUDA, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("linear_attention", TORCH_BOX(&linear_attention));
  m.impl("depthwise_conv", TORCH_BOX(&depthwise_conv));
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("depthwise_conv_backward", TORCH_BOX(&depthwise_conv_backward));
}

}  // namespace flatten::cuda
