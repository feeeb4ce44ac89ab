// The operators in plain torch (flatten_ext/reference.py), for calls that no kernel of the device takes:
// right for every call, and slower. Python registers them (flatten_ext/_torch/hooks.py); without Python such
// a call is an error of the dispatcher. Arguments are checked before.
#pragma once

#include "arguments.h"
#include "states.h"

namespace flatten::plain_torch {

Tensor forward(const AttentionArgs& args);
Tensor forward(const ConvArgs& args);
Tensor forward(const StateArgs& args);
Tensor forward(const FromStateArgs& args);

/// One gradient for each true entry of `mask`, in the order of the tensor arguments.
std::vector<Tensor> backward(const Tensor& grad_out, const AttentionArgs& args,
                             const std::vector<bool>& mask);
std::vector<Tensor> backward(const Tensor& grad_out, const ConvArgs& args, const std::vector<bool>& mask);
std::vector<Tensor> backward(const Tensor& grad_out, const StateArgs& args, const std::vector<bool>& mask);
std::vector<Tensor> backward(const Tensor& grad_out, const FromStateArgs& args,
                             const std::vector<bool>& mask);

}  // namespace flatten::plain_torch
