#include "arguments.h"

#include "checker.h"
#include "torch_errors.h"

namespace flatten {
namespace {

/// Whether the numbers a call computes with can be counted: S alone has C D of them for every window.
bool is_countable(const Geometry& g) {
  std::int64_t count = g.channels();
  for (const std::int64_t factor : {g.value_dim + 1, g.batch > 0 ? g.batch : 1, g.windows()}) {
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
  if (focus != Focus::kEither) general(focus, args);
  return args;
}

void Arguments::general(Focus focus, AttentionArgs& args) {
  if (focus == Focus::kFocused) args.feature_map = next<std::string>();
  if (focus == Focus::kEither)
    args.feature_map = next<std::optional<std::string>>().value_or(args.feature_map);
  if (focus == Focus::kLinear) take_normalizer(args);
  args.rotary = next<OptionalTensor>();
  args.key_weight = next<OptionalTensor>();
  args.normalizer = next<std::string>();
  args.similarity_scale = next<double>();
  args.gate = next<OptionalTensor>();
  args.gate_activation = next<std::string>();
  if (focus == Focus::kEither) take_normalizer(args);
}

void Arguments::take_normalizer(AttentionArgs& args) {
  args.normalizer_q = next<OptionalTensor>();
  args.normalizer_k = next<OptionalTensor>();
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
  const bool linear = !args.focusing_factor;
  const Checker check{linear ? "linear_attention" : "attention"};

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
  check.expect(args.v.size(0) == g.batch && args.v.size(1) == g.keys &&
                   (linear ? args.v.size(2) >= 1 : args.v.size(2) == channels),
               "v has shape ", show(args.v.sizes()), ", expected k's ", show(args.k.sizes()),
               linear ? ", or other channels for each head" : "");
  check.expect(args.num_heads >= 1 && channels % args.num_heads == 0, "num_heads is ", args.num_heads,
               ", expected a positive divisor of the ", channels, " channels");
  g.heads = args.num_heads;
  g.head_dim = channels / args.num_heads;
  check.expect(args.v.size(2) % g.heads == 0, "v has shape ", show(args.v.sizes()),
               ", expected channels for each of the ", g.heads, " heads");
  g.value_dim = args.v.size(2) / g.heads;

  check.geometry(g, args.size, args.window, args.shift);
  check.expect(is_countable(g), "q has shape ", show(args.q.sizes()), ", too large for ", g.heads,
               " heads in ", g.windows(), " windows");
  in.taps = check.taps("dwc_weight", args.dwc_weight, "dwc_bias", args.dwc_bias, g, args.size.has_value(),
                       args.q, in.dtype);
  in.eps = check.eps(args.eps, in.dtype);
  if (linear) {
    in.mapping.map = FeatureMap::kNone;
    check.expect(!args.scale && !args.key_bias,
                 "scale and key_bias belong to the focused mapping, expected None without focusing_factor");
  } else {
    const std::int64_t rows = args.window ? g.window_h * g.window_w : g.keys;
    in.mapping = check.mapping(args.feature_map, *args.focusing_factor, args.scale, &args.key_bias, rows, g,
                               args.q, in.dtype);
  }
  in.query = check.readable("q", args.q);
  in.key = check.readable("k", args.k);
  in.value = check.readable("v", args.v);

  General& general = in.general;
  if (args.rotary) {
    check.expect(g.queries == g.keys, "rotary needs as many queries as keys, got ", g.queries, " and ",
                 g.keys);
    general.rotation = check.rotation(args.rotary, g.window_keys(), g, args.q, in.dtype);
  }
  general.key_weight = check.key_weight(args.key_weight, g, args.q, in.dtype);
  general.normalizer = check.normalizer(args.normalizer);
  general.similarity_scale = check.similarity_scale(args.similarity_scale, in.dtype);
  general.gate = check.beside("gate", args.gate, {g.batch, g.queries, g.value_channels()}, args.q);
  general.gate_activation = check.activation_of(args.gate, args.gate_activation);
  check.expect(linear || (!args.normalizer_q && !args.normalizer_k),
               "normalizer_q and normalizer_k are linear_attention's, expected None with a focusing_factor");
  general.normalizer_query =
      check.beside("normalizer_q", args.normalizer_q, {g.batch, g.queries, channels}, args.q);
  general.normalizer_key =
      check.beside("normalizer_k", args.normalizer_k, {g.batch, g.keys, channels}, args.q);
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
  const bool per_image = args.weight->dim() == 5;
  check.expect(per_image || (args.weight->dim() == 4 && args.weight->size(0) >= 1 &&
                             channels % args.weight->size(0) == 0),
               "weight has shape ", show(args.weight->sizes()),
               ", expected (D, 1, kh, kw) with D dividing the ", channels, " channels of x");
  // A kernel of D < C filters is shared by C / D heads.
  g.head_dim = g.value_dim = per_image ? channels : args.weight->size(0);
  g.heads = channels / g.head_dim;
  check.geometry(g, args.size, args.window, args.shift);
  in.taps = check.taps("weight", args.weight, "bias", args.bias, g, args.size.has_value(), args.x, in.dtype);
  in.x = check.readable("x", args.x);
}

Tokens check_like_out(const char* op, const char* name, Tensor& t, const Tensor& q, const Geometry& g) {
  const Checker check{op, "the input"};
  check.tokens(name, t);
  check.device(name, t, q);
  check.dtype(name, t, q);
  const Sizes expected{g.batch, g.queries, g.value_channels()};
  check.expect(same(t.sizes(), expected), name, " has shape ", show(t.sizes()), ", expected ",
               show(expected));
  return check.readable(name, t);
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
  const std::int64_t all = g.batch * g.windows(), each = window_state_elements(inputs);
  const std::int64_t windows = state.numel() / each;
  const bool may_be_part = q.device().type() != DeviceType::CUDA;
  check.expect(state.numel() == windows * each && windows <= all && (may_be_part || windows == all) &&
                   state.is_contiguous() &&
                   scalar_type_of(state) == scalar_type(accumulate_dtype(inputs.dtype)),
               "state has ", state.numel(), " elements of ", show(scalar_type_of(state)),
               ", expected what attention_forward returned: contiguous, ", each, " for each of ",
               may_be_part ? "at most " : "", all, " windows");
  std::int64_t offset = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(state.get(), &offset));
  if (offset != 0) return {nullptr, 0};  // unfilled_state()
  return {check.data("state", state), windows};
}

}  // namespace flatten
