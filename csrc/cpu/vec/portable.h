// Vectors of 16 bytes for every compiler and processor: what the compiler makes of its own vector types, on
// x86-64 SSE2. The headers of the other sets define the same functions.
#pragma once

namespace flatten::cpu::FLATTEN_ISA {

/// The size of a register.
constexpr int kVectorBytes = 16;
/// Registers that the tiles of kernels/gemm.h and kernels/taps.h may fill.
constexpr int kRegisters = 16;

}  // namespace flatten::cpu::FLATTEN_ISA

#include "types.h"

namespace flatten::cpu::FLATTEN_ISA {

/// x, loaded once: with AVX-512 GCC would read an operand of several operations from memory for each of them.
FLATTEN_INLINE FloatVec in_register(FloatVec x) { return x; }

/// a * b + c, fused where the instruction set can.
FLATTEN_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) { return a * b + c; }

/// max(x, 0); a NaN stays one.
FLATTEN_INLINE FloatVec relu(FloatVec x) { return x < 0 ? FloatVec{} : x; }

/// The larger of x and low, the smaller of x and high; a NaN in x stays one.
FLATTEN_INLINE FloatVec at_least(FloatVec x, FloatVec low) { return x < low ? low : x; }
FLATTEN_INLINE FloatVec at_most(FloatVec x, FloatVec high) { return x > high ? high : x; }

FLATTEN_INLINE FloatVec reciprocal(FloatVec x) { return 1 / x; }

FLATTEN_INLINE FloatVec square_root(FloatVec x) {
  for (int i = 0; i < kFloats; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

/// Sum of the lanes.
FLATTEN_INLINE float sum(FloatVec x) { return (x[0] + x[2]) + (x[1] + x[3]); }

/// float16 to float32.
FLATTEN_INLINE FloatVec widen(HalfBits half) {
  const UintVec bits = __builtin_convertvector(half, UintVec);
  const UintVec magnitude = (bits & 0x7fff) << 13;
  // Rebias the exponent by a product, which also normalizes subnormals; infinities and NaN by hand.
  const UintVec finite = bit_cast<UintVec>(bit_cast<FloatVec>(magnitude) * 0x1p112f);
  const UintVec special = magnitude | 0x7f800000u;
  const UintVec is_special = bit_cast<UintVec>(magnitude >= 0x0f800000u);
  return bit_cast<FloatVec>((is_special & special) | (~is_special & finite) | (bits & 0x8000) << 16);
}

/// float32 to float16, to nearest, ties to even.
FLATTEN_INLINE HalfBits narrow(FloatVec x) {
  const UintVec bits = bit_cast<UintVec>(x), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  // Normal: rebias and round to nearest even. Subnormal: let an addition shift and round. Large: infinity.
  const UintVec normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const UintVec small =
      bit_cast<UintVec>(bit_cast<FloatVec>(magnitude) + 0.5f) - bit_cast<UintVec>(broadcast(0.5f));
  const UintVec is_small = bit_cast<UintVec>(magnitude < (113u << 23));
  const UintVec is_large = bit_cast<UintVec>(magnitude >= (143u << 23));
  const UintVec is_nan = bit_cast<UintVec>(magnitude > 0x7f800000u);
  const UintVec finite = (is_small & small) | (~is_small & normal);
  const UintVec special = 0x7c00u | (is_nan & 0x200u);
  return __builtin_convertvector((is_large & special) | (~is_large & finite) | (sign >> 16), HalfBits);
}

/// Before other threads read what stream() stored: nothing to do where no vector fills a cache line.
FLATTEN_INLINE void finish_streams() {}

}  // namespace flatten::cpu::FLATTEN_ISA
