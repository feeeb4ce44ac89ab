// Focused linear attention and the depthwise convolution, one number at a time: what the C++ tests compare
// with. The formulas are templates of their number, double or Traced.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "traced.h"

namespace scalar {

using Numbers = std::vector<double>;

inline Numbers random(std::int64_t count, double low, double high, unsigned seed) {
  std::mt19937 bits(seed);
  Numbers x(count);
  for (double& value : x) value = low + (high - low) * (bits() / 4294967296.0);
  return x;
}

/// The sizes and options of a call, as csrc/params.h has them. Without a window the whole map is one.
struct Shape {
  std::int64_t height = 6, width = 5, heads = 2, dim = 16, batch = 2;
  std::int64_t prefix = 0;  // tokens before those of the map
  std::int64_t keys = 0;    // 0: as many as queries
  std::int64_t window_h = 0, window_w = 0, shift_h = 0, shift_w = 0;
  std::int64_t kernel_h = 5, kernel_w = 5;  // 0: no taps
  bool per_channel = false;                 // taps; otherwise the heads share them
  bool focused = true;                      // otherwise q and k are features already
  bool has_scale = true, has_key_bias = true, has_bias = true;
  double focusing_factor = 3, eps = 1e-6;

  std::int64_t channels() const { return heads * dim; }
  std::int64_t query_count() const { return prefix + height * width; }
  std::int64_t key_count() const { return keys ? keys : query_count(); }
  bool has_taps() const { return kernel_h > 0; }
  std::int64_t filters() const { return per_channel ? channels() : dim; }
  std::int64_t rows() const { return window_h ? window_h : height; }  // of a window
  std::int64_t columns() const { return window_w ? window_w : width; }
  std::int64_t windows() const { return height / rows() * (width / columns()); }
  /// Tokens that one window attends over: M.
  std::int64_t window_keys() const { return windows() > 1 ? rows() * columns() : key_count(); }
  std::int64_t window_queries() const { return windows() > 1 ? rows() * columns() : query_count(); }

  /// The token at row y, column x of a window.
  std::int64_t token(std::int64_t window, std::int64_t y, std::int64_t x) const {
    const std::int64_t across = width / columns();
    return prefix + (window / across * rows() + y + shift_h) % height * width +
           (window % across * columns() + x + shift_w) % width;
  }
  /// The token at a position of a window, prefix first; other keys than queries lie in no map.
  std::int64_t token(std::int64_t window, std::int64_t position) const {
    if (position < prefix || keys) return position;
    return token(window, (position - prefix) / columns(), (position - prefix) % columns());
  }
};

/// (batch, tokens, channels) q, k, v; then (C,), (window_keys, C), (filters, kernel_h, kernel_w), (filters,),
/// empty where the call has none.
template <class Number>
struct Operands {
  std::vector<Number> q, k, v, scale, key_bias, weight, bias;
};

/// y^p |y| / |y^p| of one token's channels, y = (relu(x + key_bias) + eps) / scale.
template <class Number>
std::vector<Number> focus(const Shape& s, const std::vector<Number>& scale, const Number* x,
                          const Number* key_bias) {
  std::vector<Number> phi(x, x + s.channels());
  if (!s.focused) return phi;
  Number squares = 0, power_squares = 0;
  for (std::int64_t c = 0; c < s.channels(); ++c) {
    Number y = relu(key_bias ? x[c] + key_bias[c] : x[c]) + Number(s.eps);
    if (!scale.empty()) y = y / scale[c];
    phi[c] = power(y, s.focusing_factor);
    squares += y * y;
    power_squares += phi[c] * phi[c];
  }
  if (value_of(power_squares) == 0) return std::vector<Number>(s.channels(), 0);
  const Number factor = square_root(squares) / square_root(power_squares);
  for (Number& value : phi) value = value * factor;
  return phi;
}

/// Adds the depthwise convolution of one image to `out`; prefix tokens have none.
template <class Number>
void convolve(const Shape& s, const Number* x, const std::vector<Number>& weight,
              const std::vector<Number>& bias, Number* out) {
  const std::int64_t channels = s.channels(), per_window = s.rows() * s.columns();
  for (std::int64_t i = 0; i < s.windows() * per_window * channels; ++i) {
    const std::int64_t c = i % channels, window = i / channels / per_window;
    const std::int64_t y = i / channels % per_window / s.columns(), column = i / channels % s.columns();
    const std::int64_t filter = c % s.filters();
    Number sum = bias.empty() ? Number(0) : bias[filter];
    for (std::int64_t ky = 0; ky < s.kernel_h; ++ky) {
      for (std::int64_t kx = 0; kx < s.kernel_w; ++kx) {
        const std::int64_t ny = y + ky - s.kernel_h / 2, nx = column + kx - s.kernel_w / 2;
        if (ny < 0 || ny >= s.rows() || nx < 0 || nx >= s.columns()) continue;
        sum +=
            weight[(filter * s.kernel_h + ky) * s.kernel_w + kx] * x[s.token(window, ny, nx) * channels + c];
      }
    }
    out[s.token(window, y, column) * channels + c] += sum;
  }
}

/// Adds one window's attention to `out`: o = Q S / (Q . m + eps), S = K^T V / M, m = the mean of K, a head.
template <class Number>
void attend(const Shape& s, const Operands<Number>& x, std::int64_t image, std::int64_t window, Number* out) {
  const std::int64_t channels = s.channels(), dim = s.dim;
  std::vector<Number> sums(channels * dim, 0), means(channels, 0);
  for (std::int64_t j = 0; j < s.window_keys(); ++j) {
    const std::int64_t at = (image * s.key_count() + s.token(window, j)) * channels;
    const Number* key_bias = x.key_bias.empty() ? nullptr : &x.key_bias[j * channels];
    const std::vector<Number> key = focus(s, x.scale, &x.k[at], key_bias);
    for (std::int64_t c = 0; c < channels; ++c) {
      const Number share = key[c] / Number(double(s.window_keys()));
      means[c] += share;
      for (std::int64_t d = 0; d < dim; ++d) sums[c * dim + d] += share * x.v[at + c / dim * dim + d];
    }
  }
  for (std::int64_t i = 0; i < s.window_queries(); ++i) {
    const std::int64_t token = s.token(window, i);
    const std::vector<Number> query =
        focus(s, x.scale, &x.q[(image * s.query_count() + token) * channels], static_cast<Number*>(nullptr));
    for (std::int64_t h = 0; h < channels; h += dim) {
      Number norm = s.eps;
      for (std::int64_t c = h; c < h + dim; ++c) norm += query[c] * means[c];
      for (std::int64_t d = 0; d < dim; ++d) {
        Number sum = 0;
        for (std::int64_t c = h; c < h + dim; ++c) sum += query[c] * sums[c * dim + d];
        out[token * channels + h + d] += sum / norm;
      }
    }
  }
}

/// attention(q, k, v, ...): (batch, queries, channels).
template <class Number>
std::vector<Number> attention(const Shape& s, const Operands<Number>& x) {
  const std::int64_t elements = s.query_count() * s.channels();
  std::vector<Number> out(s.batch * elements, 0);
  for (std::int64_t image = 0; image < s.batch; ++image) {
    for (std::int64_t window = 0; window < s.windows(); ++window)
      attend(s, x, image, window, &out[image * elements]);
    if (s.has_taps()) convolve(s, &x.v[image * elements], x.weight, x.bias, &out[image * elements]);
  }
  return out;
}

/// depthwise_conv(v, weight, bias, ...): (batch, tokens, channels).
template <class Number>
std::vector<Number> depthwise_conv(const Shape& s, const Operands<Number>& x) {
  const std::int64_t elements = s.query_count() * s.channels();
  std::vector<Number> out(s.batch * elements, 0);
  for (std::int64_t image = 0; image < s.batch; ++image)
    convolve(s, &x.v[image * elements], x.weight, x.bias, &out[image * elements]);
  return out;
}

/// |a - b| / |b| in the Frobenius norm, or 0 where both are 0.
template <class T>
double relative_error(const T* a, const Numbers& b) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return difference == 0 ? 0 : std::sqrt(difference / norm);
}

}  // namespace scalar
