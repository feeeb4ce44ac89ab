// Vectors of 32 bytes: AVX2, FMA and F16C. portable.h says what the functions do.
#pragma once

#include <immintrin.h>

namespace flatten::cpu::FLATTEN_ISA {

/// The size of a register.
constexpr int kVectorBytes = 32;
/// Registers that the tiles of kernels/gemm.h and kernels/taps.h may fill.
constexpr int kRegisters = 16;

}  // namespace flatten::cpu::FLATTEN_ISA

#include "types.h"

namespace flatten::cpu::FLATTEN_ISA {

FLATTEN_INLINE FloatVec in_register(FloatVec x) { return x; }

FLATTEN_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) { return _mm256_fmadd_ps(a, b, c); }

FLATTEN_INLINE FloatVec relu(FloatVec x) { return _mm256_max_ps(_mm256_setzero_ps(), x); }

FLATTEN_INLINE FloatVec at_least(FloatVec x, FloatVec low) { return _mm256_max_ps(low, x); }
FLATTEN_INLINE FloatVec at_most(FloatVec x, FloatVec high) { return _mm256_min_ps(high, x); }

FLATTEN_INLINE FloatVec reciprocal(FloatVec x) { return 1 / x; }

FLATTEN_INLINE FloatVec square_root(FloatVec x) { return _mm256_sqrt_ps(x); }

FLATTEN_INLINE float sum(FloatVec x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

FLATTEN_INLINE FloatVec widen(HalfBits half) { return _mm256_cvtph_ps(bit_cast<__m128i>(half)); }
FLATTEN_INLINE HalfBits narrow(FloatVec x) {
  return bit_cast<HalfBits>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

FLATTEN_INLINE void finish_streams() {}

}  // namespace flatten::cpu::FLATTEN_ISA
