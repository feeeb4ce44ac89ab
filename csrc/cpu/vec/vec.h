// Vectors of the instruction set this unit is compiled for. What has no operator (fma, max, conversions) is a
// function: of floats in the header of the set, the rest here.
//
// A unit defines FLATTEN_ISA (see isa/unit.h). All kernel code lives in the namespace it names, so that the
// linker never replaces a function of one instruction set by its namesake of another.
#pragma once

#if defined(__AVX512F__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#elif defined(__aarch64__)
#include "neon.h"
#else
#include "portable.h"
#endif

namespace flatten::cpu::FLATTEN_ISA {

// ---- Doubles: see the functions of floats.

FLATTEN_INLINE DoubleVec in_register(DoubleVec x) { return x; }
FLATTEN_INLINE DoubleVec fma(DoubleVec a, DoubleVec b, DoubleVec c) { return a * b + c; }
FLATTEN_INLINE DoubleVec relu(DoubleVec x) { return x < 0 ? DoubleVec{} : x; }
FLATTEN_INLINE DoubleVec at_most(DoubleVec x, DoubleVec high) { return x > high ? high : x; }
FLATTEN_INLINE DoubleVec reciprocal(DoubleVec x) { return 1 / x; }
FLATTEN_INLINE DoubleVec square_root(DoubleVec x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}
FLATTEN_INLINE double sum(DoubleVec x) {
  double s = 0;
  for (int i = 0; i < kLanes<double>; ++i) s += x[i];
  return s;
}

// ---- Floats and doubles.

template <class V>
FLATTEN_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

/// Whether every lane of a comparison holds.
template <class Mask>
FLATTEN_INLINE bool all_of(Mask mask) {
  std::int64_t parts[sizeof(Mask) / 8], all = -1;
  __builtin_memcpy(parts, &mask, sizeof mask);
  for (const std::int64_t part : parts) all &= part;
  return all == -1;
}

template <class T>
FLATTEN_INLINE T largest(Vec<T> x) {
  T m = x[0];
  for (int i = 1; i < kLanes<T>; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// ---- Storage types: kLanes<T> adjacent elements to and from one Vec<T>.

FLATTEN_INLINE FloatVec load(const float* p) { return *reinterpret_cast<const FloatsAt*>(p); }
FLATTEN_INLINE DoubleVec load(const double* p) { return *reinterpret_cast<const DoublesAt*>(p); }
FLATTEN_INLINE HalfBits load_bits(const std::uint16_t* p) { return *reinterpret_cast<const BitsAt*>(p); }
FLATTEN_INLINE void store_bits(std::uint16_t* p, HalfBits x) { *reinterpret_cast<BitsAt*>(p) = x; }
FLATTEN_INLINE FloatVec load(const BFloat16* p) {
  return bit_cast<FloatVec>(__builtin_convertvector(load_bits(&p->bits), UintVec) << 16);
}
FLATTEN_INLINE FloatVec load(const Float16* p) { return widen(load_bits(&p->bits)); }

FLATTEN_INLINE void store(float* p, FloatVec x) { *reinterpret_cast<FloatsAt*>(p) = x; }
FLATTEN_INLINE void store(double* p, DoubleVec x) { *reinterpret_cast<DoublesAt*>(p) = x; }
FLATTEN_INLINE void store(BFloat16* p, FloatVec x) {
  const UintVec bits = bit_cast<UintVec>(x);
  const UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UintVec is_nan = bit_cast<UintVec>(x != x);
  store_bits(&p->bits, __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), HalfBits));
}
FLATTEN_INLINE void store(Float16* p, FloatVec x) { store_bits(&p->bits, narrow(x)); }

/// The first `count` < kLanes elements; the others read as 0 and are not written.
template <class X>
FLATTEN_INLINE auto load_partial(const X* p, i64 count) {
  X buffer[kLanes<Accumulate<X>>] = {};
  __builtin_memcpy(buffer, p, static_cast<std::size_t>(count) * sizeof(X));
  return load(buffer);
}
template <class X>
FLATTEN_INLINE void store_partial(X* p, Vec<Accumulate<X>> x, i64 count) {
  X buffer[kLanes<Accumulate<X>>];
  store(buffer, x);
  __builtin_memcpy(p, buffer, static_cast<std::size_t>(count) * sizeof(X));
}

// ---- Stores past the caches.

/// Whether a vector of X fills a cache line. Only then does a store past the caches write whole lines; of
/// others the memory would have to read the rest first.
template <class X>
constexpr bool kFillsLine = kVectorBytes == 64 && std::is_same_v<X, Accumulate<X>>;

/// Stores past the caches, where p begins a line and X fills it.
template <class X>
FLATTEN_INLINE void stream(X* p, Vec<Accumulate<X>> x) {
  if constexpr (kFillsLine<X>) {
    stream_line(p, x);
  } else {
    store(p, x);
  }
}

}  // namespace flatten::cpu::FLATTEN_ISA
