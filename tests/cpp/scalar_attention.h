// Focused linear attention, one number at a time in double: what the C++ tests compare with.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace scalar {

using Numbers = std::vector<double>;

inline Numbers random(std::int64_t count, double low, double high, unsigned seed) {
  std::mt19937 bits(seed);
  Numbers x(count);
  for (double& value : x) value = low + (high - low) * (bits() / 4294967296.0);
  return x;
}

/// One image of height x width tokens, with windows and taps shared by the heads.
struct Problem {
  std::int64_t height, width, heads, dim;
  std::int64_t window_h, window_w, shift_h, shift_w;
  std::int64_t kernel_h, kernel_w;
  double focusing_factor, eps;
  Numbers q, k, v, scale, weight, bias;  // (N, C), (N, C), (N, C), (C,), (D, kh, kw), (D,)

  std::int64_t tokens() const { return height * width; }
  std::int64_t channels() const { return heads * dim; }

  /// 16 x 24 tokens, 3 heads of 20 channels, shifted windows of 8 x 12, a 5 x 3 kernel, p = 2.5: enough work
  /// for several threads.
  static Problem make() {
    Problem p{16, 24, 3, 20, 8, 12, 1, 2, 5, 3, 2.5, 1e-6, {}, {}, {}, {}, {}, {}};
    const std::int64_t elements = p.tokens() * p.channels();
    p.q = random(elements, -1, 1, 1);
    p.k = random(elements, -1, 1, 2);
    p.v = random(elements, -1, 1, 3);
    p.scale = random(p.channels(), 0.5, 2, 4);
    p.weight = random(p.dim * p.kernel_h * p.kernel_w, -0.3, 0.3, 5);
    p.bias = random(p.dim, -1, 1, 6);
    return p;
  }

  /// The token at row y, column x of window (wy, wx).
  std::int64_t token(std::int64_t wy, std::int64_t wx, std::int64_t y, std::int64_t x) const {
    return (wy * window_h + y + shift_h) % height * width + (wx * window_w + x + shift_w) % width;
  }

  /// y^p |y| / |y^p| of one token's channels, y = (relu(x) + eps) / scale.
  Numbers focus(const double* x) const {
    Numbers phi(channels());
    double squares = 0, power_squares = 0;
    for (std::int64_t c = 0; c < channels(); ++c) {
      const double y = (std::fmax(x[c], 0) + eps) / scale[c];
      phi[c] = std::pow(y, focusing_factor);
      squares += y * y;
      power_squares += phi[c] * phi[c];
    }
    for (double& value : phi) value *= std::sqrt(squares / power_squares);
    return phi;
  }

  /// Token t of the output, attending to `window` (tokens in raster order).
  void attend(std::int64_t t, const std::vector<std::int64_t>& window, double* out) const {
    const Numbers query = focus(&q[t * channels()]);
    for (std::int64_t h = 0; h < heads; ++h) {
      double norm = 0;
      for (const std::int64_t s : window) {
        const Numbers key = focus(&k[s * channels()]);
        double similarity = 0;
        for (std::int64_t d = h * dim; d < (h + 1) * dim; ++d) similarity += query[d] * key[d];
        norm += similarity / window.size();
        for (std::int64_t d = h * dim; d < (h + 1) * dim; ++d)
          out[d] += similarity / window.size() * v[s * channels() + d];
      }
      for (std::int64_t d = h * dim; d < (h + 1) * dim; ++d) out[d] /= norm + eps;
    }
  }

  /// Adds the depthwise convolution of v at (y, x) of a window.
  void convolve(std::int64_t wy, std::int64_t wx, std::int64_t y, std::int64_t x, double* out) const {
    for (std::int64_t c = 0; c < channels(); ++c) {
      out[c] += bias[c % dim];
      for (std::int64_t i = 0; i < kernel_h; ++i) {
        for (std::int64_t j = 0; j < kernel_w; ++j) {
          const std::int64_t ny = y + i - kernel_h / 2, nx = x + j - kernel_w / 2;
          if (ny < 0 || ny >= window_h || nx < 0 || nx >= window_w) continue;
          out[c] +=
              weight[(c % dim * kernel_h + i) * kernel_w + j] * v[token(wy, wx, ny, nx) * channels() + c];
        }
      }
    }
  }

  Numbers solve() const {
    Numbers out(tokens() * channels());
    for (std::int64_t wy = 0; wy < height / window_h; ++wy) {
      for (std::int64_t wx = 0; wx < width / window_w; ++wx) {
        std::vector<std::int64_t> window;
        for (std::int64_t i = 0; i < window_h * window_w; ++i)
          window.push_back(token(wy, wx, i / window_w, i % window_w));
        for (std::int64_t i = 0; i < window_h * window_w; ++i) {
          double* row = &out[window[i] * channels()];
          attend(window[i], window, row);
          convolve(wy, wx, i / window_w, i % window_w, row);
        }
      }
    }
    return out;
  }
};

/// |a - b| / |b| in the Frobenius norm.
template <class T>
double relative_error(const T* a, const Numbers& b) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(difference / norm);
}

}  // namespace scalar
