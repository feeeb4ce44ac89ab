// Numbers that remember how they were computed, so that the derivatives of a formula follow from the formula.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

namespace scalar {

/// A double on a tape: reverse-mode differentiation, one number at a time. There is one tape at a time, which
/// Traced::forget() clears.
class Traced {
 public:
  Traced(double value = 0) : value_(value) {}

  /// A number to differentiate by.
  static Traced variable(double value) { return {value, Step{}}; }
  /// `value` of something computed from a and b, with its derivatives by them.
  static Traced of(double value, Traced a, double by_a, Traced b = {}, double by_b = 0) {
    if (a.at_ == kConstant && b.at_ == kConstant) return {value};
    return {value, Step{a.at_, b.at_, by_a, by_b}};
  }
  static void forget() { tape().clear(); }

  /// The derivatives of sum(weights[i] * results[i]) by every number on the tape; see derivative_of.
  static std::vector<double> differentiate(const std::vector<Traced>& results,
                                           const std::vector<double>& weights) {
    std::vector<double> derivatives(tape().size());
    for (std::size_t i = 0; i < results.size(); ++i) {
      if (results[i].at_ != kConstant) derivatives[results[i].at_] += weights[i];
    }
    for (std::size_t i = tape().size(); i-- > 0;) {
      const Step& step = tape()[i];
      if (step.a != kConstant) derivatives[step.a] += step.by_a * derivatives[i];
      if (step.b != kConstant) derivatives[step.b] += step.by_b * derivatives[i];
    }
    return derivatives;
  }
  double derivative_of(const std::vector<double>& derivatives) const {
    return at_ == kConstant ? 0 : derivatives[at_];
  }

  double value() const { return value_; }

 private:
  static constexpr int kConstant = -1;
  struct Step {
    int a = kConstant, b = kConstant;
    double by_a = 0, by_b = 0;
  };
  static std::vector<Step>& tape() {
    static std::vector<Step> steps;
    return steps;
  }
  Traced(double value, Step step) : value_(value), at_(static_cast<int>(tape().size())) {
    tape().push_back(step);
  }

  double value_;
  int at_ = kConstant;
};

inline Traced operator+(Traced a, Traced b) { return Traced::of(a.value() + b.value(), a, 1, b, 1); }
inline Traced operator*(Traced a, Traced b) {
  return Traced::of(a.value() * b.value(), a, b.value(), b, a.value());
}
inline Traced operator/(Traced a, Traced b) {
  const double quotient = a.value() / b.value();
  return Traced::of(quotient, a, 1 / b.value(), b, -quotient / b.value());
}
inline Traced& operator+=(Traced& a, Traced b) { return a = a + b; }

// The functions that the formula needs, of plain and of traced numbers.
inline double value_of(double x) { return x; }
inline double value_of(Traced x) { return x.value(); }
inline double relu(double x) { return std::fmax(x, 0); }
inline Traced relu(Traced x) { return x.value() > 0 ? x : Traced(0); }
inline double square_root(double x) { return std::sqrt(x); }
inline Traced square_root(Traced x) {
  const double root = std::sqrt(x.value());
  return Traced::of(root, x, 0.5 / root);
}
inline double power(double x, double p) { return std::pow(x, p); }
inline Traced power(Traced x, double p) {
  return Traced::of(std::pow(x.value(), p), x, p * std::pow(x.value(), p - 1));
}

}  // namespace scalar
