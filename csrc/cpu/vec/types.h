// The vector types of one instruction set, on the compiler's own: arithmetic and comparisons are operators.
// Included by the set's header, which defines kVectorBytes, the size of a register, before.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "../../params.h"

// Plain functions without optimization and in sanitizer builds, where forced inlining would take minutes.
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__)
#define FLATTEN_INLINE inline __attribute__((always_inline))
/// Of a lambda, behind its parameters.
#define FLATTEN_INLINED __attribute__((always_inline))
#else
#define FLATTEN_INLINE inline
#define FLATTEN_INLINED
#endif

namespace flatten::cpu::FLATTEN_ISA {

using i64 = std::int64_t;

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

constexpr int kFloats = kVectorBytes / 4;

typedef float FloatVec __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVec __attribute__((vector_size(kVectorBytes)));
typedef std::int32_t IntVec __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t UintVec __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));

// The same in memory, wherever their elements may lie. Not copied with memcpy, which could change anything:
// to the compiler these touch objects of the element's type alone.
typedef float FloatsAt __attribute__((vector_size(kVectorBytes), aligned(4)));
typedef double DoublesAt __attribute__((vector_size(kVectorBytes), aligned(8)));
typedef std::uint16_t BitsAt __attribute__((vector_size(kVectorBytes / 2), aligned(2)));

template <class T>
struct VecType;
template <>
struct VecType<float> {
  using type = FloatVec;
};
template <>
struct VecType<double> {
  using type = DoubleVec;
};

/// The vector of an accumulate type. Everywhere in the kernels T is an accumulate type (float or double) and
/// X a storage type (a dtype of tokens or parameters).
template <class T>
using Vec = typename VecType<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class X>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class X>
using Accumulate = typename AccumulateType<X>::type;

/// What params.h calls a storage type.
constexpr Dtype dtype_of(double) { return Dtype::kFloat64; }
constexpr Dtype dtype_of(float) { return Dtype::kFloat32; }
constexpr Dtype dtype_of(BFloat16) { return Dtype::kBFloat16; }
constexpr Dtype dtype_of(Float16) { return Dtype::kFloat16; }

template <int N>
struct Constant {
  static constexpr int value = N;
  constexpr operator int() const { return N; }
};

template <int... I, class Body>
FLATTEN_INLINE void for_indices(std::integer_sequence<int, I...>, const Body& body) {
  (body(Constant<I>{}), ...);
}
/// body(Constant<0>) ... body(Constant<N - 1>): a loop that is written out before the compiler decides what
/// of an array it can keep in registers.
template <int N, class Body>
FLATTEN_INLINE void unrolled(const Body& body) {
  for_indices(std::make_integer_sequence<int, N>{}, body);
}

/// body(Constant<size>), for a size of First to Last.
template <int First, int Last, class Body>
FLATTEN_INLINE void with_size(i64 size, const Body& body) {
  if constexpr (First == Last) {
    body(Constant<Last>{});
  } else if (size == First) {
    body(Constant<First>{});
  } else {
    with_size<First + 1, Last>(size, body);
  }
}

template <class To, class From>
FLATTEN_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

/// Hides where a pointer came from. Used in loops whose sums fill the registers, where GCC would otherwise
/// keep addresses, or values loaded for the next iteration, in registers too, and spill the sums.
template <class T>
FLATTEN_INLINE T* immediate_offsets(T* p) {
  asm("" : "+r"(p));
  return p;
}

template <class T>
FLATTEN_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // not a sum, which would be an instruction: -0 + 0 is 0
}

}  // namespace flatten::cpu::FLATTEN_ISA
