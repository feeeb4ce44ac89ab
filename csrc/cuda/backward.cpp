// Which backward calls the tensor-core kernels take, and how they are cut into blocks.
#include "tensorcore.h"
#include "tensorcore_plan.h"

namespace flatten::cuda::tensorcore {
namespace {

const BackwardKernels& kernels_of(const AttentionBackward& p) {
  return p.mapping.focusing_factor == 3 ? backward_kernels<3>() : backward_kernels<kRuntimeMode>();
}

struct Plan {
  int windows, taps;
  WindowGrid queries, keys;
  Chunks chunks;  // of queries
  Strips strips;  // of keys
};

Plan plan_of(const AttentionBackward& p, const Device& device) {
  const Geometry& g = p.geometry;
  const BackwardKernels& kernels = kernels_of(p);
  const int channels = static_cast<int>(g.channels()), heads = static_cast<int>(g.heads);
  const int windows = static_cast<int>(g.batch * g.windows()), taps = taps_of(p);
  const WindowGrid map = grid_of(g);
  const WindowGrid keys = p.taps || !map.raster ? map : flat_grid(g.keys);
  const auto fits = [&](int patches) {
    return heads * patches * 32 <= kBackwardThreads &&
           kernels.key_shared(taps, channels, patches, p.taps.per_channel) <= device.shared_bytes;
  };
  return {windows,
          taps,
          map,
          keys,
          Chunks(static_cast<int>(g.window_queries()), windows, kBackwardThreads / channels, device),
          Strips(keys, windows, device, fits)};
}

}  // namespace

bool takes(const AttentionBackward& p, const Device& device) {
  if (p.dtype != Dtype::kBFloat16 || p.geometry.head_dim != 32 || !p.mapping.focused || !suits(p, device)) {
    return false;
  }
  if (!p.grad_query.data || !p.grad_key.data || !p.grad_value.data || !aligned(p.grad_out)) return false;
  for (const MutableTokens* x : {&p.grad_query, &p.grad_key, &p.grad_value}) {
    if (!aligned(*x)) return false;
  }
  const int channels = static_cast<int>(p.geometry.channels());
  if (channels > kBackwardThreads) return false;
  const Plan plan = plan_of(p, device);
  const BackwardKernels& kernels = kernels_of(p);
  return kernels.query_shared(channels, plan.chunks.groups) <= device.shared_bytes &&
         kernels.key_shared(plan.taps, channels, plan.strips.patches, p.taps.per_channel) <=
             device.shared_bytes;
}

BackwardChunks backward_chunks(const AttentionBackward& p, const Device& device) {
  const Plan plan = plan_of(p, device);
  return {plan.chunks.chunks, plan.strips.strips * plan.strips.runs};
}

cudaError_t launch(const AttentionBackward& p, const Device& device, const BackwardBuffers& buffers,
                   cudaStream_t stream) {
  const BackwardKernels& kernels = kernels_of(p);
  const Plan plan = plan_of(p, device);
  const Geometry& g = p.geometry;
  const int channels = static_cast<int>(g.channels());
  const bool reduce = plan.chunks.chunks > 1;
  const QueryGradientParams query{plan.queries,
                                  focus_of(p),
                                  tokens(p.query),
                                  tokens(p.grad_out),
                                  tokens(p.grad_query),
                                  buffers.state,
                                  channels,
                                  static_cast<int>(g.window_queries()),
                                  plan.chunks.chunk,
                                  plan.chunks.groups,
                                  static_cast<float>(p.eps),
                                  1.0f / static_cast<float>(g.window_keys()),
                                  reduce ? buffers.state_gradient_partials : buffers.state_gradient,
                                  buffers.scale_partials};
  cudaError_t error = kernels.query(query, plan.chunks.chunks, plan.windows, stream);
  if (error == cudaSuccess && reduce) {
    error = reduce_state(buffers.state_gradient_partials, buffers.state_gradient, plan.windows,
                         plan.chunks.chunks, channels * (g.head_dim + 1), stream);
  }
  if (error != cudaSuccess) return error;

  FocusParams focus = focus_of(p);
  focus.key_bias = floats(p.mapping.key_bias);
  float* scale_partials = buffers.scale_partials;  // after the queries'
  if (scale_partials)
    scale_partials += static_cast<std::int64_t>(plan.windows) * plan.chunks.chunks * channels;
  const KeyGradientParams key{plan.keys,
                              focus,
                              tokens(p.key),
                              tokens(p.value),
                              tokens(p.grad_out),
                              tokens(p.grad_key),
                              tokens(p.grad_value),
                              buffers.state_gradient,
                              floats(p.taps.weight),
                              p.taps.per_channel,
                              channels,
                              static_cast<int>(g.keys),
                              static_cast<int>(g.window_keys()),
                              plan.strips.patches,
                              plan.strips.rows,
                              scale_partials};
  return kernels.key(key, plan.taps, dim3(plan.strips.strips, plan.strips.runs, plan.windows), stream);
}

}  // namespace flatten::cuda::tensorcore
