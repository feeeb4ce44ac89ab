// What becomes of a query's sums y = c Qn S and z = c Qd . m, and the derivatives of it. With a query's
// features kept as factor * q, all normalizers are
//
//     o = a (qn S) + b u
//     divide     a = c / (c qd . m + eps / factor)     b = 0
//     none       a = c factor                          b = 0
//     subtract   a = c factor                          b = 1 - z
//     magnitude  a = c factor (1 + 1 / (z + eps))      b = -z
#pragma once

#include "../rows.h"

namespace flatten::cpu::FLATTEN_ISA {

/// The numbers of one head of a block of queries; of rows that no token has they mean nothing.
template <class T>
struct Coefficients {
  T dots[kBlock];  // qd . m
  T a[kBlock], b[kBlock];
  T means[kBlock];  // of the derivative by factor * qd: this times m
};

template <class T>
class Normalizing {
 public:
  Normalizing() = default;
  Normalizing(const General& general, double eps)
      : kind_(general.normalizer),
        scale_(static_cast<T>(general.similarity_scale)),
        eps_(static_cast<T>(eps)) {}

  bool reads_m() const { return kind_ != Normalizer::kNone; }
  bool reads_u() const { return kind_ == Normalizer::kSubtract || kind_ == Normalizer::kMagnitude; }

  /// a and b from the dots. Where no key is left (`empty`) the term is 0.
  void weigh(int count, const T* factor, bool empty, Coefficients<T>& k) const {
    if (empty) return clear(k);
    switch (kind_) {
      case Normalizer::kDivide:
        for (int t = 0; t < count; ++t) k.a[t] = scale_ / (scale_ * k.dots[t] + eps_ / factor[t]);
        break;
      case Normalizer::kNone:
        for (int t = 0; t < count; ++t) k.a[t] = scale_ * factor[t];
        break;
      case Normalizer::kSubtract:
        for (int t = 0; t < count; ++t) {
          k.a[t] = scale_ * factor[t];
          k.b[t] = 1 - k.a[t] * k.dots[t];
        }
        break;
      case Normalizer::kMagnitude:
        for (int t = 0; t < count; ++t) {
          const T z = scale_ * factor[t] * k.dots[t];
          k.a[t] = scale_ * factor[t] * grown(z);
          k.b[t] = -z;
        }
        break;
    }
  }

  /// The derivatives from s = qn . (a g) S^T and, where u is read, gu = g . u: `means`, and the sum of a
  /// row's features times its derivatives is added to `dot`.
  void differentiate(int count, const T* factor, bool empty, const T* s, const T* gu, Coefficients<T>& k,
                     T* dot) const {
    if (empty) return;
    switch (kind_) {
      case Normalizer::kDivide:
        for (int t = 0; t < count; ++t) {
          k.means[t] = -k.a[t] * s[t];
          const T rest = eps_ / factor[t];
          dot[t] += s[t] * rest / (scale_ * k.dots[t] + rest);
        }
        break;
      case Normalizer::kNone:
        for (int t = 0; t < count; ++t) {
          k.means[t] = 0;
          dot[t] += s[t];
        }
        break;
      case Normalizer::kSubtract:
        for (int t = 0; t < count; ++t) {
          k.means[t] = -k.a[t] * gu[t];
          dot[t] += s[t] - k.a[t] * k.dots[t] * gu[t];
        }
        break;
      case Normalizer::kMagnitude:
        for (int t = 0; t < count; ++t) {
          const T cf = scale_ * factor[t], z = cf * k.dots[t], inverse = 1 / (z + eps_);
          const T gy = s[t] / grown(z);
          k.means[t] = -cf * (gy * inverse * inverse + gu[t]);
          dot[t] += gy * (1 + eps_ * inverse * inverse) - z * gu[t];
        }
        break;
    }
  }

 private:
  static void clear(Coefficients<T>& k) {
    for (int t = 0; t < kBlock; ++t) k.a[t] = k.b[t] = k.means[t] = 0;
  }
  /// 1 + 1 / (z + eps), but never 0, by which a derivative is divided.
  T grown(T z) const {
    const T grown = 1 + 1 / (z + eps_);
    return grown == 0 ? T(1e-30) : grown;
  }

  Normalizer kind_ = Normalizer::kDivide;
  T scale_ = 1, eps_ = 0;
};

}  // namespace flatten::cpu::FLATTEN_ISA
