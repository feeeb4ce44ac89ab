// Vectors of 16 bytes for aarch64, every processor of which has NEON with fused products and conversions of
// float16. portable.h says what the functions do.
#pragma once

#include <arm_neon.h>

namespace flatten::cpu::FLATTEN_ISA {

/// The size of a register.
constexpr int kVectorBytes = 16;
/// Registers that the tiles of kernels/gemm.h and kernels/taps.h may fill.
constexpr int kRegisters = 32;

}  // namespace flatten::cpu::FLATTEN_ISA

#include "types.h"

namespace flatten::cpu::FLATTEN_ISA {

FLATTEN_INLINE FloatVec in_register(FloatVec x) { return x; }

FLATTEN_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) {
  return bit_cast<FloatVec>(
      vfmaq_f32(bit_cast<float32x4_t>(c), bit_cast<float32x4_t>(a), bit_cast<float32x4_t>(b)));
}

FLATTEN_INLINE FloatVec at_least(FloatVec x, FloatVec low) { return x < low ? low : x; }
FLATTEN_INLINE FloatVec at_most(FloatVec x, FloatVec high) { return x > high ? high : x; }

FLATTEN_INLINE FloatVec relu(FloatVec x) {
  return bit_cast<FloatVec>(vmaxq_f32(bit_cast<float32x4_t>(x), vdupq_n_f32(0)));
}

FLATTEN_INLINE FloatVec reciprocal(FloatVec x) { return 1 / x; }

FLATTEN_INLINE FloatVec square_root(FloatVec x) {
  return bit_cast<FloatVec>(vsqrtq_f32(bit_cast<float32x4_t>(x)));
}

FLATTEN_INLINE float sum(FloatVec x) { return vaddvq_f32(bit_cast<float32x4_t>(x)); }

FLATTEN_INLINE FloatVec widen(HalfBits half) {
  return bit_cast<FloatVec>(vcvt_f32_f16(bit_cast<float16x4_t>(half)));
}
FLATTEN_INLINE HalfBits narrow(FloatVec x) {
  return bit_cast<HalfBits>(vcvt_f16_f32(bit_cast<float32x4_t>(x)));
}

FLATTEN_INLINE void finish_streams() {}

}  // namespace flatten::cpu::FLATTEN_ISA
