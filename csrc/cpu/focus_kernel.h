// phi_p of a row of tokens and its derivative.
//
//     y = (relu(x) + eps) / scale      phi = y^p |y| / |y^p|      norms over all channels
//
// A row is kept as z^p and a factor, phi = factor z^p with z = y / divisor. The divisor is 1 where the sums
// of y^2 and y^2p lie well inside the range of T, which is nearly everywhere; else the largest y of the row,
// so that nothing over- or underflows for any p.
#pragma once

#include "rows_kernel.h"

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
void fill_inverse_scale(const Mapping& mapping, const Channels& c, T* inverse_scale) {
  for (i64 h = 0; h < c.heads; ++h) {
    for (i64 d = 0; d < c.padded; ++d) {
      T s = 1;
      if (mapping.scale && d < c.dim) s = read_parameter<T>(mapping.scale, h * c.dim + d);
      inverse_scale[h * c.padded + d] = d < c.dim ? 1 / s : 0;
    }
  }
}

/// What the backward pass of a row needs besides x.
template <class T>
struct RowNorms {
  T factor;           // phi = factor z^p
  T squares, powers;  // sums of z^2 and z^2p
  T inverse_divisor;  // z = y * inverse_divisor; 0 marks a row of zeros, whose gradient is 0
};

/// y^p for the p compiled in; kP = 0 stands for any.
template <int kP, class T>
FLATTEN_INLINE Vec<T> power_p(Vec<T> y, const FocusParameters<T>& f) {
  if constexpr (kP == 1) return y;
  if constexpr (kP == 2) return y * y;
  if constexpr (kP == 3) return y * y * y;
  if constexpr (kP == 4) return (y * y) * (y * y);
  if constexpr (kP == 0) return power(y, f.p, f.p_rest);
}
template <int kP, class T>
FLATTEN_INLINE Vec<T> power_p_less_one(Vec<T> y, const FocusParameters<T>& f) {
  if constexpr (kP == 1) return broadcast(T(1));
  if constexpr (kP > 1) return power_p<kP - 1>(y, f);
  if constexpr (kP == 0) return power(y, f.p_less_one, f.p_less_one_rest);
}

template <class X>
FLATTEN_INLINE Vec<Accumulate<X>> load_at_most(const X* p, i64 count) {
  return count < kLanes<Accumulate<X>> ? load_partial(p, count) : load(p);
}

/// A row whose sums leave the safe range: y first, then z = y / max y.
template <int kP, class X, class T>
__attribute__((noinline)) RowNorms<T> focus_row_safely(const X* x, T* dst, i64 stride, const Channels& c,
                                                       const FocusParameters<T>& f) {
  Vec<T> most = {};
  for (i64 h = 0; h < c.heads; ++h) {
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      const Vec<T> xv = load_at_most(x + h * c.dim + d, c.dim - d);
      const Vec<T> y = (relu(xv) + f.eps) * load(f.inverse_scale + h * c.padded + d);
      most = larger(y, most);
      store(dst + h * stride + d, y);
    }
  }
  const T divisor = largest<T>(most);
  Vec<T> squares = {}, powers = {};
  for (i64 h = 0; h < c.heads; ++h) {
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      Vec<T> z = load(dst + h * stride + d);
      if (divisor > 0) z = z / divisor;
      const Vec<T> zp = power_p<kP, T>(z, f);
      squares = fma(z, z, squares);
      powers = fma(zp, zp, powers);
      store(dst + h * stride + d, zp);
    }
  }
  if (divisor == 0) return {0, 1, 1, 0};
  const T n = sum(squares), np = sum(powers);
  return {divisor * square_root(n / np), n, np, 1 / divisor};
}

/// Stores z^p of a row into a block (dst: its first element there).
template <int kP, class X, class T>
RowNorms<T> focus_row(const X* x, T* dst, i64 stride, const Channels& c, const FocusParameters<T>& f) {
  constexpr T kSafe = sizeof(T) == 4 ? T(1e20) : T(1e100);
  Vec<T> squares = {}, powers = {};
  const auto one_vector = [&](Vec<T> xv, i64 h, i64 d) __attribute__((always_inline)) {
    const Vec<T> y = (relu(xv) + f.eps) * load(f.inverse_scale + h * c.padded + d);
    const Vec<T> yp = power_p<kP, T>(y, f);
    if constexpr (kP != 1) {
      squares = fma(y, y, squares);
      powers = fma(yp, yp, powers);
    }
    store(dst + h * stride + d, yp);
  };
  for (i64 h = 0; h < c.heads; ++h) {
    const X* head = x + h * c.dim;
    i64 d = 0;
    for (; d + kLanes<T> <= c.dim; d += kLanes<T>) one_vector(load(head + d), h, d);
    if (d < c.dim) one_vector(load_partial(head + d, c.dim - d), h, d);
  }
  if constexpr (kP == 1) return {1, 1, 1, 1};
  const T n = sum(squares), np = sum(powers);
  const bool safe = n > 1 / kSafe && n < kSafe && np > 1 / kSafe && np < kSafe;
  if (!safe) return focus_row_safely<kP>(x, dst, stride, c, f);
  return {square_root(n / np), n, np, 1};
}

/// From r' = factor * dphi (in place in `grad`) to dx; adds dy * y, from which the gradient of scale follows,
/// to `scale_sum` (padded like a row, or null). `dot` is the sum of z^p r' over the row:
///     dy = (dot z / |z|^2 + p z^(p-1) (r' - z^p dot / |z^p|^2)) / divisor      dx = dy / scale where x > 0
template <int kP, class X, class T>
void focus_row_backward(const X* x, T* grad, i64 stride, const Channels& c, const FocusParameters<T>& f,
                        const RowNorms<T>& norms, T dot, T* scale_sum) {
  const bool alive = norms.inverse_divisor > 0;
  const T along = alive ? dot / norms.squares : 0, across = alive ? dot / norms.powers : 0;
  for (i64 h = 0; h < c.heads; ++h) {
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      const Vec<T> xv = load_at_most(x + h * c.dim + d, c.dim - d);
      const Vec<T> inverse_scale = load(f.inverse_scale + h * c.padded + d);
      const Vec<T> y = (relu(xv) + f.eps) * inverse_scale;
      const Vec<T> r = load(grad + h * stride + d);
      Vec<T> dy = r;
      if constexpr (kP != 1) {
        const Vec<T> z = y * norms.inverse_divisor;
        const Vec<T> z_less_one = power_p_less_one<kP, T>(z, f);
        const Vec<T> zp = z_less_one * z;
        dy = fma(z_less_one * f.p, r - zp * across, z * along) * norms.inverse_divisor;
        if (!alive) dy = Vec<T>{};
      }
      if (scale_sum) {
        T* s = scale_sum + h * c.padded + d;
        store(s, fma(dy, y, load(s)));
      }
      store(grad + h * stride + d, xv > 0 ? dy * inverse_scale : Vec<T>{});
    }
  }
}

/// Features that are mapped already: phi(x) = x.
template <class X, class T>
RowNorms<T> copy_row(const X* x, T* dst, i64 stride, const Channels& c, const FocusParameters<T>&) {
  pack_row(x, dst, stride, c, T(1));
  return {1, 1, 1, 1};
}
template <class X, class T>
void copy_row_backward(const X*, T*, i64, const Channels&, const FocusParameters<T>&, const RowNorms<T>&, T,
                       T*) {}

/// The row functions for one mapping.
template <class X, class T>
struct Focus {
  RowNorms<T> (*forward)(const X* x, T* dst, i64 stride, const Channels& c, const FocusParameters<T>& f);
  void (*backward)(const X* x, T* grad, i64 stride, const Channels& c, const FocusParameters<T>& f,
                   const RowNorms<T>& norms, T dot, T* scale_sum);

  template <int kP>
  static Focus make() {
    return {&focus_row<kP, X, T>, &focus_row_backward<kP, X, T>};
  }
  static Focus select(const Mapping& mapping) {
    if (!mapping.focused) return {&copy_row<X, T>, &copy_row_backward<X, T>};
    if (mapping.focusing_factor == 1) return make<1>();
    if (mapping.focusing_factor == 2) return make<2>();
    if (mapping.focusing_factor == 3) return make<3>();
    if (mapping.focusing_factor == 4) return make<4>();
    return make<0>();
  }
};

/// x + key_bias of a row, in T.
template <class X, class T>
void add_bias_row(const X* x, const Parameter& bias, i64 position, const Channels& c, T* sum_row) {
  const i64 n = c.count();
  for (i64 i = 0; i < n; i += kLanes<T>) {
    const Vec<T> y = load_at_most(x + i, n - i) + load_parameter<T>(bias, position * n + i, n - i);
    if (n - i < kLanes<T>) {
      store_partial(sum_row + i, y, n - i);
    } else {
      store(sum_row + i, y);
    }
  }
}

}  // namespace flatten::cpu::FLATTEN_ISA
