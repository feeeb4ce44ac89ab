// Tensors -> params.h: every check on the arguments and its message, once, for all devices and operators.
// Compiled into each library, since torch's stable types are hidden symbols.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "params.h"

namespace flatten {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalSize = std::optional<std::vector<std::int64_t>>;

/// The arguments of flatten::attention as the dispatcher hands them over. Without a focusing_factor they
/// are flatten::linear_attention's, whose features are mapped already: feature_map is then not read.
struct AttentionArgs {
  Tensor q, k, v;
  std::int64_t num_heads;
  OptionalTensor scale, key_bias, dwc_weight, dwc_bias;
  OptionalSize size, window, shift;
  std::optional<double> focusing_factor;
  double eps;
  std::string feature_map = "focused";
  OptionalTensor rotary, key_weight;
  std::string normalizer = "divide";
  double similarity_scale = 1;
  OptionalTensor gate;
  std::string gate_activation = "none";
  OptionalTensor normalizer_q, normalizer_k;  // linear_attention's
};

/// The arguments of flatten::depthwise_conv.
struct ConvArgs {
  Tensor x;
  OptionalTensor weight, bias;
  OptionalSize size, window, shift;
};

/// Which of the operators' argument lists a call has: attention's, linear_attention's, or that of the
/// operators below them, whose focusing_factor is None for features that are mapped already.
enum class Focus { kFocused, kLinear, kEither };

/// Takes the arguments of a call off the dispatcher's stack, in the order of the schema. Every argument must
/// be taken: what is left on the stack is never freed.
class Arguments {
 public:
  Arguments(const StableIValue* stack, std::uint64_t count) : next_(stack), end_(stack + count) {}

  template <class T>
  T next() {
    return torch::stable::detail::to<T>(*next_++);
  }
  AttentionArgs attention(Focus focus);
  /// What the general form has beyond focused linear attention. It ends the arguments of every operator:
  /// attention() takes it unless the list has arguments of its own (kEither) before it.
  void general(Focus focus, AttentionArgs& args);
  ConvArgs conv();
  /// Throws std::logic_error where the schema (schemas.cpp) has not the arguments that were taken.
  void end() const;

 private:
  void take_normalizer(AttentionArgs& args);

  const StableIValue *next_, *end_;
};

/// Checks everything there is to check without reading a tensor's values, then points `inputs` at the data.
/// Throws std::runtime_error naming the operator, the argument, what was expected and what came. A layout no
/// kernel reads (channels not adjacent, a parameter that is not contiguous) is replaced in `args` by a
/// contiguous copy, so `args` must outlive `inputs`.
void check(AttentionArgs& args, AttentionInputs& inputs);
void check(ConvArgs& args, ConvInputs& inputs);

/// The output or the gradient of it: (batch, queries, value channels), q's (x's) dtype and device; made
/// contiguous in place if need be.
Tokens check_like_out(const char* op, const char* name, Tensor& t, const Tensor& q, const Geometry& geometry);

/// How many windows' S and m a forward is to save.
void check_saved_windows(std::int64_t count, const Tensor& q, const Geometry& g);

/// The state a forward left.
struct SavedState {
  const void* data;  // null where nothing was saved
  std::int64_t windows;
};
SavedState check_state(const Tensor& state, const Tensor& q, const AttentionInputs& inputs);

}  // namespace flatten
