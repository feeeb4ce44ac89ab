#include "outputs.h"

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/large_pages.h"
#include "dtypes.h"
#include "torch_errors.h"

namespace flatten {
namespace {

using Sizes = std::vector<std::int64_t>;

/// Allocates the requested gradients one after the other.
class Gradients {
 public:
  /// `expected` tensor arguments, of which a mask may leave out the last ones behind the first `at_least`.
  Gradients(const char* op, const std::vector<bool>& mask, std::size_t at_least, std::size_t expected,
            bool zero)
      : op_(op), mask_(mask), zero_(zero) {
    if (mask.size() != at_least && mask.size() != expected) {
      const std::string all =
          at_least == expected ? "" : " or, with all tensors, " + std::to_string(expected);
      throw std::runtime_error("flatten." + op_ + ": output_mask has " + std::to_string(mask.size()) +
                               " entries, expected " + std::to_string(at_least) + all);
    }
    tensors_.reserve(expected);
  }

  void tokens(const Tensor& input, Dtype dtype, MutableTokens& out) {
    if (asked()) out = writable(add(input, dtype));
  }

  void tokens(const char* name, const OptionalTensor& input, Dtype dtype, MutableTokens& out) {
    if (asked_of(name, input)) out = writable(add(*input, dtype));
  }

  void parameter(const char* name, const OptionalTensor& input, Dtype dtype, MutableParameter& out) {
    if (asked_of(name, input)) out = {add(*input, dtype).mutable_data_ptr(), dtype};
  }

  /// A whole state's, whose layout is known.
  void state(const Tensor& input, Dtype dtype, void*& out) {
    if (asked()) out = add(input, dtype).mutable_data_ptr();
  }

  void none_of_table() {
    if (asked())
      throw std::runtime_error("flatten." + op_ +
                               ": output_mask asks for the gradient of rotary, a table "
                               "that has none");
  }

  std::vector<Tensor> take() { return std::move(tensors_); }

 private:
  bool asked() {
    const std::size_t i = next_++;
    return i < mask_.size() && mask_[i];
  }

  bool asked_of(const char* name, const OptionalTensor& input) {
    if (!asked()) return false;
    if (!input)
      throw std::runtime_error("flatten." + op_ + ": output_mask asks for the gradient of " + name +
                               ", which is None");
    return true;
  }

  const Tensor& add(const Tensor& input, Dtype dtype) {
    const auto sizes = input.sizes();
    tensors_.push_back(empty_on_device_of(input, Sizes(sizes.begin(), sizes.end()), dtype));
    if (zero_) torch::stable::zero_(tensors_.back());
    return tensors_.back();
  }

  std::string op_;
  const std::vector<bool>& mask_;
  bool zero_;
  std::size_t next_ = 0;
  std::vector<Tensor> tensors_;
};

}  // namespace

Tensor unfilled_state(const Tensor& on, std::int64_t elements, Dtype dtype) {
  if (elements == 0) return empty_on_device_of(on, {0}, dtype);
  Tensor memory = empty_on_device_of(on, {elements + 1}, dtype);
  torch::stable::fill_(memory, std::numeric_limits<double>::quiet_NaN());
  return torch::stable::narrow(memory, 0, 1, elements);
}

Tensor empty_on_device_of(const Tensor& like, const Sizes& sizes, Dtype dtype) {
  // The C shim itself: half the cost of a call through the dispatcher.
  Sizes strides(sizes.size());
  std::int64_t stride = 1;
  for (std::size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    if (sizes[i] > 0 && __builtin_mul_overflow(stride, sizes[i], &stride))
      throw std::runtime_error("flatten: an output of more elements than 64 bits count");
  }
  std::int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto shim_dtype =
      torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(scalar_type(dtype)));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()),
                                                         sizes.data(), strides.data(), shim_dtype,
                                                         device_type, like.get_device_index(), &handle));
  Tensor made(handle);
  if (device_type == aoti_torch_device_type_cpu())
    cpu::prefer_large_pages(made.mutable_data_ptr(), made.numel() * element_size(dtype));
  return made;
}

MutableTokens writable(const Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.stride(1)}; }

std::vector<Tensor> allocate_gradients(const AttentionArgs& args, const std::vector<bool>& mask,
                                       AttentionBackward& params) {
  Gradients gradients("attention_backward", mask, 7, 12, is_empty(params.geometry));
  gradients.tokens(args.q, params.dtype, params.grad_query);
  gradients.tokens(args.k, params.dtype, params.grad_key);
  gradients.tokens(args.v, params.dtype, params.grad_value);
  gradients.parameter("scale", args.scale, params.mapping.scale.dtype, params.grad_scale);
  gradients.parameter("key_bias", args.key_bias, params.mapping.key_bias.dtype, params.grad_key_bias);
  gradients.parameter("dwc_weight", args.dwc_weight, params.taps.weight.dtype, params.grad_weight);
  gradients.parameter("dwc_bias", args.dwc_bias, params.taps.bias.dtype, params.grad_bias);
  gradients.none_of_table();
  gradients.parameter("key_weight", args.key_weight, params.general.key_weight.weight.dtype,
                      params.grad_key_weight);
  gradients.tokens("gate", args.gate, params.dtype, params.grad_gate);
  gradients.tokens("normalizer_q", args.normalizer_q, params.dtype, params.grad_normalizer_query);
  gradients.tokens("normalizer_k", args.normalizer_k, params.dtype, params.grad_normalizer_key);
  return gradients.take();
}

std::vector<Tensor> allocate_gradients(const ConvArgs& args, const std::vector<bool>& mask,
                                       ConvBackward& params) {
  Gradients gradients("depthwise_conv_backward", mask, 3, 3, is_empty(params.geometry));
  gradients.tokens(args.x, params.dtype, params.grad_x);
  gradients.parameter("weight", args.weight, params.taps.weight.dtype, params.grad_weight);
  gradients.parameter("bias", args.bias, params.taps.bias.dtype, params.grad_bias);
  return gradients.take();
}

std::vector<Tensor> allocate_gradients(const StateArgs& args, const std::vector<bool>& mask,
                                       StateBackward& params) {
  Gradients gradients("attention_state_backward", mask, 7, 7, is_empty(params.geometry));
  gradients.tokens(args.k, params.dtype, params.grad_key);
  gradients.tokens(args.v, params.dtype, params.grad_value);
  gradients.parameter("scale", args.scale, params.mapping.scale.dtype, params.grad_scale);
  gradients.parameter("key_bias", args.key_bias, params.mapping.key_bias.dtype, params.grad_key_bias);
  gradients.none_of_table();
  gradients.parameter("key_weight", args.key_weight, params.general.key_weight.weight.dtype,
                      params.grad_key_weight);
  gradients.tokens("normalizer_k", args.normalizer_k, params.dtype, params.grad_normalizer_key);
  return gradients.take();
}

std::vector<Tensor> allocate_gradients(const FromStateArgs& args, const std::vector<bool>& mask,
                                       FromStateBackward& params) {
  Gradients gradients("attention_from_state_backward", mask, 6, 6, is_empty(params.geometry));
  gradients.tokens(args.q, params.dtype, params.grad_query);
  gradients.state(args.state, accumulate_dtype(params.dtype), params.grad_from);
  gradients.parameter("scale", args.scale, params.mapping.scale.dtype, params.grad_scale);
  gradients.none_of_table();
  gradients.tokens("normalizer_q", args.normalizer_q, params.dtype, params.grad_normalizer_query);
  gradients.tokens("gate", args.gate, params.dtype, params.grad_gate);
  return gradients.take();
}

}  // namespace flatten
