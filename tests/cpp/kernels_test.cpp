// The CPU kernels as a program without torch drives them, csrc/params.h filled by hand: every dtype and
// option of the contract, forward and backward, against the scalar formula and its derivatives.
//
// tests/neon.sh runs this for aarch64 under an emulator.
#include "cpu/kernels.h"

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

#include "cpu/isa.h"
#include "scalar_attention.h"
#include "storage.h"

namespace {

using flatten::Dtype;
using scalar::Buffer;
using scalar::Numbers;
using scalar::Operands;
using scalar::Shape;
using scalar::TokenBuffer;
using scalar::Traced;

struct Case {
  const char* name;
  Shape shape;
};

// What decides on the code a call takes: heads narrower and wider than a vector, of whole vectors or not, of
// the compiled widths and others; windows of one block and of several, of fewer tokens than channels (scores)
// and more; tiles, strips of tiles and chains of blocks; taps of the compiled widths and others.
const Case kCases[] = {
    {"taps 5x5", {}},
    {"no parameters",
     {.kernel_h = 0, .kernel_w = 0, .has_scale = false, .has_key_bias = false, .has_bias = false}},
    {"taps without bias, p = 1", {.has_bias = false, .focusing_factor = 1}},
    {"taps 3x7, p = 2", {.height = 9, .width = 8, .kernel_h = 3, .kernel_w = 7, .focusing_factor = 2}},
    {"taps 7x3, p = 4", {.height = 9, .width = 8, .kernel_h = 7, .kernel_w = 3, .focusing_factor = 4}},
    {"taps 7x7", {.height = 11, .width = 9, .dim = 32, .kernel_h = 7, .kernel_w = 7}},
    {"taps 1x1, p = 8", {.kernel_h = 1, .kernel_w = 1, .focusing_factor = 8}},
    {"taps larger than the map, p = 2.5",
     {.height = 4, .width = 3, .kernel_h = 11, .kernel_w = 9, .focusing_factor = 2.5}},
    {"taps of every channel", {.kernel_h = 3, .kernel_w = 3, .per_channel = true}},
    {"prefix", {.height = 5, .width = 7, .prefix = 3}},
    {"other keys", {.height = 4, .width = 5, .keys = 13, .kernel_h = 0, .kernel_w = 0}},
    {"many other keys", {.height = 1, .width = 3, .dim = 8, .keys = 150, .kernel_h = 0, .kernel_w = 0}},
    {"windows", {.height = 6, .width = 10, .window_h = 3, .window_w = 5}},
    {"shifted windows", {.height = 6, .width = 10, .window_h = 3, .window_w = 5, .shift_h = 1, .shift_w = 2}},
    {"windows 7x7",
     {.height = 14,
      .width = 14,
      .heads = 3,
      .dim = 32,
      .batch = 1,
      .window_h = 7,
      .window_w = 7,
      .shift_h = 3,
      .shift_w = 3}},
    {"windows in strips", {.height = 8, .width = 6, .window_h = 8, .window_w = 2, .per_channel = true}},
    {"one shifted window", {.window_h = 6, .window_w = 5, .shift_h = 2, .shift_w = 4}},
    {"one token", {.height = 1, .width = 1}},
    {"scores 7x7", {.height = 7, .width = 7, .dim = 64}},
    {"scores of other keys", {.height = 4, .width = 5, .dim = 40, .keys = 13, .kernel_h = 0, .kernel_w = 0}},
    {"scores of windows",
     {.height = 8,
      .width = 12,
      .heads = 3,
      .dim = 32,
      .batch = 1,
      .window_h = 4,
      .window_w = 4,
      .shift_h = 1,
      .shift_w = 3}},
    {"5 heads of 1 channel", {.heads = 5, .dim = 1}},
    {"3 heads of 20 channels", {.heads = 3, .dim = 20}},
    {"1 head of 24 channels", {.heads = 1, .dim = 24}},
    {"2 heads of 48 channels", {.dim = 48, .batch = 1}},
    {"1 head of 96 channels", {.height = 8, .width = 14, .heads = 1, .dim = 96, .batch = 1}},
    {"1 head of 128 channels", {.height = 3, .width = 4, .heads = 1, .dim = 128, .batch = 1}},
    {"features", {.height = 8, .width = 9, .dim = 12, .focused = false}},
    {"a wide map",
     {.height = 3, .width = 150, .heads = 2, .dim = 8, .batch = 1, .kernel_h = 3, .kernel_w = 3}},
    {"a large map", {.height = 40, .width = 37, .heads = 1, .dim = 16, .batch = 1}},
};

/// Runs ranges of one in reverse order, to show that results depend on the number of threads alone.
void run_backwards(std::int64_t count, void (*task)(std::int64_t, std::int64_t, void*), void* context) {
  for (std::int64_t i = count; i-- > 0;) task(i, i + 1, context);
}

/// How the tensors of a call are held, and how it is run.
struct Variant {
  Dtype parameters;
  std::int64_t gap;  // elements between the rows of tokens
  int threads;
  double saved;  // part of the windows whose sums the forward keeps for the backward
};

/// Operands in the caller's memory.
struct Stored {
  TokenBuffer q, k, v;
  Buffer scale, key_bias, weight, bias;

  Stored(const Shape& s, Dtype dtype, const Variant& variant)
      : q(dtype, s.batch, s.query_count(), s.channels(), variant.gap),
        k(dtype, s.batch, s.key_count(), s.channels(), variant.gap),
        v(dtype, s.batch, s.key_count(), s.channels(), variant.gap),
        scale(variant.parameters, s.focused && s.has_scale ? s.channels() : 0),
        key_bias(variant.parameters, s.focused && s.has_key_bias ? s.window_keys() * s.channels() : 0),
        weight(variant.parameters, s.filters() * s.kernel_h * s.kernel_w),
        bias(variant.parameters, s.has_taps() && s.has_bias ? s.filters() : 0) {}

  /// The numbers that a kernel reads or wrote here.
  Operands<double> numbers() const {
    const auto all = [](const Buffer& b) {
      Numbers x(b.count());
      for (std::int64_t i = 0; i < b.count(); ++i) x[i] = b[i];
      return x;
    };
    return {q.numbers(), k.numbers(), v.numbers(), all(scale), all(key_bias), all(weight), all(bias)};
  }
};

void fill(Buffer& buffer, double low, double high, unsigned seed) {
  const Numbers x = scalar::random(buffer.count(), low, high, seed);
  for (std::int64_t i = 0; i < buffer.count(); ++i) buffer.set(i, x[i]);
}

Stored random_operands(const Shape& s, Dtype dtype, const Variant& variant) {
  Stored x(s, dtype, variant);
  const double low = s.focused ? -2 : 0.1;  // features are positive
  x.q.fill(scalar::random(s.batch * s.query_count() * s.channels(), low, 2, 1));
  x.k.fill(scalar::random(s.batch * s.key_count() * s.channels(), low, 2, 2));
  x.v.fill(scalar::random(s.batch * s.key_count() * s.channels(), -2, 2, 3));
  fill(x.scale, 0.5, 2, 4);
  fill(x.key_bias, -0.5, 0.5, 5);
  fill(x.weight, -0.3, 0.3, 6);
  fill(x.bias, -1, 1, 7);
  return x;
}

flatten::Geometry geometry(const Shape& s) {
  flatten::Geometry g;
  g.batch = s.batch;
  g.queries = s.query_count();
  g.keys = s.key_count();
  g.heads = s.heads;
  g.head_dim = g.value_dim = s.dim;
  const bool has_map = s.has_taps() || s.window_h > 0;
  g.prefix = has_map ? s.prefix : 0;
  g.map_h = has_map ? s.height : 1;
  g.map_w = has_map ? s.width : g.keys;
  g.window_h = has_map ? s.rows() : 1;
  g.window_w = has_map ? s.columns() : g.keys;
  g.shift_h = s.shift_h;
  g.shift_w = s.shift_w;
  return g;
}

flatten::Parameter parameter(Buffer& buffer) {
  return {buffer.count() ? buffer.data() : nullptr, buffer.dtype()};
}
flatten::MutableParameter gradient(Buffer& buffer, bool wanted) {
  return {wanted && buffer.count() ? buffer.data() : nullptr, buffer.dtype()};
}

flatten::Taps taps(const Shape& s, Stored& x) {
  return {parameter(x.weight), parameter(x.bias), s.kernel_h, s.kernel_w, s.per_channel};
}

void set_inputs(const Shape& s, Dtype dtype, Stored& x, flatten::AttentionInputs& to) {
  to.dtype = dtype;
  to.geometry = geometry(s);
  to.mapping = {s.focused ? flatten::FeatureMap::kFocused : flatten::FeatureMap::kNone, s.focusing_factor,
                parameter(x.scale), parameter(x.key_bias)};
  to.eps = s.eps;
  to.taps = taps(s, x);
  to.query = x.q;
  to.key = x.k;
  to.value = x.v;
}

/// What a call returned: its result, and the gradients of those operands that were asked for.
struct Results {
  TokenBuffer out;
  Stored gradients;
};

constexpr unsigned kAll = 0x7f;  // of the operands, in the order of Stored

Results run_attention(const Shape& s, Dtype dtype, const Variant& variant, Stored& x, TokenBuffer& grad_out,
                      unsigned wanted) {
  const flatten::cpu::Parallel parallel{variant.threads, run_backwards};
  Results results{TokenBuffer(dtype, s.batch, s.query_count(), s.channels(), variant.gap),
                  Stored(s, dtype, variant)};
  flatten::AttentionForward forward;
  set_inputs(s, dtype, x, forward);
  forward.out = results.out;
  const double windows = static_cast<double>(s.batch * s.windows());
  forward.saved_windows = static_cast<std::int64_t>(windows * variant.saved);
  Buffer state(flatten::accumulate_dtype(dtype),
               forward.saved_windows * flatten::window_state_elements(forward.geometry));
  if (forward.saved_windows > 0) forward.state = state.data();
  flatten::cpu::kernels().attention_forward(forward, parallel);

  flatten::AttentionBackward backward;
  set_inputs(s, dtype, x, backward);
  backward.grad_out = grad_out;
  backward.saved_windows = forward.saved_windows;
  backward.state = forward.state;
  Stored& g = results.gradients;
  if (wanted & 1) backward.grad_query = g.q;
  if (wanted & 2) backward.grad_key = g.k;
  if (wanted & 4) backward.grad_value = g.v;
  backward.grad_scale = gradient(g.scale, wanted & 8);
  backward.grad_key_bias = gradient(g.key_bias, wanted & 16);
  backward.grad_weight = gradient(g.weight, wanted & 32);
  backward.grad_bias = gradient(g.bias, wanted & 64);
  flatten::cpu::kernels().attention_backward(backward, parallel);
  return results;
}

/// depthwise_conv of v.
Results run_conv(const Shape& s, Dtype dtype, const Variant& variant, Stored& x, TokenBuffer& grad_out,
                 unsigned wanted) {
  const flatten::cpu::Parallel parallel{variant.threads, run_backwards};
  Results results{TokenBuffer(dtype, s.batch, s.query_count(), s.channels(), variant.gap),
                  Stored(s, dtype, variant)};
  const auto set_inputs = [&](flatten::ConvInputs& to) {
    to.dtype = dtype;
    to.geometry = geometry(s);
    to.geometry.head_dim = to.geometry.value_dim = s.filters();  // as the operator, which knows of no heads
    to.geometry.heads = s.channels() / s.filters();
    to.taps = taps(s, x);
    to.taps.per_channel = false;
    to.x = x.v;
  };
  flatten::ConvForward forward;
  set_inputs(forward);
  forward.out = results.out;
  flatten::cpu::kernels().conv_forward(forward, parallel);

  flatten::ConvBackward backward;
  set_inputs(backward);
  backward.grad_out = grad_out;
  if (wanted & 4) backward.grad_x = results.gradients.v;
  backward.grad_weight = gradient(results.gradients.weight, wanted & 32);
  backward.grad_bias = gradient(results.gradients.bias, wanted & 64);
  flatten::cpu::kernels().conv_backward(backward, parallel);
  return results;
}

/// The formula's result, and the derivatives of sum(grad_out * result) by every operand.
struct Expected {
  Numbers out;
  Operands<double> gradients;
};

template <class Formula>
Expected differentiate(const Formula& formula, const Shape& s, const Operands<double>& x, const Numbers& g) {
  Traced::forget();
  const auto traced = [](const Numbers& numbers) {
    std::vector<Traced> variables;
    for (const double number : numbers) variables.push_back(Traced::variable(number));
    return variables;
  };
  const Operands<Traced> t{traced(x.q),        traced(x.k),      traced(x.v),   traced(x.scale),
                           traced(x.key_bias), traced(x.weight), traced(x.bias)};
  const std::vector<Traced> out = formula(s, t);
  const Numbers derivatives = Traced::differentiate(out, g);
  const auto by = [&](const std::vector<Traced>& variables) {
    Numbers gradient;
    for (const Traced variable : variables) gradient.push_back(variable.derivative_of(derivatives));
    return gradient;
  };
  Expected expected{{}, {by(t.q), by(t.k), by(t.v), by(t.scale), by(t.key_bias), by(t.weight), by(t.bias)}};
  for (const Traced value : out) expected.out.push_back(value.value());
  return expected;
}

int failures = 0;
double largest = 0;  // error of a dtype's calls, in its tolerance
std::string context;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAILED %s: %s\n", context.c_str(), what.c_str());
  ++failures;
}

/// The most relative error allowed, as tests/cases.py has it; gradients may have twice that.
double tolerance(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return 1e-12;
    case Dtype::kFloat32:
      return 3e-6;
    case Dtype::kFloat16:
      return 6e-4;
    case Dtype::kBFloat16:
      return 5e-3;
  }
  std::abort();
}

double norm(const Numbers& x) {
  double squares = 0;
  for (const double value : x) squares += value * value;
  return std::sqrt(squares);
}

void compare(const Results& found, const Expected& expected, Dtype dtype, unsigned wanted, bool cancels) {
  const double allowed = tolerance(dtype);
  const auto close = [&](const char* what, const Numbers& x, const Numbers& y, double at_most, double floor) {
    Numbers difference(y.size());
    for (std::size_t i = 0; i < y.size(); ++i) difference[i] = x[i] - y[i];
    const double error = norm(difference) / std::fmax(norm(y), floor);
    if (!y.empty()) largest = std::fmax(largest, error / at_most);
    expect(y.empty() || error <= at_most, std::string(what) + " is off by " +
                                              std::to_string(error / allowed) + " times the tolerance of " +
                                              name(dtype));
  };
  close("out", found.out.numbers(), expected.out, allowed, 0);
  expect(found.out.gaps_are_unwritten(), "out has writes between its rows");
  const Operands<double> x = found.gradients.numbers(), &y = expected.gradients;
  // With one token the weights are 1 whatever q and k are: their gradients are rounding and eps.
  const double floor = cancels ? norm(y.v) : 0;
  if (wanted & 1) close("dq", x.q, y.q, 2 * allowed, floor);
  if (wanted & 2) close("dk", x.k, y.k, 2 * allowed, floor);
  if (wanted & 4) close("dv", x.v, y.v, 2 * allowed, floor);
  if (wanted & 8) close("dscale", x.scale, y.scale, 2 * allowed, floor);
  if (wanted & 16) close("dkey_bias", x.key_bias, y.key_bias, 2 * allowed, floor);
  if (wanted & 32) close("dweight", x.weight, y.weight, 2 * allowed, floor);
  if (wanted & 64) close("dbias", x.bias, y.bias, 2 * allowed, floor);
  for (const TokenBuffer* tokens : {&found.gradients.q, &found.gradients.k, &found.gradients.v})
    expect(tokens->gaps_are_unwritten(), "a gradient has writes between its rows");
}

void test_case(const Case& c, Dtype dtype) {
  const Shape& s = c.shape;
  const bool half = flatten::element_size(dtype) == 2;
  for (const Variant& variant : {Variant{dtype, 0, 1, 0}, Variant{half ? Dtype::kFloat32 : dtype, 3, 3, 1},
                                 Variant{dtype, 16, 2, 0.5}}) {
    context = std::string(c.name) + ", " + name(dtype) + ", parameters " + name(variant.parameters) +
              ", rows " + std::to_string(variant.gap) + " apart, " + std::to_string(variant.threads) +
              " threads, " + std::to_string(variant.saved) + " of the windows saved";
    Stored x = random_operands(s, dtype, variant);
    TokenBuffer grad_out(dtype, s.batch, s.query_count(), s.channels(), variant.gap);
    grad_out.fill(scalar::random(s.batch * s.query_count() * s.channels(), -1, 1, 8));
    const Operands<double> numbers = x.numbers();
    const Expected expected = differentiate(scalar::attention<Traced>, s, numbers, grad_out.numbers());
    const bool cancels = s.query_count() == 1;
    compare(run_attention(s, dtype, variant, x, grad_out, kAll), expected, dtype, kAll, cancels);
    if (variant.threads == 1) {  // each gradient for itself: passes that another would need are left out
      for (unsigned wanted = 1; wanted <= kAll; wanted *= 2)
        compare(run_attention(s, dtype, variant, x, grad_out, wanted), expected, dtype, wanted, cancels);
    }
    if (!s.has_taps()) continue;
    context = "depthwise_conv, " + context;
    const Expected conv = differentiate(scalar::depthwise_conv<Traced>, s, numbers, grad_out.numbers());
    for (const unsigned wanted : {4u + 32 + 64, 4u, 32u, 64u})
      compare(run_conv(s, dtype, variant, x, grad_out, wanted), conv, dtype, wanted, false);
  }
}

/// Every number of a 16-bit dtype times a float32 weight, as depthwise_conv with a kernel of one tap computes
/// it: the products are exact in float32, so what is stored must be their nearest number.
void test_conversions(Dtype dtype, std::int64_t channels) {
  const double nan_free[] = {1, -1, 0.75, 1 + 0x1p-11, 1 + 0x1p-7, 1 - 0x1p-9, 0x1p-10, 0x3p-13, 0x1p10};
  for (const double factor : nan_free) {
    Shape s{.height = 1,
            .width = (65536 + channels - 1) / channels,
            .heads = 1,
            .dim = channels,
            .batch = 1,
            .kernel_h = 1,
            .kernel_w = 1,
            .has_bias = false};
    const Variant variant{Dtype::kFloat32, 0, 1, 0};
    context = std::string("every ") + name(dtype) + " in rows of " + std::to_string(channels) + " times " +
              std::to_string(factor);
    Stored x(s, dtype, variant);
    for (std::int64_t i = 0; i < x.v.buffer.count(); ++i)
      x.v.buffer.set_bits16(i, static_cast<std::uint16_t>(i));
    for (std::int64_t i = 0; i < channels; ++i) x.weight.set(i, factor);
    TokenBuffer grad_out(dtype, 1, s.width, channels, 0);
    const Results found = run_conv(s, dtype, variant, x, grad_out, 0);
    int wrong = 0, first = 0;
    for (int bits = 0; bits < 65536; ++bits) {
      const double number = scalar::decode16(static_cast<std::uint16_t>(bits), scalar::exponent_bits(dtype));
      const std::uint16_t expected = scalar::encode16(0.0 + number * factor, scalar::exponent_bits(dtype));
      const bool is_right =
          std::isnan(number) ? std::isnan(found.out.buffer[bits]) : found.out.buffer.bits16(bits) == expected;
      if (!is_right && wrong++ == 0) first = bits;
    }
    expect(wrong == 0, std::to_string(wrong) + " of 65536 are wrong, the first of bits " +
                           std::to_string(first) + " became " +
                           std::to_string(found.out.buffer.bits16(first)));
  }
}

}  // namespace

int main() {
  std::printf("%s kernels\n", flatten::cpu::isa_in_use().c_str());
  for (const Dtype dtype : {Dtype::kFloat64, Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    largest = 0;
    for (const Case& c : kCases) test_case(c, dtype);
    std::printf("%s: errors up to %.2f of the tolerance\n", name(dtype), largest);
    if (flatten::element_size(dtype) == 2) {
      for (const std::int64_t channels : {16, 5}) test_conversions(dtype, channels);
    }
  }
  std::printf("%zu calls of every dtype, %d failures\n", std::size(kCases), failures);
  return failures == 0 ? 0 : 1;
}
