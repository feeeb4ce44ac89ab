// The general form of linear attention (csrc/params.h: General) one number at a time: what general_test.cpp
// compares with. The formula is a template of its number, double or Traced.
#pragma once

#include <array>

#include "params.h"
#include "scalar_attention.h"

namespace scalar {

using flatten::FeatureMap;
using flatten::GateActivation;
using flatten::Normalizer;

inline double exponential(double x) { return std::exp(x); }
inline Traced exponential(Traced x) {
  const double power = std::exp(x.value());
  return Traced::of(power, x, power);
}

/// The tensors of a call, in this order everywhere.
enum Operand {
  kQ,
  kK,
  kV,
  kScale,
  kKeyBias,
  kWeight,
  kBias,
  kNormalQ,
  kNormalK,
  kKeyWeight,
  kGate,
  kOperands
};
constexpr const char* kNames[kOperands] = {"q",    "k",        "v",        "scale",      "key_bias", "weight",
                                           "bias", "normal_q", "normal_k", "key_weight", "gate"};

struct GeneralShape : Shape {
  std::int64_t value_dim = 16;
  FeatureMap map = FeatureMap::kElu;
  Normalizer normalizer = Normalizer::kDivide;
  GateActivation activation = GateActivation::kNone;
  double similarity_scale = 1;
  bool has_gate = false, has_normal_q = false, has_normal_k = false;
  bool has_table = false, table_per_channel = false;
  bool has_key_weight = false, weight_per_head = false;
  bool per_image = false;  // taps
  std::array<std::int64_t, kOperands> elements() const {
    const std::int64_t queries = batch * query_count(), keys = batch * key_count(), v = heads * value_dim;
    const bool phi = map == FeatureMap::kFocused;
    return {queries * channels(),
            keys * channels(),
            keys * v,
            phi && has_scale ? channels() : 0,
            has_key_bias ? window_keys() * channels() : 0,
            tap_filters() * kernel_h * kernel_w * (per_image ? batch : 1),
            has_taps() && has_bias && !per_image ? tap_filters() : 0,
            has_normal_q ? queries * channels() : 0,
            has_normal_k ? keys * channels() : 0,
            has_key_weight ? keys * weight_rows() : 0,
            has_gate ? queries * v : 0};
  }
  std::int64_t value_channels() const { return heads * value_dim; }
  std::int64_t weight_rows() const { return weight_per_head ? heads : 1; }
  std::int64_t tap_filters() const { return per_image || per_channel ? value_channels() : value_dim; }
  std::int64_t table_row() const { return table_per_channel ? channels() : dim; }
  std::int64_t table_elements() const { return has_table ? window_keys() * table_row() : 0; }
};

template <class Number>
using Values = std::array<std::vector<Number>, kOperands>;

template <class Number>
std::vector<Number> general_map(const GeneralShape& s, const Values<Number>& x, const Number* row,
                                const Number* key_bias) {
  if (s.map == FeatureMap::kFocused) return focus(s, x[kScale], row, key_bias);
  std::vector<Number> phi;
  for (std::int64_t c = 0; c < s.channels(); ++c) {
    Number y = key_bias ? row[c] + key_bias[c] : row[c];
    if (s.map == FeatureMap::kRelu) y = relu(y);
    if (s.map == FeatureMap::kElu) y = value_of(y) < 0 ? exponential(y) : y + Number(1);
    phi.push_back(y);
  }
  return phi;
}

template <class Number>
std::vector<Number> turned(const GeneralShape& s, const Numbers& table, std::int64_t position,
                           std::vector<Number> x) {
  if (!s.has_table) return x;
  for (std::int64_t c = 0; c < s.channels(); c += 2) {
    const std::int64_t at = position * s.table_row() + (s.table_per_channel ? c : c % s.dim);
    const Number first = x[c], second = x[c + 1], cosine = table[at], sine = table[at + 1],
                 minus = -table[at + 1];
    x[c] = first * cosine + second * minus;
    x[c + 1] = first * sine + second * cosine;
  }
  return x;
}

template <class Number>
Number activated(GateActivation activation, Number gate) {
  if (activation == GateActivation::kNone) return gate;
  const Number sigmoid = Number(1) / (Number(1) + exponential(gate * Number(-1)));
  return activation == GateActivation::kSilu ? gate * sigmoid : sigmoid;
}

/// Adds one window's attention to `out`, an image.
template <class Number>
void general_window(const GeneralShape& s, const Values<Number>& x, const Numbers& table, std::int64_t image,
                    std::int64_t window, Number* out) {
  const std::int64_t channels = s.channels(), dim = s.dim, vdim = s.value_dim, vchannels = s.value_channels();
  std::vector<Number> sums(channels * vdim, 0), means(channels, 0), values(vchannels, 0), total(s.heads, 0);
  for (std::int64_t j = 0; j < s.window_keys(); ++j) {
    const std::int64_t token = image * s.key_count() + s.token(window, j);
    const Number* bias = x[kKeyBias].empty() ? nullptr : &x[kKeyBias][j * channels];
    const std::vector<Number> key = general_map(s, x, &x[kK][token * channels], bias);
    const std::vector<Number> product = turned(s, table, j, key);
    const Number* normal = s.has_normal_k ? &x[kNormalK][token * channels] : key.data();
    for (std::int64_t h = 0; h < s.heads; ++h) {
      Number w = 1;
      if (s.has_key_weight) w = x[kKeyWeight][token * s.weight_rows() + (s.weight_per_head ? h : 0)];
      total[h] += w;
      for (std::int64_t d = 0; d < vdim; ++d)
        values[h * vdim + d] += w * x[kV][token * vchannels + h * vdim + d];
      for (std::int64_t c = h * dim; c < (h + 1) * dim; ++c) {
        means[c] += w * normal[c];
        for (std::int64_t d = 0; d < vdim; ++d)
          sums[c * vdim + d] += w * product[c] * x[kV][token * vchannels + h * vdim + d];
      }
    }
  }
  for (std::int64_t i = 0; i < s.window_queries(); ++i) {
    const std::int64_t token = s.token(window, i), at = image * s.query_count() + token;
    const std::vector<Number> query =
        general_map(s, x, &x[kQ][at * channels], static_cast<const Number*>(nullptr));
    const std::vector<Number> product = turned(s, table, i, query);
    const Number* normal = s.has_normal_q ? &x[kNormalQ][at * channels] : query.data();
    for (std::int64_t h = 0; h < s.heads; ++h) {
      if (value_of(total[h]) == 0) continue;
      Number z = 0;
      for (std::int64_t c = h * dim; c < (h + 1) * dim; ++c) z += normal[c] * means[c];
      z = z * Number(s.similarity_scale) / total[h];
      for (std::int64_t d = 0; d < vdim; ++d) {
        Number y = 0;
        for (std::int64_t c = h * dim; c < (h + 1) * dim; ++c) y += product[c] * sums[c * vdim + d];
        y = y * Number(s.similarity_scale) / total[h];
        const Number u = values[h * vdim + d] / total[h], minus_z = z * Number(-1);
        if (s.normalizer == Normalizer::kDivide) y = y / (z + Number(s.eps));
        if (s.normalizer == Normalizer::kSubtract) y = y + (Number(1) + minus_z) * u;
        if (s.normalizer == Normalizer::kMagnitude)
          y = (Number(1) + Number(1) / (z + Number(s.eps))) * y + minus_z * u;
        out[token * vchannels + h * vdim + d] += y;
      }
    }
  }
}

/// attention(q, k, v, ...): (batch, queries, heads * value_dim).
template <class Number>
std::vector<Number> general_attention(const GeneralShape& s, const Values<Number>& x, const Numbers& table) {
  const std::int64_t elements = s.query_count() * s.value_channels();
  std::vector<Number> out(s.batch * elements, 0);
  Shape values = s;  // the taps see the values' channels
  values.dim = s.value_dim;
  values.per_channel = s.per_channel || s.per_image;
  for (std::int64_t image = 0; image < s.batch; ++image) {
    for (std::int64_t window = 0; window < s.windows(); ++window)
      general_window(s, x, table, image, window, &out[image * elements]);
    if (!s.has_taps()) continue;
    std::vector<Number> weight = x[kWeight];
    if (s.per_image) {
      const std::int64_t own = s.tap_filters() * s.kernel_h * s.kernel_w;
      weight = {x[kWeight].begin() + image * own, x[kWeight].begin() + (image + 1) * own};
    }
    convolve(values, &x[kV][image * elements], weight, x[kBias], &out[image * elements]);
  }
  for (std::size_t i = 0; s.has_gate && i < out.size(); ++i)
    out[i] = activated(s.activation, x[kGate][i]) * out[i];
  return out;
}

}  // namespace scalar
