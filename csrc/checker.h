// What the checks of all operators are made of: each looks at one argument, and says what is wrong with it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "arguments.h"
#include "dtypes.h"
#include "show.h"

namespace flatten {

using torch::headeronly::DeviceType;
using Sizes = std::vector<std::int64_t>;
using SizesRef = torch::headeronly::IntHeaderOnlyArrayRef;

/// Collects the operator's name once, so that each check is one line: expect(cond, "what", values...).
/// `input` is what messages call the tensor that sets dtype and device.
struct Checker {
  const char* op;
  const char* input = "q";

  template <class... Parts>
  void expect(bool condition, const Parts&... parts) const {
    if (condition) return;
    std::ostringstream message;
    message << "flatten." << op << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  void dtype(const char* name, const Tensor& t, const Tensor& q) const {
    expect(scalar_type_of(t) == scalar_type_of(q), name, " has dtype ", show(scalar_type_of(t)),
           ", expected ", input, "'s ", show(scalar_type_of(q)));
  }

  void device(const char* name, const Tensor& t, const Tensor& q) const {
    expect(t.device() == q.device(), name, " is on ", show_device(t), ", expected ", input, "'s device ",
           show_device(q));
    expect(t.layout() == torch::headeronly::Layout::Strided, name, " is not a dense strided tensor");
  }

  /// (batch, tokens, channels) tokens in a dtype the kernels have.
  Dtype tokens(const char* name, const Tensor& t) const {
    expect(t.defined(), name, " is None, expected a tensor of (batch, tokens, channels)");
    expect(t.layout() == torch::headeronly::Layout::Strided, name, " is not a dense strided tensor");
    expect(t.dim() == 3, name, " has shape ", show(t.sizes()),
           ", expected 3 dimensions (batch, tokens, channels)");
    // The CUDA kernels number the tokens of an image in 32 bits.
    expect(t.device().type() != DeviceType::CUDA || t.size(1) <= std::numeric_limits<std::int32_t>::max(),
           name, " has shape ", show(t.sizes()), ", expected at most ",
           std::numeric_limits<std::int32_t>::max(), " tokens on CUDA");
    const std::optional<Dtype> dtype = dtype_of(scalar_type_of(t));
    expect(dtype.has_value(), name, " has dtype ", show(scalar_type_of(t)),
           ", expected float32, float16, bfloat16 or float64");
    return *dtype;
  }

  /// A parameter of one given shape, fp32 or in q's dtype, on q's device; contiguous after the call.
  Parameter parameter(const char* name, Tensor& t, SizesRef expected, const Tensor& q, Dtype dtype) const {
    expect(same(t.sizes(), expected), name, " has shape ", show(t.sizes()), ", expected ", show(expected));
    return parameter_of_any_shape(name, t, q, dtype);
  }

  /// `hint` is what to do instead of what is refused.
  Parameter parameter_of_any_shape(const char* name, Tensor& t, const Tensor& q, Dtype dtype,
                                   const char* hint = "") const {
    device(name, t, q);
    const ScalarType type = scalar_type_of(t), q_type = scalar_type(dtype);
    const bool own = type == q_type;
    const bool widened = type == ScalarType::Float && dtype != Dtype::kFloat64;
    expect(own || widened, name, " has dtype ", show(type), ", expected ", show(q_type),
           dtype == Dtype::kFloat64 || dtype == Dtype::kFloat32 ? "" : " or float32", hint);
    if (!t.is_contiguous()) t = torch::stable::contiguous(t);
    return {data(name, t), own ? dtype : Dtype::kFloat32};
  }

  /// The elements of a tensor; a meta tensor's are nowhere, a tensor whose storage was freed is refused.
  const void* data(const char* name, const Tensor& t) const {
    const void* elements = t.const_data_ptr();
    expect(elements != nullptr || t.numel() == 0 || t.device().type() == DeviceType::Meta, name,
           " has no storage: it was freed");
    return elements;
  }

  /// Channels adjacent: as it is, or contiguous.
  Tokens readable(const char* name, Tensor& t) const {
    if (t.stride(2) != 1 && t.size(2) != 1) t = torch::stable::contiguous(t);
    return {data(name, t), t.stride(0), t.stride(1)};
  }

  /// A number the kernels compute with: in float32, or in float64 for float64 tokens.
  void held(const char* name, double value, Dtype dtype) const {
    const bool wide = accumulate_dtype(dtype) == Dtype::kFloat64;
    const double least = wide ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
    const double most = wide ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
    expect(value == 0 || (value >= least && value <= most), name, " is ", value, ", expected a number of ",
           show(scalar_type(accumulate_dtype(dtype))), ", in which the call is computed: 0 or from ", least,
           " to ", most);
  }

  /// Two positive numbers, or two non-negative ones.
  void pair(const char* name, const Sizes& value, std::int64_t least) const {
    expect(value.size() == 2, name, " has ", value.size(), " numbers ", show(value),
           ", expected 2 (height, width)");
    expect(value[0] >= least && value[1] >= least, name, " is ", show(value),
           ", expected numbers of at least ", least);
  }

  /// How the tokens tile the map and its windows.
  void geometry(Geometry& g, const OptionalSize& size, const OptionalSize& window,
                const OptionalSize& shift) const {
    g.map_h = g.window_h = 1;
    g.map_w = g.window_w = g.keys;
    if (size) {
      pair("size", *size, 1);
      const std::int64_t h = (*size)[0], w = (*size)[1];
      expect(h <= g.keys / w, "size ", show(*size), " has more positions than there are tokens (", g.keys,
             ")");
      g.prefix = g.keys - h * w;
      g.map_h = g.window_h = h;
      g.map_w = g.window_w = w;
    }
    if (window) {
      expect(size.has_value(), "window ", show(*window), " was given without size");
      pair("window", *window, 1);
      g.window_h = (*window)[0];
      g.window_w = (*window)[1];
      expect(g.map_h % g.window_h == 0 && g.map_w % g.window_w == 0, "window ", show(*window),
             " does not divide size ", show(*size));
      expect(g.queries == g.keys, "window ", show(*window), " needs as many queries as keys, got ", g.queries,
             " and ", g.keys);
      expect(g.prefix == 0, "window ", show(*window), " allows no prefix tokens, but size ", show(*size),
             " leaves ", g.prefix, " of ", g.keys, " tokens outside the map");
    }
    if (shift) {
      expect(window.has_value(), "shift ", show(*shift), " was given without window");
      pair("shift", *shift, 0);
      g.shift_h = (*shift)[0];
      g.shift_w = (*shift)[1];
      expect(g.shift_h < g.window_h && g.shift_w < g.window_w, "shift ", show(*shift),
             " is not smaller than window ", show(*window));
    }
  }

  /// The depthwise kernel and its bias. The names are the operator's own.
  Taps taps(const char* weight_name, OptionalTensor& weight, const char* bias_name, OptionalTensor& bias,
            const Geometry& g, bool has_size, const Tensor& q, Dtype dtype) const {
    Taps taps;
    if (!weight) {
      expect(!bias, bias_name, " was given without ", weight_name);
      return taps;
    }
    expect(has_size, weight_name, " was given without size");
    expect(g.queries == g.keys, weight_name, " needs as many queries as keys, got ", g.queries, " and ",
           g.keys);
    const SizesRef shape = weight->sizes();
    const bool per_image = shape.size() == 5;
    if (per_image) {
      expect(same(shape.slice(0, 3), {g.batch, g.value_channels(), 1}), weight_name, " has shape ",
             show(shape), ", expected (", g.batch, ", ", g.value_channels(),
             ", 1, kh, kw): taps of each image's own");
      expect(!bias, bias_name, " was given with a ", weight_name,
             " of five dimensions (taps of each image's own), expected None");
    } else {
      expect(
          shape.size() == 4 && shape[1] == 1 && (shape[0] == g.value_dim || shape[0] == g.value_channels()),
          weight_name, " has shape ", show(shape), ", expected (", g.value_dim,
          ", 1, kh, kw) shared by the heads or (", g.value_channels(), ", 1, kh, kw)");
    }
    taps.kernel_h = shape[shape.size() - 2];
    taps.kernel_w = shape[shape.size() - 1];
    expect(taps.kernel_h % 2 == 1 && taps.kernel_w % 2 == 1, weight_name, " has shape ", show(shape),
           ", expected an odd kernel height and width");
    taps.per_image = per_image;
    taps.per_channel = per_image || shape[0] != g.value_dim;
    taps.weight = parameter_of_any_shape(weight_name, *weight, q, dtype);
    if (bias) taps.bias = parameter(bias_name, *bias, {shape[0]}, q, dtype);
    return taps;
  }

  /// A value of an enumeration by its name, one of `names`.
  template <class Enum, std::size_t kCount>
  Enum choice(const char* argument, const std::string& given,
              const std::pair<const char*, Enum> (&names)[kCount]) const {
    for (const auto& [name, value] : names) {
      if (given == name) return value;
    }
    std::ostringstream all;
    for (std::size_t i = 0; i < kCount; ++i) {
      all << (i == 0 ? "'" : i + 1 == kCount ? "' or '" : "', '") << names[i].first;
    }
    expect(false, argument, " must be ", all.str(), "', but it is '", given, "'");
    return names[0].second;
  }

  FeatureMap feature_map(const std::string& given) const {
    return choice<FeatureMap>("feature_map", given,
                              {{"focused", FeatureMap::kFocused},
                               {"elu", FeatureMap::kElu},
                               {"relu", FeatureMap::kRelu},
                               {"none", FeatureMap::kNone}});
  }

  Normalizer normalizer(const std::string& given) const {
    return choice<Normalizer>("normalizer", given,
                              {{"divide", Normalizer::kDivide},
                               {"none", Normalizer::kNone},
                               {"subtract", Normalizer::kSubtract},
                               {"magnitude", Normalizer::kMagnitude}});
  }

  GateActivation gate_activation(const std::string& given) const {
    return choice<GateActivation>("gate_activation", given,
                                  {{"none", GateActivation::kNone},
                                   {"silu", GateActivation::kSilu},
                                   {"sigmoid", GateActivation::kSigmoid}});
  }

  double eps(double value, Dtype dtype) const {
    expect(std::isfinite(value) && value >= 0, "eps is ", value, ", expected a finite number >= 0");
    held("eps", value, dtype);
    return value;
  }

  double similarity_scale(double value, Dtype dtype) const {
    expect(std::isfinite(value), "similarity_scale is ", value, ", expected a finite number");
    if (value != 1) held("similarity_scale", std::abs(value), dtype);
    return value;
  }

  /// What is done to the channels of queries and keys; `bias_rows` are the tokens that key_bias is for.
  Mapping mapping(const std::string& feature_map_name, double focusing_factor, OptionalTensor& scale,
                  OptionalTensor* key_bias, std::int64_t bias_rows, const Geometry& g, const Tensor& q,
                  Dtype dtype) const {
    Mapping mapping;
    mapping.map = feature_map(feature_map_name);
    if (mapping.map == FeatureMap::kFocused) {
      expect(std::isfinite(focusing_factor) && focusing_factor >= 1, "focusing_factor is ", focusing_factor,
             ", expected a finite number >= 1");
      held("focusing_factor", focusing_factor, dtype);
      mapping.focusing_factor = focusing_factor;
      if (scale) mapping.scale = parameter("scale", *scale, {g.channels()}, q, dtype);
    } else {
      expect(focusing_factor == 3, "focusing_factor is ", focusing_factor,
             ", expected its default 3: it belongs to feature_map 'focused' and is not read by '",
             feature_map_name, "'");
      expect(!scale,
             "scale was given, expected None: it belongs to feature_map 'focused' and is not read by '",
             feature_map_name, "'");
    }
    if (key_bias && *key_bias)
      mapping.key_bias = parameter("key_bias", **key_bias, {bias_rows, g.channels()}, q, dtype);
    return mapping;
  }

  /// The table for the `tokens` of a window.
  Rotation rotation(OptionalTensor& table, std::int64_t tokens, const Geometry& g, const Tensor& q,
                    Dtype dtype) const {
    Rotation rotation;
    if (!table) return rotation;
    expect(g.head_dim % 2 == 0, "rotary turns pairs of channels, but the heads have ", g.head_dim,
           " channels, expected an even number");
    const SizesRef shape = table->sizes();
    const std::int64_t shared = g.head_dim / 2, own = g.channels() / 2;
    expect(same(shape, {tokens, shared, 2}) || same(shape, {tokens, own, 2}), "rotary must be (", tokens,
           ", ", shared, ", 2), shared by the heads, or (", tokens, ", ", own, ", 2), but it is ",
           show(shape));
    rotation.table = parameter_of_any_shape("rotary", *table, q, dtype);
    rotation.per_channel = shape[1] != shared;
    return rotation;
  }

  KeyWeight key_weight(OptionalTensor& weight, const Geometry& g, const Tensor& q, Dtype dtype) const {
    KeyWeight key_weight;
    if (!weight) return key_weight;
    const SizesRef shape = weight->sizes();
    expect(same(shape, {g.batch, g.keys}) || same(shape, {g.batch, g.keys, g.heads}), "key_weight has shape ",
           show(shape), ", expected (", g.batch, ", ", g.keys, ") or (", g.batch, ", ", g.keys, ", ", g.heads,
           ")");
    const bool is_mask = scalar_type_of(*weight) == ScalarType::Bool;
    key_weight.weight = parameter_of_any_shape(
        "key_weight", *weight, q, dtype, is_mask ? ": pass mask.to(q.dtype), True where a key counts" : "");
    key_weight.per_head = shape.size() == 3;
    return key_weight;
  }

  /// Tokens beside q, in its dtype: a gate, or the features of the normalizer. Null where there are none.
  Tokens beside(const char* name, OptionalTensor& t, const Sizes& expected, const Tensor& q) const {
    if (!t) return {};
    tokens(name, *t);
    device(name, *t, q);
    dtype(name, *t, q);
    expect(same(t->sizes(), expected), name, " has shape ", show(t->sizes()), ", expected ", show(expected));
    return readable(name, *t);
  }

  GateActivation activation_of(const OptionalTensor& gate, const std::string& name) const {
    const GateActivation activation = gate_activation(name);
    expect(gate || activation == GateActivation::kNone, "gate_activation is '", name,
           "' without gate, expected 'none'");
    return activation;
  }
};

}  // namespace flatten
