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
  const scalar::Shape s{.height = 16,
                        .width = 24,
                        .heads = 3,
                        .dim = 20,
                        .batch = 1,
                        .window_h = 8,
                        .window_w = 12,
                        .shift_h = 1,
                        .shift_w = 2,
                        .kernel_h = 5,
                        .kernel_w = 3,
                        .has_key_bias = false,
                        .focusing_factor = 2.5};
  const auto floats = [](std::int64_t count, double low, double high, unsigned seed) {
    const scalar::Numbers x = scalar::random(count, low, high, seed);
    return std::vector<float>(x.begin(), x.end());
  };
  const std::int64_t elements = s.query_count() * s.channels();
  std::vector<float> q = floats(elements, -1, 1, 1), k = floats(elements, -1, 1, 2);
  std::vector<float> v = floats(elements, -1, 1, 3), scale = floats(s.channels(), 0.5, 2, 4);
  std::vector<float> weight = floats(s.dim * s.kernel_h * s.kernel_w, -0.3, 0.3, 5);
  std::vector<float> bias = floats(s.dim, -1, 1, 6);

  flatten::FocusOptions focus;
  focus.scale = tensor(scale, {s.channels()});
  focus.focusing_factor = s.focusing_factor;
  flatten::ConvOptions conv;
  conv.weight = tensor(weight, {s.dim, 1, s.kernel_h, s.kernel_w});
  conv.bias = tensor(bias, {s.dim});
  flatten::MapOptions map;
  map.size = {s.height, s.width};
  map.window = {s.window_h, s.window_w};
  map.shift = {s.shift_h, s.shift_w};

  const std::vector<std::int64_t> shape{1, s.query_count(), s.channels()};
  const Tensor out = flatten::attention(tensor(q, shape), tensor(k, shape), tensor(v, shape), s.heads, focus,
                                        conv, map, s.eps);
  const auto numbers = [](const std::vector<float>& x) { return scalar::Numbers(x.begin(), x.end()); };
  const scalar::Operands<double> operands{numbers(q), numbers(k),      numbers(v),   numbers(scale),
                                          {},         numbers(weight), numbers(bias)};
  const double error =
      scalar::relative_error(out.const_data_ptr<float>(), scalar::attention<double>(s, operands));
  std::printf("flatten::attention against the scalar formula: relative error %.2g\n", error);
  return error < 3e-6;  // as tests/cases.py has it
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
