#include "arguments.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "dtypes.h"
#include "show.h"

namespace flatten {
namespace {

using torch::headeronly::DeviceType;
using Sizes = std::vector<std::int64_t>;
using SizesRef = torch::headeronly::IntHeaderOnlyArrayRef;

/// Collects the operator's name once, so that each check is one line: expect(cond, "what", values...).
/// `input` is what messages call the tensor that sets dtype and device.
struct Checker {
  const char* op;
  const char* input = "q";

  template <class... Parts>
  void expect(bool condition, const Parts&... parts) const {
    if (condition) return;
    std::ostringstream message;
    message << "flatten." << op << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  void dtype(const char* name, const Tensor& t, const Tensor& q) const {
    expect(scalar_type_of(t) == scalar_type_of(q), name, " has dtype ", show(scalar_type_of(t)),
           ", expected ", input, "'s ", show(scalar_type_of(q)));
  }

  void device(const char* name, const Tensor& t, const Tensor& q) const {
    expect(t.device() == q.device(), name, " is on ", show_device(t), ", expected ", input, "'s device ",
           show_device(q));
    expect(t.layout() == torch::headeronly::Layout::Strided, name, " is not a dense strided tensor");
  }

  /// (batch, tokens, channels) tokens in a dtype the kernels have.
  Dtype tokens(const char* name, const Tensor& t) const {
    expect(t.defined(), name, " is None, expected a tensor of (batch, tokens, channels)");
    expect(t.layout() == torch::headeronly::Layout::Strided, name, " is not a dense strided tensor");
    expect(t.dim() == 3, name, " has shape ", show(t.sizes()),
           ", expected 3 dimensions (batch, tokens, channels)");
    // The CUDA kernels number the tokens of an image in 32 bits.
    expect(t.device().type() != DeviceType::CUDA || t.size(1) <= std::numeric_limits<std::int32_t>::max(),
           name, " has shape ", show(t.sizes()), ", expected at most ",
           std::numeric_limits<std::int32_t>::max(), " tokens on CUDA");
    const std::optional<Dtype> dtype = dtype_of(scalar_type_of(t));
    expect(dtype.has_value(), name, " has dtype ", show(scalar_type_of(t)),
           ", expected float32, float16, bfloat16 or float64");
    return *dtype;
  }

  /// A parameter of one given shape, fp32 or in q's dtype, on q's device; contiguous after the call.
  Parameter parameter(const char* name, Tensor& t, SizesRef expected, const Tensor& q, Dtype dtype) const {
    expect(same(t.sizes(), expected), name, " has shape ", show(t.sizes()), ", expected ", show(expected));
    return parameter_of_any_shape(name, t, q, dtype);
  }

  Parameter parameter_of_any_shape(const char* name, Tensor& t, const Tensor& q, Dtype dtype) const {
    device(name, t, q);
    const ScalarType type = scalar_type_of(t), q_type = scalar_type(dtype);
    const bool own = type == q_type;
    const bool widened = type == ScalarType::Float && dtype != Dtype::kFloat64;
    expect(own || widened, name, " has dtype ", show(type), ", expected ", show(q_type),
           dtype == Dtype::kFloat64 || dtype == Dtype::kFloat32 ? "" : " or float32");
    if (!t.is_contiguous()) t = torch::stable::contiguous(t);
    return {data(name, t), own ? dtype : Dtype::kFloat32};
  }

  /// The elements of a tensor; a meta tensor's are nowhere, a tensor whose storage was freed is refused.
  const void* data(const char* name, const Tensor& t) const {
    const void* elements = t.const_data_ptr();
    expect(elements != nullptr || t.numel() == 0 || t.device().type() == DeviceType::Meta, name,
           " has no storage: it was freed");
    return elements;
  }

  /// Channels adjacent: as it is, or contiguous.
  Tokens readable(const char* name, Tensor& t) const {
    if (t.stride(2) != 1 && t.size(2) != 1) t = torch::stable::contiguous(t);
    return {data(name, t), t.stride(0), t.stride(1)};
  }

  /// A number the kernels compute with: in float32, or in float64 for float64 tokens.
  void held(const char* name, double value, Dtype dtype) const {
    const bool wide = accumulate_dtype(dtype) == Dtype::kFloat64;
    const double least = wide ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
    const double most = wide ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
    expect(value == 0 || (value >= least && value <= most), name, " is ", value, ", expected a number of ",
           show(scalar_type(accumulate_dtype(dtype))), ", in which the call is computed: 0 or from ", least,
           " to ", most);
  }

  /// Two positive numbers, or two non-negative ones.
  void pair(const char* name, const Sizes& value, std::int64_t least) const {
    expect(value.size() == 2, name, " has ", value.size(), " numbers ", show(value),
           ", expected 2 (height, width)");
    expect(value[0] >= least && value[1] >= least, name, " is ", show(value),
           ", expected numbers of at least ", least);
  }

  /// How the tokens tile the map and its windows.
  void geometry(Geometry& g, const OptionalSize& size, const OptionalSize& window,
                const OptionalSize& shift) const {
    g.map_h = g.window_h = 1;
    g.map_w = g.window_w = g.keys;
    if (size) {
      pair("size", *size, 1);
      const std::int64_t h = (*size)[0], w = (*size)[1];
      expect(h <= g.keys / w, "size ", show(*size), " has more positions than there are tokens (", g.keys,
             ")");
      g.prefix = g.keys - h * w;
      g.map_h = g.window_h = h;
      g.map_w = g.window_w = w;
    }
    if (window) {
      expect(size.has_value(), "window ", show(*window), " was given without size");
      pair("window", *window, 1);
      g.window_h = (*window)[0];
      g.window_w = (*window)[1];
      expect(g.map_h % g.window_h == 0 && g.map_w % g.window_w == 0, "window ", show(*window),
             " does not divide size ", show(*size));
      expect(g.queries == g.keys, "window ", show(*window), " needs as many queries as keys, got ", g.queries,
             " and ", g.keys);
      expect(g.prefix == 0, "window ", show(*window), " allows no prefix tokens, but size ", show(*size),
             " leaves ", g.prefix, " of ", g.keys, " tokens outside the map");
    }
    if (shift) {
      expect(window.has_value(), "shift ", show(*shift), " was given without window");
      pair("shift", *shift, 0);
      g.shift_h = (*shift)[0];
      g.shift_w = (*shift)[1];
      expect(g.shift_h < g.window_h && g.shift_w < g.window_w, "shift ", show(*shift),
             " is not smaller than window ", show(*window));
    }
  }

  /// The depthwise kernel and its bias. The names are the operator's own.
  Taps taps(const char* weight_name, OptionalTensor& weight, const char* bias_name, OptionalTensor& bias,
            const Geometry& g, bool has_size, const Tensor& q, Dtype dtype) const {
    Taps taps;
    if (!weight) {
      expect(!bias, bias_name, " was given without ", weight_name);
      return taps;
    }
    expect(has_size, weight_name, " was given without size");
    expect(g.queries == g.keys, weight_name, " needs as many queries as keys, got ", g.queries, " and ",
           g.keys);
    const SizesRef shape = weight->sizes();
    expect(shape.size() == 4 && shape[1] == 1 && (shape[0] == g.head_dim || shape[0] == g.channels()),
           weight_name, " has shape ", show(shape), ", expected (", g.head_dim,
           ", 1, kh, kw) shared by the heads or (", g.channels(), ", 1, kh, kw)");
    expect(shape[2] % 2 == 1 && shape[3] % 2 == 1, weight_name, " has shape ", show(shape),
           ", expected an odd kernel height and width");
    taps.kernel_h = shape[2];
    taps.kernel_w = shape[3];
    taps.per_channel = shape[0] != g.head_dim;
    taps.weight = parameter_of_any_shape(weight_name, *weight, q, dtype);
    if (bias) taps.bias = parameter(bias_name, *bias, {shape[0]}, q, dtype);
    return taps;
  }
};

/// Whether the numbers a call computes with can be counted: S alone has C D of them for every window.
bool is_countable(const Geometry& g) {
  std::int64_t count = g.channels();
  for (const std::int64_t factor : {g.head_dim + 1, g.batch > 0 ? g.batch : 1, g.windows()}) {
    if (__builtin_mul_overflow(count, factor, &count)) return false;
  }
  return count <= std::numeric_limits<std::int64_t>::max() / 8;
}

}  // namespace

AttentionArgs Arguments::attention(Focus focus) {
  const bool mapped = focus == Focus::kLinear;  // without what belongs to the focused mapping
  AttentionArgs args;
  args.q = next<Tensor>();
  args.k = next<Tensor>();
  args.v = next<Tensor>();
  args.num_heads = next<std::int64_t>();
  if (!mapped) args.scale = next<OptionalTensor>();
  if (!mapped) args.key_bias = next<OptionalTensor>();
  args.dwc_weight = next<OptionalTensor>();
  args.dwc_bias = next<OptionalTensor>();
  args.size = next<OptionalSize>();
  args.window = next<OptionalSize>();
  args.shift = next<OptionalSize>();
  if (focus == Focus::kFocused) args.focusing_factor = next<double>();
  if (focus == Focus::kEither) args.focusing_factor = next<std::optional<double>>();
  args.eps = next<double>();
  return args;
}

ConvArgs Arguments::conv() {
  ConvArgs args;
  args.x = next<Tensor>();
  args.weight = next<Tensor>();
  args.bias = next<OptionalTensor>();
  args.size = next<std::vector<std::int64_t>>();
  args.window = next<OptionalSize>();
  args.shift = next<OptionalSize>();
  return args;
}

void Arguments::end() const {
  if (next_ != end_)
    throw std::logic_error("flatten: a schema and its kernel differ in the number of arguments");
}

void check(AttentionArgs& args, AttentionInputs& in) {
  const bool focused = args.focusing_factor.has_value();
  const Checker check{focused ? "attention" : "linear_attention"};

  in.dtype = check.tokens("q", args.q);
  check.tokens("k", args.k);
  check.tokens("v", args.v);
  for (auto [name, t] : {std::pair<const char*, Tensor*>{"k", &args.k}, {"v", &args.v}}) {
    check.device(name, *t, args.q);
    check.dtype(name, *t, args.q);
  }
  Geometry& g = in.geometry;
  g.batch = args.q.size(0);
  g.queries = args.q.size(1);
  g.keys = args.k.size(1);
  const std::int64_t channels = args.q.size(2);
  check.expect(channels >= 1, "q has shape ", show(args.q.sizes()), ", expected at least one channel");
  check.expect(g.keys >= 1, "k has shape ", show(args.k.sizes()), ", expected at least one key");
  check.expect(same(args.k.sizes(), {g.batch, g.keys, channels}), "k has shape ", show(args.k.sizes()),
               ", expected (", g.batch, ", M, ", channels, ") to go with q ", show(args.q.sizes()));
  check.expect(same(args.v.sizes(), args.k.sizes()), "v has shape ", show(args.v.sizes()), ", expected k's ",
               show(args.k.sizes()));
  check.expect(args.num_heads >= 1 && channels % args.num_heads == 0, "num_heads is ", args.num_heads,
               ", expected a positive divisor of the ", channels, " channels");
  g.heads = args.num_heads;
  g.head_dim = g.value_dim = channels / args.num_heads;

  check.geometry(g, args.size, args.window, args.shift);
  check.expect(is_countable(g), "q has shape ", show(args.q.sizes()), ", too large for ", g.heads,
               " heads in ", g.windows(), " windows");
  in.taps = check.taps("dwc_weight", args.dwc_weight, "dwc_bias", args.dwc_bias, g, args.size.has_value(),
                       args.q, in.dtype);
  check.expect(std::isfinite(args.eps) && args.eps >= 0, "eps is ", args.eps,
               ", expected a finite number >= 0");
  check.held("eps", args.eps, in.dtype);
  in.eps = args.eps;
  in.mapping.map = focused ? FeatureMap::kFocused : FeatureMap::kNone;
  if (focused) {
    check.expect(std::isfinite(*args.focusing_factor) && *args.focusing_factor >= 1, "focusing_factor is ",
                 *args.focusing_factor, ", expected a finite number >= 1");
    check.held("focusing_factor", *args.focusing_factor, in.dtype);
    in.mapping.focusing_factor = *args.focusing_factor;
    if (args.scale) in.mapping.scale = check.parameter("scale", *args.scale, {channels}, args.q, in.dtype);
    if (args.key_bias) {
      in.mapping.key_bias =
          check.parameter("key_bias", *args.key_bias,
                          {args.window ? g.window_h * g.window_w : g.keys, channels}, args.q, in.dtype);
    }
  } else {
    check.expect(!args.scale && !args.key_bias,
                 "scale and key_bias belong to the focused mapping, expected None without focusing_factor");
  }
  in.query = check.readable("q", args.q);
  in.key = check.readable("k", args.k);
  in.value = check.readable("v", args.v);
}

void check(ConvArgs& args, ConvInputs& in) {
  const Checker check{"depthwise_conv", "x"};
  in.dtype = check.tokens("x", args.x);
  Geometry& g = in.geometry;
  g.batch = args.x.size(0);
  g.queries = g.keys = args.x.size(1);
  const std::int64_t channels = args.x.size(2);
  check.expect(channels >= 1 && g.keys >= 1, "x has shape ", show(args.x.sizes()),
               ", expected at least one token and one channel");
  check.expect(args.weight->defined(), "weight is None, expected (D, 1, kh, kw) with D dividing the ",
               channels, " channels of x");
  check.expect(args.weight->dim() == 4 && args.weight->size(0) >= 1 && channels % args.weight->size(0) == 0,
               "weight has shape ", show(args.weight->sizes()),
               ", expected (D, 1, kh, kw) with D dividing the ", channels, " channels of x");
  // A kernel of D < C filters is shared by C / D heads.
  g.head_dim = g.value_dim = args.weight->size(0);
  g.heads = channels / g.head_dim;
  check.geometry(g, args.size, args.window, args.shift);
  in.taps = check.taps("weight", args.weight, "bias", args.bias, g, args.size.has_value(), args.x, in.dtype);
  in.x = check.readable("x", args.x);
}

Tokens check_grad_out(const char* op, Tensor& grad_out, const Tensor& q) {
  const Checker check{op, "the input"};
  check.tokens("grad_out", grad_out);
  check.device("grad_out", grad_out, q);
  check.dtype("grad_out", grad_out, q);
  check.expect(same(grad_out.sizes(), q.sizes()), "grad_out has shape ", show(grad_out.sizes()),
               ", expected ", show(q.sizes()));
  return check.readable("grad_out", grad_out);
}

void check_saved_windows(std::int64_t count, const Tensor& q, const Geometry& g) {
  const Checker check{"attention_forward"};
  const std::int64_t all = g.batch * g.windows();
  if (q.device().type() == DeviceType::CUDA) {
    check.expect(count == 0 || count == all, "saved_windows is ", count, ", expected 0 or all ", all,
                 " windows on CUDA");
  }
  check.expect(count >= 0 && count <= all, "saved_windows is ", count, ", expected 0 to ", all);
}

SavedState check_state(const Tensor& state, const Tensor& q, const AttentionInputs& inputs) {
  const Checker check{"attention_backward"};
  check.expect(state.defined(), "state is None, expected what attention_forward returned");
  check.device("state", state, q);
  if (state.numel() == 0) return {nullptr, 0};
  const Geometry& g = inputs.geometry;
  const std::int64_t all = g.batch * g.windows(), each = window_state_elements(g);
  const std::int64_t windows = state.numel() / each;
  const bool may_be_part = q.device().type() != DeviceType::CUDA;
  check.expect(state.numel() == windows * each && windows <= all && (may_be_part || windows == all) &&
                   state.is_contiguous() &&
                   scalar_type_of(state) == scalar_type(accumulate_dtype(inputs.dtype)),
               "state has ", state.numel(), " elements of ", show(scalar_type_of(state)),
               ", expected what attention_forward returned: contiguous, ", each, " for each of ",
               may_be_part ? "at most " : "", all, " windows");
  return {check.data("state", state), windows};
}

}  // namespace flatten
