// Exponentials and sigmoids of vectors, and the lanes of pairs.
#pragma once

#include "power.h"

namespace flatten::cpu::FLATTEN_ISA {

/// e^x for x <= 0, relative error below 2e-7. What would be subnormal is the least normal number: a sum over
/// such keys still has their direction. A NaN stays one.
FLATTEN_INLINE FloatVec exponential(FloatVec x) {
  // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two floats, of which n times the first is exact.
  const FloatVec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const FloatVec c = at_least(x, broadcast(-87.33654f));
  const FloatVec shifted = fma(c, broadcast(1.44269504f), magic);
  const FloatVec n = shifted - magic;
  const FloatVec r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), c));
  // e^r = 1 + r + r^2 q(r), the minimax q of degree 4.
  FloatVec q = fma(r, broadcast(1.3814598e-3f), broadcast(8.3687167e-3f));
  q = fma(r, q, broadcast(4.1668389e-2f));
  q = fma(r, q, broadcast(1.66665211e-1f));
  q = fma(r, q, broadcast(4.9999994e-1f));
  q = fma(r * r, q, r + 1.0f);
  return bit_cast<FloatVec>(bit_cast<UintVec>(q) + (bit_cast<UintVec>(shifted) << 23));  // times 2^n
}
FLATTEN_INLINE DoubleVec exponential(DoubleVec x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

/// 1 / (1 + e^-x) and, in `rest`, 1 less that.
template <class V>
FLATTEN_INLINE V sigmoid(V x, V& rest) {
  const V power = exponential(x < 0 ? x : -x), larger = reciprocal(1 + power), smaller = power * larger;
  rest = x < 0 ? larger : smaller;
  return x < 0 ? smaller : larger;
}

/// Lanes 2i and 2i + 1 of every pair: exchanged, or both the first, or both the second.
#if defined(__clang__)
template <class V, int... I>
FLATTEN_INLINE V swap_pairs(V x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I ^ 1)...);
}
template <class V, int... I>
FLATTEN_INLINE V first_of_pairs(V x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I & ~1)...);
}
template <class V, int... I>
FLATTEN_INLINE V second_of_pairs(V x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I | 1)...);
}
#else
typedef std::int64_t LongVec __attribute__((vector_size(kVectorBytes)));
template <class V>
using Lanes = std::conditional_t<std::is_same_v<V, FloatVec>, IntVec, LongVec>;
template <class V, int... I>
FLATTEN_INLINE V swap_pairs(V x, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(x, Lanes<V>{(I ^ 1)...});
}
template <class V, int... I>
FLATTEN_INLINE V first_of_pairs(V x, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(x, Lanes<V>{(I & ~1)...});
}
template <class V, int... I>
FLATTEN_INLINE V second_of_pairs(V x, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(x, Lanes<V>{(I | 1)...});
}
#endif
template <class T>
using LaneNumbers = std::make_integer_sequence<int, kLanes<T>>;

/// -1 in the first lane of every pair and 1 in the second.
template <class T, int... I>
FLATTEN_INLINE Vec<T> pair_signs(std::integer_sequence<int, I...>) {
  return Vec<T>{(I & 1 ? T(1) : T(-1))...};
}

}  // namespace flatten::cpu::FLATTEN_ISA
