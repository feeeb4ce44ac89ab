// The CPU kernels of the general form (csrc/params.h: General): random combinations of everything that a call
// may have, forward and backward, against the scalar formula and its derivatives.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "scalar_general.h"
#include "storage.h"

namespace {

using flatten::Dtype;
using scalar::Buffer;
using scalar::FeatureMap;
using scalar::GateActivation;
using scalar::GeneralShape;
using scalar::kOperands;
using scalar::Normalizer;
using scalar::Numbers;
using scalar::TokenBuffer;
using scalar::Traced;
using scalar::Values;

/// Runs ranges of one in reverse order, to show that results depend on the number of threads alone.
void run_backwards(std::int64_t count, void (*task)(std::int64_t, std::int64_t, void*), void* context) {
  for (std::int64_t i = count; i-- > 0;) task(i, i + 1, context);
}

bool is_tokens(int operand) {
  return operand <= scalar::kV || operand == scalar::kNormalQ || operand == scalar::kNormalK ||
         operand == scalar::kGate;
}
bool is_of_queries(int operand) {
  return operand == scalar::kQ || operand == scalar::kNormalQ || operand == scalar::kGate;
}
bool is_of_values(int operand) { return operand == scalar::kV || operand == scalar::kGate; }

/// A call's tensors in the caller's memory; those it does not have are empty.
struct Stored {
  std::vector<TokenBuffer> tokens;
  std::vector<Buffer> parameters;
  std::array<std::int64_t, kOperands> elements;

  Stored(const GeneralShape& s, Dtype dtype, Dtype parameter, std::int64_t gap) : elements(s.elements()) {
    for (int i = 0; i < kOperands; ++i) {
      const bool has = is_tokens(i) && elements[i] > 0;
      tokens.emplace_back(dtype, has ? s.batch : 0, is_of_queries(i) ? s.query_count() : s.key_count(),
                          is_of_values(i) ? s.value_channels() : s.channels(), gap);
      parameters.emplace_back(parameter, is_tokens(i) ? 0 : elements[i]);
    }
  }
  Numbers numbers(int i) const {
    if (is_tokens(i)) return tokens[i].numbers();
    Numbers x(parameters[i].count());
    for (std::int64_t k = 0; k < parameters[i].count(); ++k) x[k] = parameters[i][k];
    return x;
  }
  void fill(int i, const Numbers& x) {
    if (is_tokens(i)) return tokens[i].fill(x);
    for (std::int64_t k = 0; k < parameters[i].count(); ++k) parameters[i].set(k, x[k]);
  }
  flatten::Tokens read(int i) { return elements[i] ? flatten::Tokens(tokens[i]) : flatten::Tokens{}; }
  flatten::MutableTokens write(int i, unsigned wanted) {
    return elements[i] && (wanted >> i & 1) ? flatten::MutableTokens(tokens[i]) : flatten::MutableTokens{};
  }
  flatten::Parameter parameter(int i) {
    return {elements[i] ? parameters[i].data() : nullptr, parameters[i].dtype()};
  }
  flatten::MutableParameter gradient(int i, unsigned wanted) {
    return {elements[i] && (wanted >> i & 1) ? parameters[i].data() : nullptr, parameters[i].dtype()};
  }
};

flatten::Geometry geometry(const GeneralShape& s) {
  flatten::Geometry g;
  g.batch = s.batch;
  g.queries = s.query_count();
  g.keys = s.key_count();
  g.heads = s.heads;
  g.head_dim = s.dim;
  g.value_dim = s.value_dim;
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

void set_inputs(const GeneralShape& s, Dtype dtype, Stored& x, Buffer& table, flatten::AttentionInputs& to) {
  to.dtype = dtype;
  to.geometry = geometry(s);
  to.mapping = {s.map, s.focusing_factor, x.parameter(scalar::kScale), x.parameter(scalar::kKeyBias)};
  to.eps = s.eps;
  to.taps = {x.parameter(scalar::kWeight),
             x.parameter(scalar::kBias),
             s.kernel_h,
             s.kernel_w,
             s.per_channel,
             s.per_image};
  to.query = x.read(scalar::kQ);
  to.key = x.read(scalar::kK);
  to.value = x.read(scalar::kV);
  to.general.rotation = {{s.has_table ? table.data() : nullptr, table.dtype()}, s.table_per_channel};
  to.general.key_weight = {x.parameter(scalar::kKeyWeight), s.weight_per_head};
  to.general.normalizer = s.normalizer;
  to.general.similarity_scale = s.similarity_scale;
  to.general.normalizer_query = x.read(scalar::kNormalQ);
  to.general.normalizer_key = x.read(scalar::kNormalK);
  to.general.gate = x.read(scalar::kGate);
  to.general.gate_activation = s.activation;
}

struct Results {
  TokenBuffer out;
  Stored gradients;
};

struct Variant {
  Dtype parameters;
  std::int64_t gap;  // elements between the rows of tokens
  int threads;
  double saved;  // part of the windows whose sums the forward keeps for the backward
};

Results run(const GeneralShape& s, Dtype dtype, const Variant& variant, Stored& x, Buffer& table,
            TokenBuffer& grad_out, unsigned wanted) {
  const flatten::cpu::Parallel parallel{variant.threads, run_backwards};
  Results r{TokenBuffer(dtype, s.batch, s.query_count(), s.value_channels(), variant.gap),
            Stored(s, dtype, variant.parameters, variant.gap)};
  flatten::AttentionForward forward;
  set_inputs(s, dtype, x, table, forward);
  forward.out = r.out;
  forward.saved_windows =
      static_cast<std::int64_t>(static_cast<double>(s.batch * s.windows()) * variant.saved);
  Buffer state(flatten::accumulate_dtype(dtype),
               forward.saved_windows *
                   flatten::window_state_elements(static_cast<flatten::AttentionInputs&>(forward)));
  if (forward.saved_windows > 0) forward.state = state.data();
  flatten::cpu::kernels().attention_forward(forward, parallel);

  flatten::AttentionBackward backward;
  set_inputs(s, dtype, x, table, backward);
  backward.grad_out = grad_out;
  backward.saved_windows = forward.saved_windows;
  backward.state = forward.state;
  Stored& g = r.gradients;
  backward.grad_query = g.write(scalar::kQ, wanted);
  backward.grad_key = g.write(scalar::kK, wanted);
  backward.grad_value = g.write(scalar::kV, wanted);
  backward.grad_scale = g.gradient(scalar::kScale, wanted);
  backward.grad_key_bias = g.gradient(scalar::kKeyBias, wanted);
  backward.grad_weight = g.gradient(scalar::kWeight, wanted);
  backward.grad_bias = g.gradient(scalar::kBias, wanted);
  backward.grad_normalizer_query = g.write(scalar::kNormalQ, wanted);
  backward.grad_normalizer_key = g.write(scalar::kNormalK, wanted);
  backward.grad_key_weight = g.gradient(scalar::kKeyWeight, wanted);
  backward.grad_gate = g.write(scalar::kGate, wanted);
  flatten::cpu::kernels().attention_backward(backward, parallel);
  return r;
}

int failures = 0;
double largest = 0;  // error of a dtype's calls, in its tolerance
std::string context;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  if (failures < 50) std::printf("FAILED %s: %s\n", context.c_str(), what.c_str());
  ++failures;
}

constexpr double kBeyondFloat16 = 65520;  // rounds to infinity

/// As in kernels_test.cpp, but for float32: random normalizers and heads of two channels cancel more.
/// Gradients may have twice that.
double tolerance(Dtype dtype) {
  return dtype == Dtype::kFloat64   ? 1e-12
         : dtype == Dtype::kFloat32 ? 1e-5
         : dtype == Dtype::kFloat16 ? 6e-4
                                    : 5e-3;
}

double norm(const Numbers& x) {
  double squares = 0;
  for (const double value : x) squares += value * value;
  return std::sqrt(squares);
}

void close(const std::string& what, const Numbers& x, const Numbers& y, double allowed, double floor) {
  Numbers difference(y.size());
  for (std::size_t i = 0; i < y.size(); ++i) difference[i] = x[i] - y[i];
  const double error = norm(difference) / std::fmax(norm(y), floor);
  if (!y.empty() && norm(difference) != 0) largest = std::fmax(largest, error / allowed);
  expect(y.empty() || norm(difference) == 0 || error <= allowed,
         what + " is off by " + std::to_string(error / allowed) + " times what is allowed");
}

class Chance {
 public:
  explicit Chance(unsigned seed) : bits_(seed) {}
  std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(bits_() % static_cast<unsigned>(n)); }
  bool one_in(int n) { return below(n) == 0; }
  template <class T>
  T of(std::initializer_list<T> choices) {
    return *(choices.begin() + below(static_cast<std::int64_t>(choices.size())));
  }

 private:
  std::mt19937 bits_;
};

GeneralShape random_shape(unsigned seed) {
  Chance chance(seed);
  GeneralShape s;
  s.batch = 1 + chance.below(3);
  s.heads = 1 + chance.below(3);
  s.dim = chance.of<std::int64_t>({2, 6, 8, 16, 20, 32});
  s.value_dim = chance.one_in(3) ? chance.of<std::int64_t>({1, 5, 8, 16, 24}) : s.dim;
  s.map = chance.of(
      {FeatureMap::kNone, FeatureMap::kFocused, FeatureMap::kElu, FeatureMap::kElu, FeatureMap::kRelu});
  s.has_scale = chance.one_in(2);
  s.has_key_bias = chance.one_in(4);
  s.focusing_factor = chance.of({1.0, 2.5, 3.0});
  s.normalizer =
      chance.of({Normalizer::kDivide, Normalizer::kNone, Normalizer::kSubtract, Normalizer::kMagnitude});
  s.similarity_scale = chance.of({1.0, 0.25});
  s.kernel_h = s.kernel_w = 0;
  switch (chance.below(5)) {
    case 0:  // other keys, no map
      s.height = 1, s.width = 1 + chance.below(30), s.keys = 1 + chance.below(40);
      break;
    case 1:  // one long row
      s.height = 1, s.width = 100 + chance.below(60), s.dim = 8,
      s.value_dim = chance.of<std::int64_t>({4, 8});
      break;
    case 2: {  // windows
      s.window_h = 2 + chance.below(3), s.window_w = 2 + chance.below(3);
      s.height = s.window_h * (1 + chance.below(3)), s.width = s.window_w * (1 + chance.below(3));
      if (chance.one_in(2)) s.shift_h = chance.below(s.window_h), s.shift_w = chance.below(s.window_w);
      break;
    }
    default:
      s.height = 1 + chance.below(9), s.width = 1 + chance.below(9);
      if (chance.one_in(3)) s.prefix = 1 + chance.below(3);
  }
  if (s.keys == 0 && !chance.one_in(3)) {
    s.kernel_h = chance.of<std::int64_t>({3, 5, 1}), s.kernel_w = chance.of<std::int64_t>({3, 5, 7, 9});
    s.per_image = chance.one_in(4), s.per_channel = !s.per_image && chance.one_in(2);
    s.has_bias = chance.one_in(2);
  }
  s.has_table = s.keys == 0 && chance.one_in(2);
  s.table_per_channel = chance.one_in(2);
  s.has_key_weight = chance.one_in(2);
  s.weight_per_head = chance.one_in(2);
  s.has_normal_q = s.map == FeatureMap::kNone && chance.one_in(2);
  s.has_normal_k = s.map == FeatureMap::kNone && chance.one_in(2);
  s.has_gate = chance.one_in(2);
  if (s.has_gate)
    s.activation = chance.of({GateActivation::kNone, GateActivation::kSilu, GateActivation::kSigmoid});
  return s;
}

std::string describe(const GeneralShape& s) {
  const char* maps[] = {"none", "focused", "elu", "relu"};
  const char* normalizers[] = {"divide", "none", "subtract", "magnitude"};
  char text[400];
  std::snprintf(
      text, sizeof text,
      "map %s, normalizer %s, %ld heads of %ld and %ld, %ld x %ld + %ld tokens, %ld keys, window %ld x "
      "%ld, taps %ld x %ld (image %d), table %d %d, weight %d %d, gate %d, normal %d %d, bias %d, batch %ld",
      maps[static_cast<int>(s.map)], normalizers[static_cast<int>(s.normalizer)], long(s.heads), long(s.dim),
      long(s.value_dim), long(s.height), long(s.width), long(s.prefix), long(s.keys), long(s.window_h),
      long(s.window_w), long(s.kernel_h), long(s.kernel_w), s.per_image, s.has_table, s.table_per_channel,
      s.has_key_weight, s.weight_per_head, s.has_gate, s.has_normal_q, s.has_normal_k, s.has_key_bias,
      long(s.batch));
  return text;
}

void test(unsigned seed, Dtype dtype) {
  const GeneralShape s = random_shape(seed);
  const bool half = flatten::element_size(dtype) == 2;
  const Variant variants[] = {
      {dtype, 0, 1, 0}, {half ? Dtype::kFloat32 : dtype, 3, 3, 1}, {dtype, 16, 2, 0.5}};
  const Variant& variant = variants[seed % 3];
  context = std::to_string(seed) + " (" + describe(s) + "), " + std::to_string(static_cast<int>(dtype)) +
            ", " + std::to_string(variant.threads) + " threads";
  Stored x(s, dtype, variant.parameters, variant.gap);
  for (int i = 0; i < kOperands; ++i) {
    const bool positive = i == scalar::kScale || i == scalar::kNormalQ || i == scalar::kNormalK ||
                          (s.map == FeatureMap::kNone && (i == scalar::kQ || i == scalar::kK));
    Numbers numbers =
        scalar::random(x.elements[i], positive ? 0.5 : -2, 2, seed * 16 + static_cast<unsigned>(i));
    if (i == scalar::kKeyWeight) {
      for (double& w : numbers) w = w < -0.7 ? 0 : w < 0 ? -w : w;
    }
    x.fill(i, numbers);
  }
  Buffer table(variant.parameters, s.table_elements());
  for (std::int64_t i = 0; i < table.count(); ++i) {
    const double angle = 0.3 * double(i / 2 % s.table_row() + 1) + double(i / s.table_row());
    table.set(i, i % 2 ? std::sin(angle) : std::cos(angle));
  }
  Numbers angles(table.count());
  for (std::int64_t i = 0; i < table.count(); ++i) angles[i] = table[i];
  TokenBuffer grad_out(dtype, s.batch, s.query_count(), s.value_channels(), variant.gap);
  grad_out.fill(scalar::random(s.batch * s.query_count() * s.value_channels(), -1, 1, seed * 16 + 15));

  Traced::forget();
  Values<Traced> traced;
  for (int i = 0; i < kOperands; ++i) {
    for (const double number : x.numbers(i)) traced[i].push_back(Traced::variable(number));
  }
  const std::vector<Traced> out = scalar::general_attention(s, traced, angles);
  const Numbers derivatives = Traced::differentiate(out, grad_out.numbers());
  Numbers expected_out;
  for (const Traced value : out) expected_out.push_back(value.value());

  // Keys of weight 0 may hold anything: their k, and their v where no taps read it.
  if (s.has_key_weight && !s.weight_per_head) {
    const Numbers w = x.numbers(scalar::kKeyWeight);
    for (const int i : {int(scalar::kK), int(scalar::kNormalK), int(scalar::kV)}) {
      if (x.elements[i] == 0 || (i == scalar::kV && s.has_taps())) continue;
      Numbers numbers = x.numbers(i);
      const std::int64_t row = static_cast<std::int64_t>(numbers.size() / w.size());
      for (std::size_t k = 0; k < w.size(); ++k) {
        if (w[k] == 0 && k % 2 == 0) numbers[static_cast<std::int64_t>(k) * row] = k % 4 ? NAN : INFINITY;
      }
      x.fill(i, numbers);
    }
  }
  const auto expected = [&](int i) {
    Numbers gradient;
    for (const Traced variable : traced[i]) gradient.push_back(variable.derivative_of(derivatives));
    return gradient;
  };
  const double allowed = tolerance(dtype);
  const double floor = s.window_keys() == 1 || s.query_count() == 1 ? norm(expected(scalar::kV)) : 0;
  const auto check = [&](unsigned wanted) {
    const Results found = run(s, dtype, variant, x, table, grad_out, wanted);
    close("out", found.out.numbers(), expected_out, allowed, 0);
    expect(found.out.gaps_are_unwritten(), "out has writes between its rows");
    for (int i = 0; i < kOperands; ++i) {
      if (!(wanted >> i & 1) || x.elements[i] == 0) continue;
      Numbers gradient = found.gradients.numbers(i), truth = expected(i);
      if (i == scalar::kKeyWeight && !s.weight_per_head) {  // of a key that holds NaN it is anything finite
        const Numbers w = x.numbers(i);
        for (std::size_t k = 0; k < w.size(); ++k) {
          if (w[k] == 0 && k % 2 == 0)
            expect(std::isfinite(gradient[k]), "dkey_weight is not finite"), gradient[k] = truth[k] = 0;
        }
      }
      if ((is_tokens(i) ? dtype : variant.parameters) == Dtype::kFloat16) {
        for (std::size_t k = 0; k < truth.size(); ++k) {
          if (std::fabs(truth[k]) < kBeyondFloat16) continue;
          expect(gradient[k] == std::copysign(INFINITY, truth[k]),
                 "a gradient that float16 does not hold is finite");
          gradient[k] = truth[k] = 0;
        }
      }
      // A gradient of few numbers, each a sum over all tokens, may cancel as a whole.
      const double sums = is_tokens(i) ? 0 : 0.1;
      close(std::string("d") + scalar::kNames[i], gradient, truth, 2 * allowed, std::fmax(floor, sums));
      if (is_tokens(i))
        expect(found.gradients.tokens[i].gaps_are_unwritten(), "a gradient has writes between its rows");
    }
  };
  check((1u << kOperands) - 1);
  if (seed % 4 == 0) {
    for (int i = 0; i < kOperands; ++i) {
      if (x.elements[i] > 0) check(1u << i);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::printf("%s kernels\n", flatten::cpu::isa_in_use().c_str());
  const unsigned first = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 0;
  const unsigned count = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 120;
  for (const Dtype dtype : {Dtype::kFloat64, Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    largest = 0;
    for (unsigned seed = first; seed < first + count; ++seed) test(seed, dtype);
    std::printf("dtype %d: errors up to %.2f of what is allowed\n", static_cast<int>(dtype), largest);
  }
  std::printf("%u calls of every dtype, %d failures\n", count, failures);
  return failures == 0 ? 0 : 1;
}
