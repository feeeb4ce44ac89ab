// Vectors of 64 bytes, which are cache lines: AVX-512 with BW, DQ and VL, and the features of AVX2.
// portable.h says what the functions do. (maskz_ forms with a full mask: the plain ones draw false warnings
// from GCC 12.)
#pragma once

#include <immintrin.h>

namespace flatten::cpu::FLATTEN_ISA {

/// The size of a register.
constexpr int kVectorBytes = 64;
/// Registers that the tiles of kernels/gemm.h and kernels/taps.h may fill.
constexpr int kRegisters = 32;

}  // namespace flatten::cpu::FLATTEN_ISA

#include "types.h"

namespace flatten::cpu::FLATTEN_ISA {

FLATTEN_INLINE FloatVec in_register(FloatVec x) {
  asm("" : "+v"(x));
  return x;
}

FLATTEN_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) { return _mm512_fmadd_ps(a, b, c); }

FLATTEN_INLINE FloatVec relu(FloatVec x) { return _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), x); }

FLATTEN_INLINE FloatVec at_least(FloatVec x, FloatVec low) { return _mm512_maskz_max_ps(0xffff, low, x); }
FLATTEN_INLINE FloatVec at_most(FloatVec x, FloatVec high) { return _mm512_maskz_min_ps(0xffff, high, x); }

FLATTEN_INLINE FloatVec square_root(FloatVec x) { return _mm512_maskz_sqrt_ps(0xffff, x); }

/// 1 / x to within two units in the last place, where 1 / x and x are normal numbers; a division takes three
/// times as long.
FLATTEN_INLINE FloatVec reciprocal(FloatVec x) {
  const FloatVec near = _mm512_maskz_rcp14_ps(0xffff, x);
  return fma(near, fma(-x, near, _mm512_set1_ps(1)), near);
}

FLATTEN_INLINE float sum(FloatVec x) {
  __m256 halves[2];
  __builtin_memcpy(halves, &x, sizeof x);
  const __m256 y = _mm256_add_ps(halves[0], halves[1]);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

FLATTEN_INLINE FloatVec widen(HalfBits half) {
  return _mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(half));
}
FLATTEN_INLINE HalfBits narrow(FloatVec x) {
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return bit_cast<HalfBits>(half);
}

/// Stores a whole cache line past the caches.
template <class V>
FLATTEN_INLINE void stream_line(void* line, V x) {
  _mm512_stream_si512(static_cast<__m512i*>(line), bit_cast<__m512i>(x));
}
FLATTEN_INLINE void finish_streams() { _mm_sfence(); }

}  // namespace flatten::cpu::FLATTEN_ISA
