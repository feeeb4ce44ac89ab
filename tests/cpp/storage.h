// Tensors of every dtype for tests: numbers rounded into memory and read back one at a time, by arithmetic
// that shares nothing with the kernels' conversions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "params.h"

namespace scalar {

using flatten::Dtype;

/// x in 16 bits of which `exponent_bits` are the exponent: rounded to nearest, ties to even.
inline std::uint16_t encode16(double x, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int sign = std::signbit(x) ? 0x8000 : 0, infinity = ((1 << exponent_bits) - 1) << mantissa_bits;
  if (std::isnan(x)) return static_cast<std::uint16_t>(infinity + 1);
  if (std::fabs(x) >= std::ldexp(1, bias + 1)) return static_cast<std::uint16_t>(sign + infinity);
  int exponent = 0;
  std::frexp(x, &exponent);  // |x| < 2^exponent
  const int last_bit = std::max(exponent - 1, 1 - bias) - mantissa_bits;
  const int units = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(x), -last_bit)));
  // A normal number's units hold its leading 1, which adds the missing 1 of the exponent.
  const int bits = x == 0 ? 0 : ((last_bit + mantissa_bits + bias - 1) << mantissa_bits) + units;
  return static_cast<std::uint16_t>(sign + bits);
}

inline double decode16(std::uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7fff) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  const int units = exponent == 0 ? mantissa : mantissa + (1 << mantissa_bits);
  return sign * std::ldexp(units, std::max(exponent, 1) - bias - mantissa_bits);
}

inline int exponent_bits(Dtype dtype) { return dtype == Dtype::kFloat16 ? 5 : 8; }

/// Memory of `count` numbers that nobody has written yet.
class Buffer {
 public:
  Buffer(Dtype dtype, std::int64_t count)
      : dtype_(dtype), bytes_(static_cast<std::size_t>(count * flatten::element_size(dtype)), kUnwritten) {}

  std::int64_t count() const { return static_cast<std::int64_t>(bytes_.size()) / size(); }
  Dtype dtype() const { return dtype_; }
  void* data() { return bytes_.data(); }
  /// The same for two buffers of the same bytes.
  bool operator==(const Buffer& other) const { return bytes_ == other.bytes_; }

  double operator[](std::int64_t i) const {
    switch (dtype_) {
      case Dtype::kFloat64:
        return read<double>(i);
      case Dtype::kFloat32:
        return read<float>(i);
      case Dtype::kBFloat16:
      case Dtype::kFloat16:
        return decode16(read<std::uint16_t>(i), exponent_bits(dtype_));
    }
    std::abort();
  }
  void set(std::int64_t i, double x) {
    switch (dtype_) {
      case Dtype::kFloat64:
        return write(i, x);
      case Dtype::kFloat32:
        return write(i, static_cast<float>(x));
      case Dtype::kBFloat16:
      case Dtype::kFloat16:
        return write(i, encode16(x, exponent_bits(dtype_)));
    }
  }
  std::uint16_t bits16(std::int64_t i) const { return read<std::uint16_t>(i); }
  void set_bits16(std::int64_t i, std::uint16_t bits) { write(i, bits); }
  bool is_unwritten(std::int64_t i) const {
    return std::all_of(bytes_.begin() + i * size(), bytes_.begin() + (i + 1) * size(),
                       [](unsigned char byte) { return byte == kUnwritten; });
  }

 private:
  static constexpr unsigned char kUnwritten = 0xa5;
  std::int64_t size() const { return flatten::element_size(dtype_); }
  template <class X>
  X read(std::int64_t i) const {
    X x;
    std::memcpy(&x, bytes_.data() + i * size(), sizeof x);
    return x;
  }
  template <class X>
  void write(std::int64_t i, X x) {
    std::memcpy(bytes_.data() + i * size(), &x, sizeof x);
  }

  Dtype dtype_;
  std::vector<unsigned char> bytes_;
};

/// A (batch, token, channel) tensor whose rows and images may lie `gap` elements apart.
class TokenBuffer {
 public:
  TokenBuffer(Dtype dtype, std::int64_t batch, std::int64_t tokens, std::int64_t channels, std::int64_t gap)
      : buffer(dtype, batch * (tokens * (channels + gap) + gap)),
        batch_(batch),
        tokens_(tokens),
        channels_(channels),
        token_stride_(channels + gap),
        batch_stride_(tokens * (channels + gap) + gap) {}

  void fill(const std::vector<double>& numbers) {
    for (std::int64_t i = 0; i < count(); ++i) buffer.set(at(i), numbers[i]);
  }
  std::vector<double> numbers() const {
    std::vector<double> x(count());
    for (std::int64_t i = 0; i < count(); ++i) x[i] = buffer[at(i)];
    return x;
  }
  /// Whether nothing was written between the rows.
  bool gaps_are_unwritten() const {
    for (std::int64_t i = 0; i < buffer.count(); ++i) {
      const std::int64_t in_image = i % batch_stride_;
      const bool in_row = in_image < tokens_ * token_stride_ && in_image % token_stride_ < channels_;
      if (!in_row && !buffer.is_unwritten(i)) return false;
    }
    return true;
  }
  operator flatten::Tokens() { return {buffer.data(), batch_stride_, token_stride_}; }
  operator flatten::MutableTokens() { return {buffer.data(), batch_stride_, token_stride_}; }

  Buffer buffer;

 private:
  std::int64_t count() const { return batch_ * tokens_ * channels_; }
  std::int64_t at(std::int64_t i) const {
    return i / channels_ / tokens_ * batch_stride_ + i / channels_ % tokens_ * token_stride_ + i % channels_;
  }
  std::int64_t batch_, tokens_, channels_, token_stride_, batch_stride_;
};

}  // namespace scalar
