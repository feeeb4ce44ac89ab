// The state operators' tensors -> params.h, as arguments.h does it for attention.
#pragma once

#include "arguments.h"

namespace flatten {

/// The arguments of flatten::attention_state.
struct StateArgs {
  Tensor k, v;
  std::int64_t num_heads;
  OptionalTensor scale, key_bias;
  double focusing_factor;
  double eps;
  std::string feature_map;
  OptionalTensor rotary, key_weight, normalizer_k;
};

/// The arguments of flatten::attention_from_state.
struct FromStateArgs {
  Tensor q, state;
  std::int64_t num_heads;
  OptionalTensor scale;
  double focusing_factor;
  double eps;
  std::string feature_map;
  OptionalTensor rotary, normalizer_q;
  std::string normalizer;
  double similarity_scale;
  OptionalTensor gate;
  std::string gate_activation;
};

StateArgs take_state(Arguments& given);
FromStateArgs take_from_state(Arguments& given);

/// As `check` of attention's arguments. The inputs have what the calls' structs in params.h say.
void check(StateArgs& args, AttentionInputs& inputs);
void check(FromStateArgs& args, AttentionInputs& inputs);

/// A contiguous state, or its gradient, for `inputs`: (batch, heads, head_dim + 1, value_dim + 1) in the
/// accumulate dtype, on the device of `beside`; made contiguous in place if need be.
const void* check_whole_state(const char* op, const char* name, Tensor& state, const Tensor& beside,
                              const AttentionInputs& inputs);

}  // namespace flatten
