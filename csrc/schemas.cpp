// The schemas of torch.ops.flatten, and nothing else. Kernels are registered beside them:
// cpu/register.cpp, cuda/register.cpp, and flatten_ext/_torch for torch's own hooks.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <utility>

namespace {

void replace(std::string& text, const std::string& old, const std::string& by) {
  for (std::size_t at = 0; (at = text.find(old, at)) != std::string::npos; at += by.size())
    text.replace(at, old.size(), by);
}

/// Defines an operator and its twin for torch.jit.trace (traced.cpp).
void define_with_twin(torch::stable::detail::StableLibrary& m, const char* schema) {
  m.def(schema);
  std::string twin = schema;
  twin.replace(twin.find('('), 1, "_traced(Tensor measured, int[] expected, ");
  replace(twin, "SymInt", "int");
  m.def(twin.c_str());
}

/// A schema's arguments without defaults, all positional.
std::string without_defaults(const std::string& arguments) {
  std::string without;
  for (std::size_t at = 0; at < arguments.size();) {
    const std::size_t end = std::min(arguments.find(", ", at), arguments.size());
    const std::string argument = arguments.substr(at, end - at);
    if (argument != "*") without += (without.empty() ? "" : ", ") + argument.substr(0, argument.find('='));
    at = end + 2;
  }
  return without;
}

}  // namespace

STABLE_TORCH_LIBRARY(flatten, m) {
  // The operators people call.
  define_with_twin(
      m,
      "attention(Tensor q, Tensor k, Tensor v, int num_heads, Tensor? scale=None, Tensor? key_bias=None, "
      "Tensor? dwc_weight=None, Tensor? dwc_bias=None, SymInt[]? size=None, SymInt[]? window=None, "
      "SymInt[]? shift=None, float focusing_factor=3.0, float eps=1e-6, *, str feature_map=\"focused\", "
      "Tensor? rotary=None, Tensor? key_weight=None, str normalizer=\"divide\", float similarity_scale=1.0, "
      "Tensor? gate=None, str gate_activation=\"none\") -> Tensor");
  define_with_twin(
      m,
      "linear_attention(Tensor q, Tensor k, Tensor v, int num_heads, Tensor? dwc_weight=None, "
      "Tensor? dwc_bias=None, SymInt[]? size=None, SymInt[]? window=None, SymInt[]? shift=None, "
      "float eps=1e-6, *, Tensor? normalizer_q=None, Tensor? normalizer_k=None, Tensor? rotary=None, "
      "Tensor? key_weight=None, str normalizer=\"divide\", float similarity_scale=1.0, Tensor? gate=None, "
      "str gate_activation=\"none\") -> Tensor");
  define_with_twin(
      m,
      "depthwise_conv(Tensor x, Tensor weight, Tensor? bias, SymInt[] size, SymInt[]? window=None, "
      "SymInt[]? shift=None) -> Tensor");

  const std::string state =
      "Tensor k, Tensor v, int num_heads, Tensor? scale=None, Tensor? key_bias=None, *, "
      "float focusing_factor=3.0, float eps=1e-6, str feature_map=\"focused\", Tensor? rotary=None, "
      "Tensor? key_weight=None, Tensor? normalizer_k=None";
  const std::string from_state =
      "Tensor q, Tensor state, int num_heads, Tensor? scale=None, *, float focusing_factor=3.0, "
      "float eps=1e-6, str feature_map=\"focused\", Tensor? rotary=None, Tensor? normalizer_q=None, "
      "str normalizer=\"divide\", float similarity_scale=1.0, Tensor? gate=None, "
      "str gate_activation=\"none\"";
  m.def(("attention_state(" + state + ") -> Tensor").c_str());
  m.def(("attention_from_state(" + from_state + ") -> Tensor").c_str());

  // What autograd calls. A focusing_factor of None means features that are mapped already; `state` holds
  // S and m of saved_windows windows, on CUDA of all or none; a backward computes those of the others again,
  // and returns one gradient for each true entry of output_mask, in the order of the tensor arguments. The
  // general form's arguments come last, behind what is the operator's own; a feature_map of None is
  // "focused", or nothing with a focusing_factor of None. `out`, of the forward, saves the backward of a gate
  // computing it again.
  const std::string attention =
      "Tensor q, Tensor k, Tensor v, int num_heads, Tensor? scale, Tensor? key_bias, Tensor? dwc_weight, "
      "Tensor? dwc_bias, SymInt[]? size, SymInt[]? window, SymInt[]? shift, float? focusing_factor, float "
      "eps";
  const std::string general =
      ", str? feature_map=None, Tensor? rotary=None, Tensor? key_weight=None, str normalizer=\"divide\", "
      "float similarity_scale=1.0, Tensor? gate=None, str gate_activation=\"none\", "
      "Tensor? normalizer_q=None, Tensor? normalizer_k=None";
  const std::string conv =
      "Tensor x, Tensor weight, Tensor? bias, SymInt[] size, SymInt[]? window, SymInt[]? shift";
  m.def(("attention_forward(" + attention + ", SymInt saved_windows" + general +
         ") -> (Tensor out, Tensor state)")
            .c_str());
  m.def(("attention_backward(Tensor grad_out, " + attention + ", Tensor state, bool[] output_mask" + general +
         ", Tensor? out=None) -> Tensor[]")
            .c_str());
  m.def(("depthwise_conv_backward(Tensor grad_out, " + conv + ", bool[] output_mask) -> Tensor[]").c_str());
  const std::string plain_state = without_defaults(state), plain_from_state = without_defaults(from_state);
  m.def(("attention_state_backward(Tensor grad_out, " + plain_state + ", bool[] output_mask) -> Tensor[]")
            .c_str());
  m.def(("attention_from_state_backward(Tensor grad_out, " + plain_from_state +
         ", bool[] output_mask) -> Tensor[]")
            .c_str());

  // The checks of the operators alone, with what a backward gets besides: what the plain-torch fallback and
  // meta tensors call first.
  m.def(("check_attention(" + attention + ", Tensor? grad_out=None, Tensor? state=None" + general + ") -> ()")
            .c_str());
  m.def(("check_depthwise_conv(" + conv + ", Tensor? grad_out=None) -> ()").c_str());
  m.def(("check_attention_state(" + plain_state + ", Tensor? grad_out=None) -> ()").c_str());
  m.def(("check_attention_from_state(" + plain_from_state + ", Tensor? grad_out=None) -> ()").c_str());

  // The operators in plain torch, which Python registers: what a kernel's host calls where the device has no
  // kernel for a call (plain_torch.h). The arguments are checked.
  for (const auto& [name, arguments] : {std::pair<std::string, std::string>{"attention", attention + general},
                                        {"depthwise_conv", conv},
                                        {"attention_state", plain_state},
                                        {"attention_from_state", plain_from_state}}) {
    const std::string all = without_defaults(arguments);
    m.def(("reference_" + name + "(" + all + ") -> Tensor").c_str());
    m.def(("reference_" + name + "_backward(Tensor grad_out, " + all + ", bool[] output_mask) -> Tensor[]")
              .c_str());
  }
}
