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
void fill_inverse_scale(const Mapping& mapping, Channels c, T* inverse_scale) {
  for (i64 h = 0; h < c.heads; ++h) {
    for (i64 d = 0; d < c.padded; ++d) {
      T s = 1;
      if (mapping.scale && d < c.dim) s = read_parameter<T>(mapping.scale, h * c.dim + d);
      inverse_scale[h * c.padded + d] = d < c.dim ? 1 / s : 0;
    }
  }
}

/// Of every row of a block: phi = factor z^p with z = y * inverse_divisor, and the sums of z^2 and z^2p. An
/// inverse_divisor of 0 marks a row of zeros, whose gradient is 0.
template <class T>
struct Norms {
  T factor[kBlock], squares[kBlock], powers[kBlock], inverse_divisor[kBlock];
};

/// y^p for the p compiled in; kP = 0 stands for any.
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

/// A row whose sums leave the safe range: y first, then z = y / max y.
template <int kP, class X, class T>
__attribute__((noinline)) void focus_row_safely(const X* x, int t, T* z, Channels c, FocusParameters<T> f,
                                                Norms<T>& norms) {
  z += t * c.padded;
  Vec<T> most = {};
  for (i64 h = 0; h < c.heads; ++h) {
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      const Vec<T> xv = load_at_most(x + h * c.dim + d, c.dim - d);
      const Vec<T> y = (relu(xv) + f.eps) * load(f.inverse_scale + h * c.padded + d);
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
  const bool alive = divisor > 0;
  norms.squares[t] = alive ? sum(squares) : 1;
  norms.powers[t] = alive ? sum(powers) : 1;
  const T ratio = norms.squares[t] / norms.powers[t];
  norms.factor[t] = alive ? divisor * square_root(broadcast(ratio))[0] : 0;
  norms.inverse_divisor[t] = alive ? 1 / divisor : 0;
}

/// y^p of R rows from row t on, and the sums of y^2 and y^2p.
template <int kP, int R, class X, class T>
FLATTEN_INLINE void focus_rows(const X* const* x, int t, T* z, Channels c, FocusParameters<T> f,
                               Norms<T>& norms) {
  Vec<T> squares[R] = {}, powers[R] = {};
  for (i64 h = 0; h < c.heads; ++h) {
    T* zh = z + h * c.head_stride() + t * c.padded;
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      const Vec<T> inverse_scale = load(f.inverse_scale + h * c.padded + d);
      for (int r = 0; r < R; ++r) {
        const Vec<T> xv = load_at_most(x[t + r] + h * c.dim + d, c.dim - d);
        const Vec<T> y = (relu(xv) + f.eps) * inverse_scale;
        const Vec<T> yp = power_p<kP, T>(y, f);
        squares[r] = fma(y, y, squares[r]);
        powers[r] = fma(yp, yp, powers[r]);
        store(zh + r * c.padded + d, yp);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    norms.squares[t + r] = sum(squares[r]);
    norms.powers[t + r] = sum(powers[r]);
  }
}

/// Maps the rows x of a block into the head-major block z.
template <int kP, class X, class T>
void focus_block(const X* const* x, int count, T* z, Channels c, FocusParameters<T> f, Norms<T>& norms) {
  constexpr T kSafe = sizeof(T) == 4 ? T(1e20) : T(1e100);
  int t = 0;
  for (; t + 2 <= count; t += 2) focus_rows<kP, 2>(x, t, z, c, f, norms);
  if (t < count) focus_rows<kP, 1>(x, t, z, c, f, norms);
  for (t = count; t % kLanes<T> != 0; ++t) norms.squares[t] = norms.powers[t] = 1;
  for (t = 0; t < kBlock && t < count; t += kLanes<T>) {
    const Vec<T> ratio = load(norms.squares + t) / load(norms.powers + t);
    store(norms.factor + t, kP == 1 ? broadcast(T(1)) : square_root(ratio));
    store(norms.inverse_divisor + t, broadcast(T(1)));
  }
  for (t = 0; kP != 1 && t < count; ++t) {
    const T n = norms.squares[t], np = norms.powers[t];
    const bool safe = n > 1 / kSafe && n < kSafe && np > 1 / kSafe && np < kSafe;
    if (!safe) focus_row_safely<kP>(x[t], t, z, c, f, norms);
  }
}

/// Where the gradient of a row goes, besides scale: each may be null.
template <class X, class T>
struct RowGradient {
  X* dx;         // rounded and stored
  T* bias_sum;   // dx added, padded like a row
  T* scale_sum;  // dy y added, padded like a row; the gradient of scale follows from it
};

/// The gradient of row t from r = factor * dphi and dot, the sum of z^p r over the row:
///     dy = (dot z / |z|^2 + p z^(p-1) (r - z^p dot / |z^p|^2)) / divisor      dx = dy / scale where x > 0
template <int kP, class X, class O, class T>
void focus_row_backward(const X* x, int t, const T* r, Channels c, FocusParameters<T> f,
                        const Norms<T>& norms, T dot, RowGradient<O, T> gradient) {
  const T inverse_divisor = norms.inverse_divisor[t];
  const bool alive = inverse_divisor > 0;
  const T along = alive ? dot / norms.squares[t] : 0, across = alive ? dot / norms.powers[t] : 0;
  r += t * c.padded;
  for (i64 h = 0; h < c.heads; ++h) {
    const T* rh = r + h * c.head_stride();
    const i64 row = h * c.padded;
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      const Vec<T> xv = load_at_most(x + h * c.dim + d, c.dim - d);
      const Vec<T> inverse_scale = load(f.inverse_scale + row + d);
      const Vec<T> y = (relu(xv) + f.eps) * inverse_scale;
      Vec<T> dy = load(rh + d);
      if constexpr (kP != 1) {
        const Vec<T> z = y * inverse_divisor;
        const Vec<T> z_less_one = power_p_less_one<kP, T>(z, f);
        dy = fma(z_less_one * f.p, dy - z_less_one * z * across, z * along) * inverse_divisor;
        if (!alive) dy = Vec<T>{};
      }
      if (gradient.scale_sum) {
        T* s = gradient.scale_sum + row + d;
        store(s, fma(dy, y, load(s)));
      }
      const Vec<T> dx = xv > 0 ? dy * inverse_scale : Vec<T>{};
      if (gradient.bias_sum) {
        T* s = gradient.bias_sum + row + d;
        store(s, load(s) + dx);
      }
      if (gradient.dx) store_at_most(gradient.dx + h * c.dim + d, dx, c.dim - d);
    }
  }
}

/// Features that are mapped already: phi(x) = x.
template <class X, class T>
void copy_block(const X* const* x, int count, T* z, Channels c, FocusParameters<T>, Norms<T>& norms) {
  for (int t = 0; t < count; ++t) {
    for (i64 h = 0; h < c.heads; ++h) {
      pack(x[t] + h * c.dim, z + h * c.head_stride() + t * c.padded, c.dim, T(1));
    }
    norms.factor[t] = norms.squares[t] = norms.powers[t] = norms.inverse_divisor[t] = 1;
  }
}
template <class X, class O, class T>
void copy_row_backward(const X*, int t, const T* r, Channels c, FocusParameters<T>, const Norms<T>&, T,
                       RowGradient<O, T> gradient) {
  for (i64 h = 0; gradient.dx && h < c.heads; ++h) {
    unpack(r + h * c.head_stride() + t * c.padded, gradient.dx + h * c.dim, c.dim);
  }
}

/// The functions for one mapping of rows of X, whose gradients are stored as O.
template <class X, class O, class T>
struct Focus {
  void (*forward)(const X* const* x, int count, T* z, Channels c, FocusParameters<T> f, Norms<T>& norms);
  void (*backward)(const X* x, int t, const T* r, Channels c, FocusParameters<T> f, const Norms<T>& norms,
                   T dot, RowGradient<O, T> gradient);

  template <int kP>
  static Focus make() {
    return {&focus_block<kP, X, T>, &focus_row_backward<kP, X, O, T>};
  }
  static Focus select(const Mapping& mapping) {
    if (!mapping.focused) return {&copy_block<X, T>, &copy_row_backward<X, O, T>};
    if (mapping.focusing_factor == 1) return make<1>();
    if (mapping.focusing_factor == 2) return make<2>();
    if (mapping.focusing_factor == 3) return make<3>();
    if (mapping.focusing_factor == 4) return make<4>();
    return make<0>();
  }
};

/// x + key_bias of a row, in T.
template <class X, class T>
void add_bias_row(const X* x, const Parameter& bias, i64 position, i64 channels, T* to) {
  for (i64 i = 0; i < channels; i += kLanes<T>) {
    const i64 left = channels - i;
    store_at_most(to + i, load_at_most(x + i, left) + load_parameter<T>(bias, position * channels + i, left),
                  left);
  }
}

}  // namespace flatten::cpu::FLATTEN_ISA
