#include "states.h"

#include "checker.h"

namespace flatten {
namespace {

/// One window of `tokens`, without a map.
void set_geometry(Geometry& g, const Checker& check, const Tensor& tokens, const char* name,
                  std::int64_t num_heads) {
  const std::int64_t channels = tokens.size(2);
  check.expect(channels >= 1, name, " has shape ", show(tokens.sizes()), ", expected at least one channel");
  check.expect(num_heads >= 1 && channels % num_heads == 0, "num_heads is ", num_heads,
               ", expected a positive divisor of the ", channels, " channels");
  g.batch = tokens.size(0);
  g.queries = g.keys = g.map_w = g.window_w = tokens.size(1);
  g.heads = num_heads;
  g.head_dim = channels / num_heads;
}

bool is_countable(const Geometry& g) {
  std::int64_t count = g.heads;
  for (const std::int64_t factor : {g.head_dim + 1, g.value_dim + 1, g.batch > 0 ? g.batch : 1}) {
    if (__builtin_mul_overflow(count, factor, &count)) return false;
  }
  return count <= std::numeric_limits<std::int64_t>::max() / 8;
}

Tokens normalizer_features(const Checker& check, const char* name, OptionalTensor& t, const Mapping& mapping,
                           const std::string& feature_map, const Tensor& like) {
  check.expect(!t || mapping.map == FeatureMap::kNone, name,
               " goes with feature_map 'none', features that are mapped already, not with '", feature_map,
               "'");
  return check.beside(name, t, Sizes(like.sizes().begin(), like.sizes().end()), like);
}

}  // namespace

StateArgs take_state(Arguments& given) {
  StateArgs args;
  args.k = given.next<Tensor>();
  args.v = given.next<Tensor>();
  args.num_heads = given.next<std::int64_t>();
  args.scale = given.next<OptionalTensor>();
  args.key_bias = given.next<OptionalTensor>();
  args.focusing_factor = given.next<double>();
  args.eps = given.next<double>();
  args.feature_map = given.next<std::string>();
  args.rotary = given.next<OptionalTensor>();
  args.key_weight = given.next<OptionalTensor>();
  args.normalizer_k = given.next<OptionalTensor>();
  return args;
}

FromStateArgs take_from_state(Arguments& given) {
  FromStateArgs args;
  args.q = given.next<Tensor>();
  args.state = given.next<Tensor>();
  args.num_heads = given.next<std::int64_t>();
  args.scale = given.next<OptionalTensor>();
  args.focusing_factor = given.next<double>();
  args.eps = given.next<double>();
  args.feature_map = given.next<std::string>();
  args.rotary = given.next<OptionalTensor>();
  args.normalizer_q = given.next<OptionalTensor>();
  args.normalizer = given.next<std::string>();
  args.similarity_scale = given.next<double>();
  args.gate = given.next<OptionalTensor>();
  args.gate_activation = given.next<std::string>();
  return args;
}

void check(StateArgs& args, AttentionInputs& in) {
  const Checker check{"attention_state", "k"};
  in.dtype = check.tokens("k", args.k);
  check.tokens("v", args.v);
  check.device("v", args.v, args.k);
  check.dtype("v", args.v, args.k);
  Geometry& g = in.geometry;
  set_geometry(g, check, args.k, "k", args.num_heads);
  check.expect(args.v.size(0) == g.batch && args.v.size(1) == g.keys && args.v.size(2) >= 1 &&
                   args.v.size(2) % g.heads == 0,
               "v has shape ", show(args.v.sizes()), ", expected (", g.batch, ", ", g.keys,
               ", channels for each of the ", g.heads, " heads) to go with k ", show(args.k.sizes()));
  g.value_dim = args.v.size(2) / g.heads;
  check.expect(is_countable(g), "k has shape ", show(args.k.sizes()), ", too large for ", g.heads, " heads");
  in.eps = check.eps(args.eps, in.dtype);
  in.mapping = check.mapping(args.feature_map, args.focusing_factor, args.scale, &args.key_bias, g.keys, g,
                             args.k, in.dtype);
  in.key = check.readable("k", args.k);
  in.value = check.readable("v", args.v);
  in.general.rotation = check.rotation(args.rotary, g.keys, g, args.k, in.dtype);
  in.general.key_weight = check.key_weight(args.key_weight, g, args.k, in.dtype);
  in.general.normalizer_key =
      normalizer_features(check, "normalizer_k", args.normalizer_k, in.mapping, args.feature_map, args.k);
}

void check(FromStateArgs& args, AttentionInputs& in) {
  const Checker check{"attention_from_state"};
  in.dtype = check.tokens("q", args.q);
  Geometry& g = in.geometry;
  set_geometry(g, check, args.q, "q", args.num_heads);
  check.expect(args.state.defined(), "state is None, expected what attention_state returned");
  check.device("state", args.state, args.q);
  const SizesRef shape = args.state.sizes();
  check.expect(
      shape.size() == 4 && same(shape.slice(0, 3), {g.batch, g.heads, g.head_dim + 1}) && shape[3] >= 2,
      "state must be (", g.batch, ", num_heads = ", g.heads, ", ", g.head_dim + 1, ", D_v + 1) to go with q ",
      show(args.q.sizes()), ", but it is ", show(shape));
  g.value_dim = shape[3] - 1;
  check_whole_state(check.op, "state", args.state, args.q, in);
  in.eps = check.eps(args.eps, in.dtype);
  in.mapping =
      check.mapping(args.feature_map, args.focusing_factor, args.scale, nullptr, 0, g, args.q, in.dtype);
  in.query = check.readable("q", args.q);
  General& general = in.general;
  general.rotation = check.rotation(args.rotary, g.queries, g, args.q, in.dtype);
  general.normalizer_query =
      normalizer_features(check, "normalizer_q", args.normalizer_q, in.mapping, args.feature_map, args.q);
  general.normalizer = check.normalizer(args.normalizer);
  general.similarity_scale = check.similarity_scale(args.similarity_scale, in.dtype);
  general.gate = check.beside("gate", args.gate, {g.batch, g.queries, g.value_channels()}, args.q);
  general.gate_activation = check.activation_of(args.gate, args.gate_activation);
}

const void* check_whole_state(const char* op, const char* name, Tensor& state, const Tensor& beside,
                              const AttentionInputs& in) {
  const Checker check{op};
  const Geometry& g = in.geometry;
  const Sizes expected{g.batch, g.heads, g.head_dim + 1, g.value_dim + 1};
  check.expect(state.defined(), name, " is None, expected a tensor of ", show(expected));
  check.device(name, state, beside);
  check.expect(same(state.sizes(), expected), name, " has shape ", show(state.sizes()), ", expected ",
               show(expected));
  const ScalarType dtype = scalar_type(accumulate_dtype(in.dtype));
  check.expect(scalar_type_of(state) == dtype, name, " has dtype ", show(scalar_type_of(state)),
               ", expected ", show(dtype), ", in which states are summed");
  if (!state.is_contiguous()) state = torch::stable::contiguous(state);
  return check.data(name, state);
}

}  // namespace flatten
