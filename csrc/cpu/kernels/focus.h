// phi_p of a row of tokens and its derivative.
//
//     y = (relu(x) + eps) / scale      phi = y^p |y| / |y^p|      norms over all channels
//
// A row is kept as z^p and a factor, phi = factor z^p with z = y / divisor. The divisor is 1 where the sums
// of y^2 and y^2p lie well inside the range of T, which is nearly everywhere; else the largest y of the row,
// so that nothing over- or underflows for any p.
#pragma once

#include <type_traits>

#include "../vec/power.h"
#include "rows.h"

namespace flatten::cpu::FLATTEN_ISA {

/// What Mapping says, ready for use.
template <class T>
struct FocusParameters {
  const T* inverse_scale;  // padded like a row, 0 in the padding, which makes y and y^p 0 there
  T eps, p, p_rest, p_less_one, p_less_one_rest;

  static FocusParameters make(const Mapping& mapping, double eps, const T* inverse_scale) {
    const double p = mapping.focusing_factor;
    const T high = static_cast<T>(p), high_less_one = static_cast<T>(p - 1);
    return {inverse_scale, static_cast<T>(eps),
            high,          static_cast<T>(p - high),
            high_less_one, static_cast<T>(p - 1 - high_less_one)};
  }
};

template <class T>
void fill_inverse_scale(const Mapping& mapping, Channels c, T* inverse_scale) {
  for (i64 h = 0; h < c.heads; ++h) {
    for (i64 d = 0; d < c.padded; ++d) {
      T s = 1;
      if (mapping.scale && d < c.dim) s = read_parameter<T>(mapping.scale, h * c.dim + d);
      inverse_scale[h * c.padded + d] = d < c.dim ? 1 / s : 0;
    }
  }
}

/// What is kept of every row of a block, besides z^p: phi = factor z^p with z = y * inverse_divisor, and the
/// sums of z^2 and z^2p over its channels. An inverse_divisor of 0 marks a row of zeros, whose gradient is 0.
template <class T>
struct Norms {
  T factor[kBlock], squares[kBlock], powers[kBlock], inverse_divisor[kBlock];
};

/// y^p for the p that is compiled in; kP = 0 stands for any p.
template <int kP, class T>
FLATTEN_INLINE Vec<T> power_p(Vec<T> y, FocusParameters<T> f) {
  if constexpr (kP == 1) return y;
  if constexpr (kP == 2) return y * y;
  if constexpr (kP == 3) return y * y * y;
  if constexpr (kP == 4) return (y * y) * (y * y);
  if constexpr (kP == 0) return power(y, f.p, f.p_rest);
}
template <int kP, class T>
FLATTEN_INLINE Vec<T> power_p_less_one(Vec<T> y, FocusParameters<T> f) {
  if constexpr (kP == 1) return broadcast(T(1));
  if constexpr (kP > 1) return power_p<kP - 1>(y, f);
  if constexpr (kP == 0) return power(y, f.p_less_one, f.p_less_one_rest);
}

/// The rows of key_bias that are added to a block's tokens; null data for none.
struct BiasRows {
  const void* data = nullptr;
  const i64* position = nullptr;
};
/// Stands for the element type of key_bias where there is none.
struct NoBias {};

template <class B>
FLATTEN_INLINE const B* bias_row(BiasRows bias, int t, i64 channels) {
  if constexpr (std::is_same_v<B, NoBias>) return nullptr;
  return static_cast<const B*>(bias.data) + (bias.data ? bias.position[t] * channels : 0);
}

/// The next vector of x + key_bias, of which `left` elements belong to the head. kWhole says that heads
/// consist of whole vectors.
template <bool kWhole, class X, class B>
FLATTEN_INLINE Vec<Accumulate<X>> load_input(const X* x, const B* bias, i64 at, i64 left) {
  const Vec<Accumulate<X>> xv = kWhole ? load(x + at) : load_at_most(x + at, left);
  if constexpr (std::is_same_v<B, NoBias>) {
    return xv;
  } else {
    return xv + (kWhole ? load(bias + at) : load_at_most(bias + at, left));
  }
}

/// Maps one row whose sums leave the safe range: y first, then z = y / max y.
template <int kP, class X, class B, class T>
__attribute__((noinline)) void focus_row_safely(const X* x, const B* bias, int t, T* z, Channels c,
                                                FocusParameters<T> f, Norms<T>& norms) {
  z += t * c.padded;
  Vec<T> most = {};
  for (i64 h = 0; h < c.heads; ++h) {
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      const Vec<T> xv = load_input<false>(x, bias, h * c.dim + d, c.dim - d);
      const Vec<T> inverse_scale = load(f.inverse_scale + h * c.padded + d);
      const Vec<T> y = fma(relu(xv), inverse_scale, f.eps * inverse_scale);
      most = larger(y, most);
      store(z + h * c.head_stride() + d, y);
    }
  }
  const T divisor = largest<T>(most);
  Vec<T> squares = {}, powers = {};
  for (i64 h = 0; h < c.heads; ++h) {
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      Vec<T> zd = load(z + h * c.head_stride() + d);
      if (divisor > 0) zd = zd / divisor;
      const Vec<T> zp = power_p<kP, T>(zd, f);
      squares = fma(zd, zd, squares);
      powers = fma(zp, zp, powers);
      store(z + h * c.head_stride() + d, zp);
    }
  }
  // Only a row of zeros sums to 0. NaN and infinity make the sums NaN, and so the factor and the gradient.
  const T n = sum(squares), np = sum(powers);
  const bool alive = n != 0;
  norms.squares[t] = alive ? n : 1;
  norms.powers[t] = alive ? np : 1;
  const T ratio = norms.squares[t] / norms.powers[t];
  norms.factor[t] = alive ? divisor * square_root(broadcast(ratio))[0] : 0;
  norms.inverse_divisor[t] = alive ? (n == n ? 1 / divisor : n) : 0;
}

/// y^p of R rows from row t on, and the sums of y^2 and y^2p.
template <int kP, bool kWhole, int R, class B, class X, class T>
FLATTEN_INLINE void focus_rows(const X* const* x, BiasRows bias, int t, T* z, Channels c,
                               FocusParameters<T> f, Norms<T>& norms) {
  Vec<T> squares[R] = {}, powers[R];
  const X* row[R];
  const B* row_bias[R];
  for (int r = 0; r < R; ++r) row[r] = x[t + r], row_bias[r] = bias_row<B>(bias, t + r, c.count());
  // Where x <= 0, y^2p is (eps / scale)^2p. A sum of such numbers alone would be subnormal, which costs some
  // processors 150 cycles an operation. The sums therefore start at a number that is normal, yet nothing
  // beside any sum of the safe range.
  constexpr T kStart = sizeof(T) == 4 ? T(1e-30) : T(1e-200);
  for (int r = 0; r < R; ++r) powers[r] = broadcast(kStart);
  for (i64 h = 0; h < c.heads; ++h) {
    T* zh = z + h * c.head_stride() + t * c.padded;
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      const Vec<T> inverse_scale = load(f.inverse_scale + h * c.padded + d);
      const Vec<T> least = f.eps * inverse_scale;
      unrolled<R>([&](auto r) FLATTEN_INLINED {
        const Vec<T> xv = load_input<kWhole>(row[r], row_bias[r], h * c.dim + d, c.dim - d);
        const Vec<T> y = fma(relu(xv), inverse_scale, least);
        const Vec<T> yp = power_p<kP, T>(y, f);
        squares[r] = fma(y, y, squares[r]);
        powers[r] = fma(yp, yp, powers[r]);
        store(zh + r * c.padded + d, yp);
      });
    }
  }
  if constexpr (R == 4) {
    sum_each(squares[0], squares[1], squares[2], squares[3], norms.squares + t);
    sum_each(powers[0], powers[1], powers[2], powers[3], norms.powers + t);
  } else {
    for (int r = 0; r < R; ++r) norms.squares[t + r] = sum(squares[r]), norms.powers[t + r] = sum(powers[r]);
  }
}

/// Maps the rows x of a block into the head-major block z.
template <int kP, bool kWhole, class B, class X, class T>
void focus_block(const X* const* x, BiasRows bias, int count, T* z, Channels c, FocusParameters<T> f,
                 Norms<T>& norms) {
  // The safe range of the sums, [1 / kSafe, kSafe]. Float32 ends at 1e-38 and 1e38. Beside a sum of 1e-20,
  // the terms that underflow are below 1e-18 of it. With sums up to 1e20 no y^p is above 1e10, so that a
  // product of two features leaves 1e18 for values and numbers of tokens. Float64 (1e-308, 1e308) leaves
  // more.
  constexpr T kSafe = sizeof(T) == 4 ? T(1e20) : T(1e100);
  int t = 0;
  for (; t + 4 <= count; t += 4) focus_rows<kP, kWhole, 4, B>(x, bias, t, z, c, f, norms);
  for (; t < count; ++t) focus_rows<kP, kWhole, 1, B>(x, bias, t, z, c, f, norms);
  for (t = count; t % kLanes<T> != 0; ++t) norms.squares[t] = norms.powers[t] = 1;
  bool all_safe = true;
  for (t = 0; t < kBlock && t < count; t += kLanes<T>) {
    const Vec<T> n = load(norms.squares + t), np = load(norms.powers + t);
    store(norms.factor + t, kP == 1 ? broadcast(T(1)) : square_root(n / np));
    store(norms.inverse_divisor + t, broadcast(T(1)));
    all_safe &= all_of((n > 1 / kSafe) & (n < kSafe) & (np > 1 / kSafe) & (np < kSafe));
  }
  if (kP == 1 || all_safe) return;
  for (t = 0; t < count; ++t) {
    const T n = norms.squares[t], np = norms.powers[t];
    const bool safe = n > 1 / kSafe && n < kSafe && np > 1 / kSafe && np < kSafe;
    if (!safe) focus_row_safely<kP>(x[t], bias_row<B>(bias, t, c.count()), t, z, c, f, norms);
  }
}

/// Where the gradients of a block's rows go; each may be null.
template <class X, class T>
struct RowGradients {
  X* const* dx = nullptr;      // the gradient of x, rounded to X
  T* bias_sum = nullptr;       // padded rows, one per row of key_bias: dx is added to them
  T* scale_sum = nullptr;      // a padded row: dy * y is added; the gradient of scale follows from it
  bool is_first = false;       // bias_sum holds nothing yet: dx is stored there
  bool streamed = false;       // dx is written past the caches, see is_streamed
  bool bias_streamed = false;  // so is bias_sum; only where is_first holds
};

/// The gradients of R rows from row t on, none of which is a row of zeros.
template <int kP, bool kWhole, int R, class B, class X, class T>
FLATTEN_INLINE void focus_rows_backward(const X* const* x, BiasRows bias, int t, const T* gradient,
                                        Channels c, FocusParameters<T> f, const Norms<T>& norms, const T* dot,
                                        const RowGradients<X, T>& to) {
  const X* row[R];
  const B* row_bias[R];
  T* bias_sum[R] = {};
  Vec<T> inverse_divisor[R], along[R], across[R];
  for (int r = 0; r < R; ++r) {
    row[r] = x[t + r], row_bias[r] = bias_row<B>(bias, t + r, c.count());
    if (to.bias_sum) bias_sum[r] = to.bias_sum + bias.position[t + r] * c.padded_count();
    inverse_divisor[r] = broadcast(norms.inverse_divisor[t + r]);
    along[r] = broadcast(dot[t + r] / norms.squares[t + r] * norms.inverse_divisor[t + r]);
    across[r] = broadcast(dot[t + r] / norms.powers[t + r]);
  }
  for (i64 h = 0; h < c.heads; ++h) {
    const T* head = gradient + h * c.head_stride() + t * c.padded;
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      const i64 at = h * c.padded + d, left = c.dim - d;
      const Vec<T> inverse_scale = load(f.inverse_scale + at);
      const Vec<T> least = f.eps * inverse_scale;
      Vec<T> scale_sum = to.scale_sum ? load(to.scale_sum + at) : Vec<T>{};
      unrolled<R>([&](auto r) FLATTEN_INLINED {
        const Vec<T> xv = load_input<kWhole>(row[r], row_bias[r], h * c.dim + d, left);
        const Vec<T> y = fma(relu(xv), inverse_scale, least);
        Vec<T> dy = load(head + r * c.padded + d);
        if constexpr (kP != 1) {
          const Vec<T> z = y * inverse_divisor[r];
          const Vec<T> z_less_one = power_p_less_one<kP, T>(z, f);
          const Vec<T> slope = z_less_one * (f.p * inverse_divisor[r]);
          dy = fma(slope, dy - z_less_one * z * across[r], z * along[r]);
        }
        scale_sum = fma(dy, y, scale_sum);
        const Vec<T> dx = xv <= 0 ? Vec<T>{} : dy * inverse_scale;  // NaN is neither, and handed on
        if (bias_sum[r]) {
          T* sum = bias_sum[r] + at;
          if (kFillsLine<T> && to.bias_streamed) {
            stream(sum, dx);
          } else {
            store(sum, to.is_first ? dx : load(sum) + dx);
          }
        }
        if (!to.dx) return;
        X* out = to.dx[t + r] + h * c.dim + d;
        if (kFillsLine<X> && to.streamed) {
          stream(out, dx);
        } else {
          kWhole ? store(out, dx) : store_at_most(out, dx, left);
        }
      });
      if (to.scale_sum) store(to.scale_sum + at, scale_sum);
    }
  }
}

/// The gradients of a block's rows from r = factor * dphi and dot, the sum of z^p r over each row:
///     dy = (dot z / |z|^2 + p z^(p-1) (r - z^p dot / |z^p|^2)) / divisor      dx = dy / scale where x > 0
template <int kP, bool kWhole, class B, class X, class T>
void focus_block_backward(const X* const* x, BiasRows bias, int count, const T* r, Channels c,
                          FocusParameters<T> f, const Norms<T>& norms, const T* dot,
                          const RowGradients<X, T>& to) {
  const auto alive = [&](int t) { return norms.inverse_divisor[t] != 0; };
  for (int t = 0; t < count;) {
    if (t + 2 <= count && alive(t) && alive(t + 1)) {
      focus_rows_backward<kP, kWhole, 2, B>(x, bias, t, r, c, f, norms, dot, to);
      t += 2;
      continue;
    }
    if (alive(t)) {
      focus_rows_backward<kP, kWhole, 1, B>(x, bias, t, r, c, f, norms, dot, to);
    } else {
      if (to.dx) set_zero(to.dx[t], c.count());
      if (to.bias_sum && to.is_first)
        set_zero(to.bias_sum + bias.position[t] * c.padded_count(), c.padded_count());
    }
    ++t;
  }
}

/// Features that are mapped already: phi(x) = x.
template <class X, class T>
void copy_block(const X* const* x, BiasRows, int count, T* z, Channels c, FocusParameters<T>,
                Norms<T>& norms) {
  for (int t = 0; t < count; ++t) {
    for (i64 h = 0; h < c.heads; ++h) {
      pack(x[t] + h * c.dim, z + h * c.head_stride() + t * c.padded, c.dim, T(1));
    }
    norms.factor[t] = norms.squares[t] = norms.powers[t] = norms.inverse_divisor[t] = 1;
  }
}
template <class X, class T>
void copy_block_backward(const X* const*, BiasRows, int count, const T* r, Channels c, FocusParameters<T>,
                         const Norms<T>&, const T*, const RowGradients<X, T>& to) {
  for (int t = 0; to.dx && t < count; ++t) {
    for (i64 h = 0; h < c.heads; ++h) {
      unpack(r + h * c.head_stride() + t * c.padded, to.dx[t] + h * c.dim, c.dim);
    }
  }
}

/// The functions for one mapping of rows of X.
template <class X, class T>
struct Focus {
  void (*forward)(const X* const* x, BiasRows bias, int count, T* z, Channels c, FocusParameters<T> f,
                  Norms<T>& norms);
  void (*backward)(const X* const* x, BiasRows bias, int count, const T* r, Channels c, FocusParameters<T> f,
                   const Norms<T>& norms, const T* dot, const RowGradients<X, T>& to);

  template <int kP, bool kWhole, class B>
  static Focus make() {
    return {&focus_block<kP, kWhole, B, X, T>, &focus_block_backward<kP, kWhole, B, X, T>};
  }
  template <bool kWhole, class B>
  static Focus of_power(double p) {
    if (p == 1) return make<1, kWhole, B>();
    if (p == 2) return make<2, kWhole, B>();
    if (p == 3) return make<3, kWhole, B>();
    if (p == 4) return make<4, kWhole, B>();
    return make<0, kWhole, B>();
  }
  template <class B>
  static Focus of_width(double p, Channels c) {
    return c.dim == c.padded ? of_power<true, B>(p) : of_power<false, B>(p);
  }
  static Focus select(const Mapping& mapping, const Parameter& bias, Channels c) {
    if (mapping.map == FeatureMap::kNone) return {&copy_block<X, T>, &copy_block_backward<X, T>};
    if (!bias) return of_width<NoBias>(mapping.focusing_factor, c);
    if (bias.dtype == dtype_of(T{})) return of_width<T>(mapping.focusing_factor, c);
    if (bias.dtype == dtype_of(X{})) return of_width<X>(mapping.focusing_factor, c);
    refuse_dtype();  // neither the tokens' dtype nor the one they accumulate in
  }
};

}  // namespace flatten::cpu::FLATTEN_ISA
