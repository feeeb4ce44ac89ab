// Vectors of the instruction set this unit is compiled for, on the compiler's own vector types: arithmetic
// and comparisons are operators; what has no operator (fma, max, conversions) is a function here.
//
// A unit defines FLATTEN_ISA (see isa/unit.h). All kernel code lives in the namespace it names, so that the
// linker never replaces a function of one instruction set by its namesake of another.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

// (maskz_ forms with a full mask: the plain AVX-512 intrinsics draw false warnings from GCC 12.)
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

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

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif

/// Registers the tiles of kernels/gemm.h and kernels/taps.h may fill.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

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

/// T is an accumulate type (float or double), X a storage type.
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

/// x, loaded once: GCC otherwise reads what several operations take from memory for each of them.
FLATTEN_INLINE FloatVec in_register(FloatVec x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#endif
  return x;
}
FLATTEN_INLINE DoubleVec in_register(DoubleVec x) { return x; }

/// a * b + c, fused where the instruction set can.
FLATTEN_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
FLATTEN_INLINE DoubleVec fma(DoubleVec a, DoubleVec b, DoubleVec c) { return a * b + c; }

/// max(x, 0); a NaN stays one.
FLATTEN_INLINE FloatVec relu(FloatVec x) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), x);
#elif defined(__AVX2__)
  return _mm256_max_ps(_mm256_setzero_ps(), x);
#else
  return x < 0 ? FloatVec{} : x;
#endif
}
FLATTEN_INLINE DoubleVec relu(DoubleVec x) { return x < 0 ? DoubleVec{} : x; }

template <class V>
FLATTEN_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

FLATTEN_INLINE FloatVec square_root(FloatVec x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < kFloats; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
FLATTEN_INLINE DoubleVec square_root(DoubleVec x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

/// Sum of the lanes.
FLATTEN_INLINE float sum(FloatVec x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  __m256 halves[2];
  __builtin_memcpy(halves, &x, sizeof x);
  const __m256 y = _mm256_add_ps(halves[0], halves[1]);
#else
  const __m256 y = x;
#endif
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}
FLATTEN_INLINE double sum(DoubleVec x) {
  double s = 0;
  for (int i = 0; i < kLanes<double>; ++i) s += x[i];
  return s;
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
FLATTEN_INLINE FloatVec load(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(load_bits(&p->bits)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(bit_cast<__m128i>(load_bits(&p->bits)));
#else
  const UintVec bits = __builtin_convertvector(load_bits(&p->bits), UintVec);
  const UintVec magnitude = (bits & 0x7fff) << 13;
  // Rebias the exponent by a product, which also normalizes subnormals; infinities and NaN by hand.
  const UintVec finite = bit_cast<UintVec>(bit_cast<FloatVec>(magnitude) * 0x1p112f);
  const UintVec special = magnitude | 0x7f800000u;
  const UintVec is_special = bit_cast<UintVec>(magnitude >= 0x0f800000u);
  return bit_cast<FloatVec>((is_special & special) | (~is_special & finite) | (bits & 0x8000) << 16);
#endif
}

FLATTEN_INLINE void store(float* p, FloatVec x) { *reinterpret_cast<FloatsAt*>(p) = x; }
FLATTEN_INLINE void store(double* p, DoubleVec x) { *reinterpret_cast<DoublesAt*>(p) = x; }
FLATTEN_INLINE void store(BFloat16* p, FloatVec x) {
  const UintVec bits = bit_cast<UintVec>(x);
  const UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UintVec is_nan = bit_cast<UintVec>(x != x);
  store_bits(&p->bits, __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), HalfBits));
}
FLATTEN_INLINE void store(Float16* p, FloatVec x) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
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
  const HalfBits half =
      __builtin_convertvector((is_large & special) | (~is_large & finite) | (sign >> 16), HalfBits);
#endif
  store_bits(&p->bits, bit_cast<HalfBits>(half));
}

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

/// Whether a vector of X fills a line, so that its store need not read the rest of one.
template <class X>
constexpr bool kFillsLine = kVectorBytes == 64 && std::is_same_v<X, Accumulate<X>>;

/// Stores past the caches, where p begins a line and X fills it.
template <class X>
FLATTEN_INLINE void stream(X* p, Vec<Accumulate<X>> x) {
#if defined(__AVX512F__)
  if constexpr (kFillsLine<X>) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(x));
  }
#endif
  store(p, x);
}

/// Before other threads read what stream() stored.
FLATTEN_INLINE void finish_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// ---- Transposition.

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

// ---- Powers.

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
