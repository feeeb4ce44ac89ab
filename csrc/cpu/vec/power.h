// Powers of vectors.
#pragma once

#include "vec.h"

namespace flatten::cpu::FLATTEN_ISA {

/// y^p for y >= 0 as 2^(p log2 y), relative error below 4e-7 for results a sum of them can notice.
/// `exponent` and `rest` are p in two floats. Zero and subnormal y give 0.
FLATTEN_INLINE FloatVec power(FloatVec y, float exponent, float rest) {
  // y = 2^e m with m in [sqrt(1/2), sqrt(2)); log2 m = 2/ln 2 atanh((m - 1) / (m + 1)).
  const IntVec bits = bit_cast<IntVec>(y);
  const IntVec shifted = bits - 0x3f3504f3;
  const FloatVec e = __builtin_convertvector(shifted >> 23, FloatVec);
  const FloatVec m = bit_cast<FloatVec>((shifted & 0x7fffff) + 0x3f3504f3);
  const FloatVec s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  FloatVec series = fma(s2, broadcast(0.3205989f), broadcast(0.4121986f));
  series = fma(s2, series, broadcast(0.5770780f));
  series = fma(s2, series, broadcast(0.9617967f));
  series = fma(s2, series, broadcast(2.8853901f));
  const FloatVec log2m = s * series;
  // p (e + log2 m) = whole + fraction; the rounding error of p e goes into the fraction.
  const FloatVec p = broadcast(exponent), pe = p * e;
  const FloatVec t = fma(p, log2m, pe);
  const FloatVec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const FloatVec clamped = t < -150.0f ? broadcast(-150.0f) : (t > 150.0f ? broadcast(150.0f) : t);
  const FloatVec whole = (clamped + magic) - magic;
  FloatVec fraction = fma(p, log2m, pe - whole) + fma(p, e, -pe);
  fraction = fma(broadcast(rest), e + log2m, fraction);
  FloatVec result = fma(fraction, broadcast(1.5252734e-5f), broadcast(1.5403530e-4f));
  result = fma(fraction, result, broadcast(1.3333558e-3f));
  result = fma(fraction, result, broadcast(9.6181291e-3f));
  result = fma(fraction, result, broadcast(5.5504109e-2f));
  result = fma(fraction, result, broadcast(2.4022651e-1f));
  result = fma(fraction, result, broadcast(6.9314718e-1f));
  result = fma(fraction, result, broadcast(1.0f));
  // Two factors, since 2^whole alone may leave the range. Out of range: 0 below, infinity above.
  const IntVec n = __builtin_convertvector(whole, IntVec), half = n >> 1;
  const FloatVec lower = bit_cast<FloatVec>((half + 127) << 23);
  const FloatVec upper = bit_cast<FloatVec>((n - half + 127) << 23);
  result = result * lower * upper;
  result = t > 129.0f ? broadcast(__builtin_inff()) : result;
  return (t < -149.0f) | (y < 1.17549435e-38f) ? FloatVec{} : result;
}

FLATTEN_INLINE DoubleVec power(DoubleVec y, double exponent, double) {
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_pow(y[i], exponent);
  return y;
}

}  // namespace flatten::cpu::FLATTEN_ISA
