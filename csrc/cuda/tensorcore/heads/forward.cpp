// Which calls the kernels of single heads take, and their forward launches.
#include "plan.h"

namespace flatten::cuda::tensorcore::heads {
namespace {

Features features_of(const AttentionInputs& p, const Tokens& x, std::int64_t rows) {
  const Geometry& g = p.geometry;
  return {tokens(x),
          {grid_of(g), static_cast<int>(g.prefix), static_cast<int>(rows)},
          focus_of(p),
          /*norms=*/nullptr,
          static_cast<int>(g.heads),
          static_cast<int>(g.head_dim)};
}

/// All that a call enqueues.
struct Forward {
  const Kernels* kernels;
  Features query, key;
  MeasureParams measured;
  StatePass state_pass;
  MultiplyParams output;
  int windows;
  float* saved_state;
  float* state = nullptr;

  Forward(const AttentionForward& p, const Device& device)
      : kernels(&kernels_of(p)),
        query(query_features(p)),
        key(key_features(p)),
        measured(measure_of(p, query, key)),
        state_pass(p, key, p.value, 1.0 / static_cast<double>(p.geometry.window_keys()), device),
        output(multiply_of(p, Product::kOutput, query, p.taps ? &p.value : nullptr, *kernels, device)),
        windows(static_cast<int>(p.geometry.batch * p.geometry.windows())),
        saved_state(static_cast<float*>(p.state)) {
    output.out = tokens(p.out);
    output.bias = floats(p.taps.bias);
  }

  void place(Workspace& workspace) {
    query.norms = workspace.take<RowNorms>(measured.rows[0] * sizeof(RowNorms));
    key.norms = workspace.take<RowNorms>(measured.rows[1] * sizeof(RowNorms));
    state = saved_state ? saved_state : workspace.take<float>(state_pass.bytes());
    state_pass.place(state, workspace);
    measured.sides[0] = output.features = query;
    measured.sides[1] = state_pass.params.features = key;
    output.state = state;
  }

  cudaError_t launch(cudaStream_t stream) const {
    cudaError_t error = kernels->measure(measured, stream);
    if (error == cudaSuccess) error = state_pass.launch(state, stream);
    return error == cudaSuccess ? kernels->multiply(output, windows, stream) : error;
  }
};

}  // namespace

const char* unsuited(const AttentionInputs& p, const Device& device) {
  const Geometry& g = p.geometry;
  if (device.compute_capability < 80) return kTooOld;
  if (p.dtype != Dtype::kBFloat16 && p.dtype != Dtype::kFloat16) return kNotHalf;
  if (const char* why = more_general(p)) return why;
  if (g.head_dim % 8 != 0 || g.head_dim > 128) return "a head dimension that is no multiple of 8 up to 128";
  if (g.batch < 1 || g.queries < 1) return "nothing to compute";
  if (g.heads > kMostBlocks || g.channels() * 4 > device.shared_bytes)
    return "more channels than a block holds";
  const std::int64_t rows = std::max(g.queries, g.keys);
  if (rows > kMany || g.batch * g.windows() * ceil_div(rows, 32) > kMany) return "more than 2^30 tokens";
  for (const Tokens* x : {&p.query, &p.key, &p.value}) {
    if (!aligned(*x)) return kUnaligned;
  }
  if (!aligned(p.mapping.key_bias.data)) return "key_bias is not aligned to 16 bytes";
  return nullptr;
}

const Kernels& kernels_of(const AttentionInputs& p) {
  return *with_half<const Kernels*>(p.dtype, [&](auto dtype) {
    switch (padded(p.geometry.head_dim)) {
      case 32:
        return &kernels<dtype, 32>();
      case 64:
        return &kernels<dtype, 64>();
      default:
        return &kernels<dtype, 128>();
    }
  });
}

Features query_features(const AttentionInputs& p) {
  Features features = features_of(p, p.query, p.geometry.window_queries());
  if (p.geometry.queries != p.geometry.keys) features.rows.grid.raster = true;  // they are not on the map
  return features;
}

Features key_features(const AttentionInputs& p) {
  Features features = features_of(p, p.key, p.geometry.window_keys());
  features.focus.key_bias = floats(p.mapping.key_bias);
  return features;
}

MeasureParams measure_of(const AttentionInputs& p, const Features& query, const Features& key) {
  return {{query, key}, {rows_of(p, query), rows_of(p, key)}};
}

StatePass::StatePass(const AttentionInputs& p, const Features& features, const Tokens& other, double scale,
                     const Device& device)
    : kernels(&kernels_of(p)),
      windows(static_cast<int>(p.geometry.batch * p.geometry.windows())),
      size(window_state_elements(p.geometry)) {
  const RowChunks chunks(features.rows.tokens, kStateTokens, 2 * kStateTokens,
                         std::int64_t{windows} * features.heads, device);
  params = {features,           tokens(other), /*terms=*/nullptr,
            chunks.chunk,       chunks.chunks, static_cast<float>(scale),
            /*partial=*/nullptr};
}

void StatePass::place(float* state, Workspace& workspace) {
  params.partial = params.chunks > 1 ? workspace.take<float>(params.chunks * bytes()) : state;
}

cudaError_t StatePass::launch(float* state, cudaStream_t stream) const {
  const cudaError_t error = kernels->accumulate(params, windows, stream);
  if (error != cudaSuccess || params.chunks == 1) return error;
  return reduce_state(params.partial, state, windows, params.chunks, size, stream);
}

MultiplyParams multiply_of(const AttentionInputs& p, Product product, const Features& features,
                           const Tokens* pixels, const Kernels& kernels, const Device& device) {
  MultiplyParams params{};
  params.product = product;
  params.features = features;
  params.eps = static_cast<float>(p.eps);
  const std::int64_t pieces = p.geometry.batch * p.geometry.windows() * features.heads;
  if (!pixels) {
    const RowChunks chunks(features.rows.tokens, kTileRows, 128, pieces, device);
    params.regions = chunks.chunks;
    params.region_tokens = chunks.chunk;
    return params;
  }
  params.pixels = tokens(*pixels);
  params.weight = floats(p.taps.weight);
  params.per_channel = p.taps.per_channel;
  params.kernel_h = static_cast<int>(p.taps.kernel_h);
  params.kernel_w = static_cast<int>(p.taps.kernel_w);
  const Rectangles cut(features.rows.grid, p.taps, pieces, device, [&](int height, int width) {
    params.region_h = height, params.region_w = width;
    return kernels.multiply_shared(params);
  });
  params.regions = cut.fit ? cut.count : 0;
  params.regions_x = cut.columns;
  params.region_h = cut.height;
  params.region_w = cut.width;
  return params;
}

Call choose(const AttentionForward& p, const Device& device) {
  if (const char* why = unsuited(p, device)) return refuse(why);
  if (!aligned(p.out)) return refuse(kUnaligned);
  Forward forward(p, device);
  if (forward.output.regions == 0) return refuse(kTooMuchShared);
  Workspace measured;
  forward.place(measured);
  return {"tensorcore::heads::accumulate, multiply", nullptr, measured.taken(),
          [forward](void* memory, cudaStream_t stream) {
            Forward placed = forward;
            Workspace workspace(memory);
            placed.place(workspace);
            return placed.launch(stream);
          }};
}

}  // namespace flatten::cuda::tensorcore::heads
