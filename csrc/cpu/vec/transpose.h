// Squares of floats to their transpose, and the sums of several vectors' lanes at once.
#pragma once

#include "vec.h"

namespace flatten::cpu::FLATTEN_ISA {

/// Lanes J of a and b laid end to end.
template <int... J>
FLATTEN_INLINE FloatVec shuffle(FloatVec a, FloatVec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, J...);
#else
  return __builtin_shuffle(a, b, IntVec{J...});
#endif
}

/// Swaps lane j + kStep of a with lane j of b, for every j without the bit kStep.
template <int kStep, int... J>
FLATTEN_INLINE void swap_lanes(FloatVec& a, FloatVec& b, std::integer_sequence<int, J...>) {
  const FloatVec low = shuffle<(J & kStep ? kFloats + J - kStep : J)...>(a, b);
  b = shuffle<(J & kStep ? kFloats + J : J + kStep)...>(a, b);
  a = low;
}

/// A square of kFloats rows to its transpose.
template <int kStep = 1>
FLATTEN_INLINE void transpose_square(FloatVec (&rows)[kFloats]) {
#pragma GCC unroll 16
  for (int i = 0; i < kFloats; ++i) {
    if (!(i & kStep)) swap_lanes<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kFloats>{});
  }
  if constexpr (2 * kStep < kFloats) transpose_square<2 * kStep>(rows);
}

template <int kStep, int N>
FLATTEN_INLINE void add_lanes(FloatVec (&x)[N]) {
  unrolled<N / 2 / kStep>([&](auto block) FLATTEN_INLINED {
    constexpr int i = block * 2 * kStep;
    swap_lanes<kStep>(x[i], x[i + kStep], std::make_integer_sequence<int, kFloats>{});
    x[i] = x[i] + x[i + kStep];
  });
  if constexpr (2 * kStep < N) add_lanes<2 * kStep>(x);
}

/// sums[i] = sum(x[i]), four at once: a third of the work of one after the other.
FLATTEN_INLINE void sum_each(const FloatVec& a, const FloatVec& b, const FloatVec& c, const FloatVec& d,
                             float* sums) {
  FloatVec x[4] = {a, b, c, d};
  add_lanes<1>(x);  // lane i of every four is now a part of sums[i]
  typedef float Four __attribute__((vector_size(16), aligned(4)));
  Four parts[kFloats / 4], total;
  __builtin_memcpy(parts, x, sizeof parts);
  if constexpr (kFloats == 16) {
    total = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  } else if constexpr (kFloats == 8) {
    total = parts[0] + parts[1];
  } else {
    total = parts[0];
  }
  *reinterpret_cast<Four*>(sums) = total;
}
FLATTEN_INLINE void sum_each(const DoubleVec& a, const DoubleVec& b, const DoubleVec& c, const DoubleVec& d,
                             double* sums) {
  sums[0] = sum(a), sums[1] = sum(b), sums[2] = sum(c), sums[3] = sum(d);
}

/// sums[t] = sum(row(t)) for t < count.
template <class T, class RowVector>
FLATTEN_INLINE void sum_rows(int count, T* sums, const RowVector& row) {
  int t = 0;
  for (; t + 4 <= count; t += 4) sum_each(row(t), row(t + 1), row(t + 2), row(t + 3), sums + t);
  for (; t < count; ++t) sums[t] = sum(row(t));
}

}  // namespace flatten::cpu::FLATTEN_ISA
