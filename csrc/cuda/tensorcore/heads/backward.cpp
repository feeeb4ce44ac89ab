// The backward launches of the kernels of single heads.
#include "../../general/planning.h"
#include "plan.h"

namespace flatten::cuda::tensorcore::heads {
namespace {

DifferentiateParams differentiate_of(const AttentionBackward& p, const Features& features,
                                     const Tokens& other, bool of_key, const Device& device) {
  const std::int64_t pieces = p.geometry.batch * p.geometry.windows() * features.heads;
  const RowChunks chunks(features.rows.tokens, kTileRows, 128, pieces, device);
  DifferentiateParams params{};
  params.features = features;
  params.other = tokens(other);
  params.of_key = of_key;
  params.eps = static_cast<float>(p.eps);
  params.chunk = chunks.chunk;
  params.chunks = chunks.chunks;
  params.gradient = tokens(of_key ? p.grad_key : p.grad_query);
  return params;
}

/// `regions` is 0 where no rectangle fits.
CorrelateParams correlate_of(const AttentionBackward& p, const Kernels& kernels, const Device& device) {
  const Geometry& g = p.geometry;
  CorrelateParams params{};
  params.rows = key_features(p).rows;
  params.pixels = tokens(p.value);
  params.grad_out = tokens(p.grad_out);
  params.heads = static_cast<int>(g.heads);
  params.head_dim = static_cast<int>(g.head_dim);
  params.kernel_h = static_cast<int>(p.taps.kernel_h);
  params.kernel_w = static_cast<int>(p.taps.kernel_w);
  params.windows = static_cast<int>(g.batch * g.windows());
  params.per_channel = p.taps.per_channel;
  const Rectangles cut(params.rows.grid, p.taps, kMany, device, [&](int height, int width) {
    params.region_h = height, params.region_w = width;
    return kernels.correlate_shared(params);
  });
  if (!cut.fit) return params;
  params.regions = cut.count;
  params.regions_x = cut.columns;
  params.region_h = cut.height;
  params.region_w = cut.width;
  // Few blocks, since each leaves sums for all taps.
  const std::int64_t wanted = ceil_div(2 * device.multiprocessors, g.heads);
  params.blocks = static_cast<int>(std::min<std::int64_t>(wanted, std::int64_t{cut.count} * params.windows));
  return params;
}

/// All that a call enqueues.
struct Backward {
  const Kernels* kernels;
  int windows;
  Features query, key;
  MeasureParams measured;
  StatePass state_pass;  // where the forward kept no S and m
  MultiplyParams query_terms, value;
  StatePass gradient_pass;
  DifferentiateParams of_query, of_key;
  CorrelateParams taps;
  general::ParameterSums sums;
  const float* saved_state;
  std::int64_t key_scratch = 0;  // bytes for dk, where only key_bias's gradient wants it
  bool want_taps, want_matrix, want_query, want_key, want_value;
  float *state = nullptr, *state_gradient = nullptr;
  float *query_parts = nullptr, *key_parts = nullptr;

  Backward(const AttentionBackward& p, const Device& device)
      : kernels(&kernels_of(p)),
        windows(static_cast<int>(p.geometry.batch * p.geometry.windows())),
        query(query_features(p)),
        key(key_features(p)),
        measured(measure_of(p, query, key)),
        state_pass(p, key, p.value, 1.0 / static_cast<double>(p.geometry.window_keys()), device),
        query_terms(multiply_of(p, Product::kQueryTerms, query, nullptr, *kernels, device)),
        value(multiply_of(p, Product::kValueGradient, key, p.taps ? &p.grad_out : nullptr, *kernels, device)),
        gradient_pass(p, query, p.grad_out, 1.0 / static_cast<double>(p.geometry.window_keys()), device),
        of_query(differentiate_of(p, query, p.grad_out, false, device)),
        of_key(differentiate_of(p, key, p.value, true, device)),
        taps(p.taps ? correlate_of(p, *kernels, device) : CorrelateParams{}),
        sums(p, general::plan_of(p, device), std::int64_t{windows} * (of_query.chunks + of_key.chunks),
             std::int64_t{taps.blocks} * (taps.per_channel ? 1 : taps.heads), device),
        saved_state(static_cast<const float*>(p.state)),
        want_taps(p.grad_weight || p.grad_bias),
        want_query(p.grad_query.data || p.grad_scale),
        want_key(p.grad_key.data || p.grad_scale || p.grad_key_bias),
        want_value(p.grad_value.data) {
    want_matrix = want_key || want_value;
    query_terms.other = tokens(p.grad_out);
    value.other = tokens(p.value);
    value.out = tokens(p.grad_value);
    value.mirrored = true;
    const Geometry& g = p.geometry;
    if (p.grad_key_bias && !p.grad_key.data) {
      key_scratch = g.batch * g.keys * g.channels() * element_size(p.dtype);
      const MutableTokens dense{nullptr, g.keys * g.channels(), g.channels()};
      of_key.gradient = tokens(dense);
      sums.parameters.grad_key = {nullptr, dense.batch_stride, dense.token_stride};
    }
  }

  std::int64_t terms_bytes(int side, int numbers) const {
    return measured.rows[side] * query.heads * numbers * std::int64_t{sizeof(float)};
  }

  void place(Workspace& workspace) {
    query.norms = workspace.take<RowNorms>(measured.rows[0] * sizeof(RowNorms));
    key.norms = workspace.take<RowNorms>(measured.rows[1] * sizeof(RowNorms));
    query_parts = workspace.take<float>(terms_bytes(0, 2));
    key_parts = workspace.take<float>(terms_bytes(1, 1));
    if (!saved_state) {
      state = workspace.take<float>(state_pass.bytes());
      state_pass.place(state, workspace);
    }
    const float* whole = saved_state ? saved_state : state;
    state_gradient = workspace.take<float>(gradient_pass.bytes());
    gradient_pass.place(state_gradient, workspace);
    if (key_scratch) {
      void* scratch = workspace.take(key_scratch);
      of_key.gradient.data = scratch;
      sums.parameters.grad_key.data = scratch;
    }
    sums.place(workspace);

    measured.sides[0] = query_terms.features = gradient_pass.params.features = of_query.features = query;
    measured.sides[1] = state_pass.params.features = value.features = of_key.features = key;
    query_terms.state = of_query.state = whole;
    value.state = of_key.state = state_gradient;
    query_terms.terms = query_parts;
    gradient_pass.params.terms = reinterpret_cast<const float2*>(query_parts);
    of_query.terms = query_parts;
    value.terms = key_parts;
    of_key.terms = key_parts;
    of_query.scale_partials = of_key.scale_partials = static_cast<float*>(sums.scale_partials());
    if (of_key.scale_partials) {  // after the queries'
      of_key.scale_partials += std::int64_t{windows} * of_query.chunks * query.heads * query.head_dim;
    }
    taps.partials = static_cast<float*>(sums.taps_partials());
  }

  cudaError_t launch(cudaStream_t stream) const {
    cudaError_t error = cudaSuccess;
    const auto then = [&](bool wanted, auto enqueue) {
      if (error == cudaSuccess && wanted) error = enqueue();
    };
    const bool attention = want_query || want_matrix;
    then(attention, [&] { return kernels->measure(measured, stream); });
    then(attention && !saved_state, [&] { return state_pass.launch(state, stream); });
    then(attention, [&] { return kernels->multiply(query_terms, windows, stream); });
    then(want_matrix, [&] { return gradient_pass.launch(state_gradient, stream); });
    then(want_matrix, [&] { return kernels->multiply(value, windows, stream); });
    then(want_query, [&] { return kernels->differentiate(of_query, windows, stream); });
    then(want_key, [&] { return kernels->differentiate(of_key, windows, stream); });
    then(want_taps, [&] { return kernels->correlate(taps, stream); });
    then(true, [&] { return sums.launch(stream); });
    return error;
  }
};

}  // namespace

Call choose(const AttentionBackward& p, const Device& device) {
  if (const char* why = unsuited(p, device)) return refuse(why);
  if (!aligned(p.grad_out)) return refuse(kUnaligned);
  for (const MutableTokens* x : {&p.grad_query, &p.grad_key, &p.grad_value}) {
    if (x->data && !aligned(*x)) return refuse(kUnaligned);
  }
  Backward backward(p, device);
  if (backward.value.regions == 0 || (p.taps && backward.taps.regions == 0)) return refuse(kTooMuchShared);
  Workspace measured;
  backward.place(measured);
  return {"tensorcore::heads::multiply, differentiate", nullptr, measured.taken(),
          [backward](void* memory, cudaStream_t stream) {
            Backward placed = backward;
            Workspace workspace(memory);
            placed.place(workspace);
            return placed.launch(stream);
          }};
}

}  // namespace flatten::cuda::tensorcore::heads
