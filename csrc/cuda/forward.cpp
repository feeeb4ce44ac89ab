// Which forward calls the tensor-core kernels take, and how they are cut into blocks.
#include <algorithm>

#include "tensorcore.h"
#include "tensorcore_plan.h"

namespace flatten::cuda::tensorcore {
namespace {

template <Dtype kDtype>
const ForwardKernels* kernels_of(const AttentionInputs& p) {
  const bool cubic = p.mapping.focused && p.mapping.focusing_factor == 3;
  switch (p.geometry.head_dim) {
    case 16:
      return &forward_kernels<kDtype, 16, kRuntimeMode>();
    case 32:
      return cubic ? &forward_kernels<kDtype, 32, kCubicMode<kDtype>>()
                   : &forward_kernels<kDtype, 32, kRuntimeMode>();
    case 64:
      return cubic ? &forward_kernels<kDtype, 64, kCubicMode<kDtype>>()
                   : &forward_kernels<kDtype, 64, kRuntimeMode>();
    case 128:
      return &forward_kernels<kDtype, 128, kRuntimeMode>();
    default:
      return nullptr;
  }
}

const ForwardKernels* kernels_of(const AttentionInputs& p) {
  switch (p.dtype) {
    case Dtype::kBFloat16:
      return kernels_of<Dtype::kBFloat16>(p);
    case Dtype::kFloat16:
      return kernels_of<Dtype::kFloat16>(p);
    default:
      return nullptr;
  }
}

struct Plan {
  int windows, taps;
  WindowGrid keys, queries;
  Chunks chunks;
  Strips strips;
};

Plan plan_of(const AttentionForward& p, const Device& device, const ForwardKernels& kernels) {
  const Geometry& g = p.geometry;
  const int channels = static_cast<int>(g.channels()), head_dim = static_cast<int>(g.head_dim);
  const int windows = static_cast<int>(g.batch * g.windows()), taps = taps_of(p);
  const WindowGrid keys = grid_of(g);
  const WindowGrid queries = p.taps || !keys.raster ? keys : flat_grid(g.queries);
  const int warps = channels / std::max(kSliceChannels, head_dim);
  const auto fits = [&](int patches) {
    return warps * patches * 32 <= max_threads(head_dim, taps) &&
           kernels.output_shared(taps, channels, patches, p.taps.per_channel) <= device.shared_bytes;
  };
  return {windows,
          taps,
          keys,
          queries,
          Chunks(static_cast<int>(g.window_keys()), windows, max_threads(head_dim) / channels, device),
          Strips(queries, windows, device, fits)};
}

std::int64_t state_bytes(const AttentionForward& p) {
  return (state_elements(p.geometry) * 4 + 255) / 256 * 256;
}

StateParams state_params_of(const AttentionInputs& p, const WindowGrid& keys, const Chunks& chunks,
                            float* partial) {
  const Geometry& g = p.geometry;
  FocusParams focus = focus_of(p);
  focus.key_bias = floats(p.mapping.key_bias);
  return {keys,
          focus,
          tokens(p.key),
          tokens(p.value),
          static_cast<int>(g.channels()),
          static_cast<int>(g.window_keys()),
          chunks.chunk,
          chunks.groups,
          partial};
}

}  // namespace

bool takes(const AttentionForward& p, const Device& device) {
  const ForwardKernels* kernels = kernels_of(p);
  const Geometry& g = p.geometry;
  if (!kernels || !suits(p, device) || !aligned(p.out)) return false;
  const int channels = static_cast<int>(g.channels()), head_dim = static_cast<int>(g.head_dim);
  if (channels > max_threads(head_dim) || g.batch * g.windows() > kMostBlocks) return false;
  const Plan plan = plan_of(p, device, *kernels);
  const int warps = channels / std::max(kSliceChannels, head_dim) * plan.strips.patches;
  return warps * 32 <= max_threads(head_dim, plan.taps) &&
         kernels->state_shared(channels, plan.chunks.groups) <= device.shared_bytes &&
         kernels->output_shared(plan.taps, channels, plan.strips.patches, p.taps.per_channel) <=
             device.shared_bytes;
}

std::int64_t workspace_bytes(const AttentionForward& p, const Device& device) {
  const Plan plan = plan_of(p, device, *kernels_of(p));
  const std::int64_t partials = plan.chunks.chunks > 1 ? plan.chunks.chunks * state_bytes(p) : 0;
  return partials + (p.state ? 0 : state_bytes(p));
}

cudaError_t launch(const AttentionForward& p, const Device& device, void* workspace, cudaStream_t stream) {
  const ForwardKernels& kernels = *kernels_of(p);
  const Plan plan = plan_of(p, device, kernels);
  const Geometry& g = p.geometry;
  const int channels = static_cast<int>(g.channels());
  auto* scratch = static_cast<char*>(workspace);
  auto* state = static_cast<float*>(p.state);
  if (!state) {
    state = reinterpret_cast<float*>(scratch);
    scratch += state_bytes(p);
  }
  float* partial = plan.chunks.chunks > 1 ? reinterpret_cast<float*>(scratch) : state;

  const StateParams state_params = state_params_of(p, plan.keys, plan.chunks, partial);
  cudaError_t error = kernels.state(state_params, plan.chunks.chunks, plan.windows, stream);
  if (error == cudaSuccess && plan.chunks.chunks > 1) {
    error =
        reduce_state(partial, state, plan.windows, plan.chunks.chunks, channels * (g.head_dim + 1), stream);
  }
  if (error != cudaSuccess) return error;

  const OutputParams output_params{plan.queries,
                                   focus_of(p),
                                   tokens(p.query),
                                   tokens(p.value),
                                   tokens(p.out),
                                   state,
                                   floats(p.taps.weight),
                                   floats(p.taps.bias),
                                   p.taps.per_channel,
                                   channels,
                                   static_cast<int>(g.queries),
                                   static_cast<float>(p.eps),
                                   plan.strips.patches,
                                   plan.strips.rows};
  return kernels.output(output_params, plan.taps, dim3(plan.strips.strips, plan.strips.runs, plan.windows),
                        stream);
}

cudaError_t launch_state(const AttentionInputs& p, float* state, const Device& device, cudaStream_t stream) {
  const Geometry& g = p.geometry;
  const ForwardKernels& kernels = *kernels_of(p);
  const int groups = max_threads(static_cast<int>(g.head_dim)) / static_cast<int>(g.channels());
  // Small windows may be more than a grid has blocks in y: then some images at a time.
  const std::int64_t most = std::max<std::int64_t>(1, kMostBlocks / g.windows());
  for (std::int64_t image = 0; image < g.batch; image += most) {
    AttentionInputs part = p;
    part.geometry.batch = std::min(most, g.batch - image);
    for (Tokens* x : {&part.key, &part.value}) {
      x->data = static_cast<const char*>(x->data) + image * x->batch_stride * element_size(p.dtype);
    }
    const int windows = static_cast<int>(part.geometry.batch * g.windows());
    Chunks whole(static_cast<int>(g.window_keys()), windows, groups, device);
    whole.chunk = static_cast<int>(g.window_keys());
    float* to = state + image * window_state_elements(g) * g.windows();
    const cudaError_t error = kernels.state(state_params_of(part, grid_of(g), whole, to), 1, windows, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace flatten::cuda::tensorcore
