// The schemas of torch.ops.flatten, and nothing else. Kernels are registered beside them:
// cpu/register.cpp, cuda/register.cpp, and flatten_ext/_torch for torch's own hooks.
#include <torch/csrc/stable/library.h>

#include <string>

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

}  // namespace

STABLE_TORCH_LIBRARY(flatten, m) {
  // The three operators people call.
  define_with_twin(
      m,
      "attention(Tensor q, Tensor k, Tensor v, int num_heads, Tensor? scale=None, Tensor? key_bias=None, "
      "Tensor? dwc_weight=None, Tensor? dwc_bias=None, SymInt[]? size=None, SymInt[]? window=None, "
      "SymInt[]? shift=None, float focusing_factor=3.0, float eps=1e-6) -> Tensor");
  define_with_twin(m,
                   "linear_attention(Tensor q, Tensor k, Tensor v, int num_heads, Tensor? dwc_weight=None, "
                   "Tensor? dwc_bias=None, SymInt[]? size=None, SymInt[]? window=None, SymInt[]? shift=None, "
                   "float eps=1e-6) -> Tensor");
  define_with_twin(
      m,
      "depthwise_conv(Tensor x, Tensor weight, Tensor? bias, SymInt[] size, SymInt[]? window=None, "
      "SymInt[]? shift=None) -> Tensor");

  // What autograd calls. A focusing_factor of None means features that are mapped already; `state` holds
  // S and m of saved_windows windows, on CUDA of all or none; a backward computes those of the others again,
  // and returns one gradient for each true entry of output_mask, in the order of the tensor arguments.
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, int num_heads, Tensor? scale, Tensor? key_bias, "
      "Tensor? dwc_weight, Tensor? dwc_bias, SymInt[]? size, SymInt[]? window, SymInt[]? shift, "
      "float? focusing_factor, float eps, SymInt saved_windows) -> (Tensor out, Tensor state)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, int num_heads, Tensor? scale, "
      "Tensor? key_bias, Tensor? dwc_weight, Tensor? dwc_bias, SymInt[]? size, SymInt[]? window, "
      "SymInt[]? shift, float? focusing_factor, float eps, Tensor state, bool[] output_mask) -> Tensor[]");
  m.def(
      "depthwise_conv_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, SymInt[] size, "
      "SymInt[]? window, SymInt[]? shift, bool[] output_mask) -> Tensor[]");

  // The checks of the operators alone, with what a backward gets besides: what the plain-torch fallback and
  // meta tensors call first.
  m.def(
      "check_attention(Tensor q, Tensor k, Tensor v, int num_heads, Tensor? scale, Tensor? key_bias, "
      "Tensor? dwc_weight, Tensor? dwc_bias, SymInt[]? size, SymInt[]? window, SymInt[]? shift, "
      "float? focusing_factor, float eps, Tensor? grad_out=None, Tensor? state=None) -> ()");
  m.def(
      "check_depthwise_conv(Tensor x, Tensor weight, Tensor? bias, SymInt[] size, SymInt[]? window, "
      "SymInt[]? shift, Tensor? grad_out=None) -> ()");
}
