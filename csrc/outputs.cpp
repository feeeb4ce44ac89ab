#include "outputs.h"

#include <torch/csrc/stable/ops.h>

#include <cstdint>
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
  Gradients(const char* op, const std::vector<bool>& mask, std::size_t expected, const Geometry& geometry)
      : op_(op), mask_(mask), zero_(is_empty(geometry)) {
    if (mask.size() != expected) {
      throw std::runtime_error("flatten." + op_ + ": output_mask has " + std::to_string(mask.size()) +
                               " entries, expected " + std::to_string(expected));
    }
    tensors_.reserve(expected);
  }

  void tokens(const Tensor& input, Dtype dtype, MutableTokens& out) {
    if (mask_[next_++]) out = writable(add(input, dtype));
  }

  void parameter(const char* name, const OptionalTensor& input, Dtype dtype, MutableParameter& out) {
    if (!mask_[next_++]) return;
    if (!input)
      throw std::runtime_error("flatten." + op_ + ": output_mask asks for the gradient of " + name +
                               ", which is None");
    out = {add(*input, dtype).mutable_data_ptr(), dtype};
  }

  std::vector<Tensor> take() { return std::move(tensors_); }

 private:
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
  Gradients gradients("attention_backward", mask, 7, params.geometry);
  gradients.tokens(args.q, params.dtype, params.grad_query);
  gradients.tokens(args.k, params.dtype, params.grad_key);
  gradients.tokens(args.v, params.dtype, params.grad_value);
  gradients.parameter("scale", args.scale, params.mapping.scale.dtype, params.grad_scale);
  gradients.parameter("key_bias", args.key_bias, params.mapping.key_bias.dtype, params.grad_key_bias);
  gradients.parameter("dwc_weight", args.dwc_weight, params.taps.weight.dtype, params.grad_weight);
  gradients.parameter("dwc_bias", args.dwc_bias, params.taps.bias.dtype, params.grad_bias);
  return gradients.take();
}

std::vector<Tensor> allocate_gradients(const ConvArgs& args, const std::vector<bool>& mask,
                                       ConvBackward& params) {
  Gradients gradients("depthwise_conv_backward", mask, 3, params.geometry);
  gradients.tokens(args.x, params.dtype, params.grad_x);
  gradients.parameter("weight", args.weight, params.taps.weight.dtype, params.grad_weight);
  gradients.parameter("bias", args.bias, params.taps.bias.dtype, params.grad_bias);
  return gradients.take();
}

}  // namespace flatten
