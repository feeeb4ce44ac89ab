// flatten::attention called from C++ through torch's dispatcher, against the scalar formula.
#include <flatten/flatten.h>
#include <torch/csrc/stable/ops.h>

#include <cstdio>
#include <exception>

#include "scalar_attention.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor tensor(std::vector<float>& data, const std::vector<std::int64_t>& sizes) {
  std::vector<std::int64_t> strides(sizes.size(), 1);
  for (std::size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(data.data(), sizes, strides, cpu, ScalarType::Float);
}

bool attention_matches() {
  const scalar::Problem p = scalar::Problem::make();
  const auto floats = [](const scalar::Numbers& x) { return std::vector<float>(x.begin(), x.end()); };
  std::vector<float> q = floats(p.q), k = floats(p.k), v = floats(p.v);
  std::vector<float> scale = floats(p.scale), weight = floats(p.weight), bias = floats(p.bias);

  flatten::FocusOptions focus;
  focus.scale = tensor(scale, {p.channels()});
  focus.focusing_factor = p.focusing_factor;
  flatten::ConvOptions conv;
  conv.weight = tensor(weight, {p.dim, 1, p.kernel_h, p.kernel_w});
  conv.bias = tensor(bias, {p.dim});
  flatten::MapOptions map;
  map.size = {p.height, p.width};
  map.window = {p.window_h, p.window_w};
  map.shift = {p.shift_h, p.shift_w};

  const std::vector<std::int64_t> shape{1, p.tokens(), p.channels()};
  const Tensor out = flatten::attention(tensor(q, shape), tensor(k, shape), tensor(v, shape), p.heads, focus,
                                        conv, map, p.eps);
  const double error = scalar::relative_error(out.const_data_ptr<float>(), p.solve());
  std::printf("flatten::attention against the scalar formula: relative error %.2g\n", error);
  return error < 1e-5;
}

bool bad_heads_throw() {
  std::vector<float> x(2 * 3 * 8, 1.0F);
  const Tensor tokens = tensor(x, {2, 3, 8});
  try {
    flatten::linear_attention(tokens, tokens, tokens, /*num_heads=*/3);
  } catch (const std::exception&) {
    return true;
  }
  std::printf("num_heads = 3 of 8 channels did not throw\n");
  return false;
}

}  // namespace

int main() { return attention_matches() && bad_heads_throw() ? 0 : 1; }
