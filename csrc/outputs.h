// The tensors a call returns, and params.h pointing at them; for all devices.
#pragma once

#include "arguments.h"
#include "states.h"

namespace flatten {

/// Whether a call has no output element, so that no kernel runs.
inline bool is_empty(const Geometry& g) { return g.batch == 0 || g.queries == 0; }

/// An uninitialised contiguous tensor on `like`'s device.
Tensor empty_on_device_of(const Tensor& like, const std::vector<std::int64_t>& sizes, Dtype dtype);

/// The state of a call that ran in plain torch, whose backward may have kernels (flatten_ext.cuda_kernels):
/// as large as any, so that compiled programs meet what they expect, and without contents. check_state()
/// tells it by its start inside of its memory; the NaNs show where a copy lost that mark.
Tensor unfilled_state(const Tensor& on, std::int64_t elements, Dtype dtype);

/// Where to write a contiguous (batch, token, channel) tensor.
MutableTokens writable(const Tensor& tokens);

/// Uninitialised contiguous gradients of the tensor arguments where `mask` asks for them, in the order of the
/// schema, with `params` pointing at them; zeros if the call is empty. Asking for the gradient of an argument
/// that is None is an error. A mask of seven entries ends with dwc_bias.
std::vector<Tensor> allocate_gradients(const AttentionArgs& args, const std::vector<bool>& mask,
                                       AttentionBackward& params);

/// The same for the other operators.
std::vector<Tensor> allocate_gradients(const ConvArgs& args, const std::vector<bool>& mask,
                                       ConvBackward& params);
std::vector<Tensor> allocate_gradients(const StateArgs& args, const std::vector<bool>& mask,
                                       StateBackward& params);
std::vector<Tensor> allocate_gradients(const FromStateArgs& args, const std::vector<bool>& mask,
                                       FromStateBackward& params);

}  // namespace flatten
