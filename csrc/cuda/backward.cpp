// Which backward calls the tensor-core kernels take, and how they are cut into blocks.
#include "tensorcore.h"
#include "tensorcore_plan.h"

namespace flatten::cuda::tensorcore {
namespace {

// As forward_window.cpp: windows small enough for one block, and if it takes many steps, enough of them.
constexpr std::int64_t kMaxTokens = 256, kFewTokens = 64, kManyWindows = 32;

struct Kernels {
  const BackwardKernels* passes = nullptr;
  const WindowGradientKernels* window = nullptr;
  int window_threads = kBackwardThreads;
};

template <Dtype kDtype, int kHeadDim>
Kernels kernels(std::int64_t channels) {
  Kernels found{&backward_kernels<kDtype, kHeadDim>()};
  if constexpr (kHeadDim <= 64) found.window = &window_gradient_kernels<kDtype, kHeadDim>();
  if constexpr (kHeadDim == 32) {
    if (channels > kBackwardThreads) {
      found.window = &window_gradient_kernels<kDtype, kHeadDim, kWideThreads>();
      found.window_threads = kWideThreads;
    }
  }
  return found;
}

template <Dtype kDtype>
Kernels kernels_of(const AttentionBackward& p) {
  const std::int64_t channels = p.geometry.channels();
  switch (p.geometry.head_dim) {
    case 16:
      return kernels<kDtype, 16>(channels);
    case 32:
      return kernels<kDtype, 32>(channels);
    case 64:
      return kernels<kDtype, 64>(channels);
    case 128:
      return kernels<kDtype, 128>(channels);
    default:
      return {};
  }
}

Kernels kernels_of(const AttentionBackward& p) {
  switch (p.dtype) {
    case Dtype::kBFloat16:
      return kernels_of<Dtype::kBFloat16>(p);
    case Dtype::kFloat16:
      return kernels_of<Dtype::kFloat16>(p);
    default:
      return {};
  }
}

struct Plan {
  int windows, taps;
  WindowGrid queries, keys;
  int groups = 0;  // of warps in the one launch, if one block takes a window; else:
  Chunks chunks;   // of queries
  Strips strips;   // of keys
};

Plan plan_of(const AttentionBackward& p, const Device& device) {
  const Geometry& g = p.geometry;
  const Kernels kernels = kernels_of(p);
  const int channels = static_cast<int>(g.channels());
  const int windows = static_cast<int>(g.batch * g.windows()), taps = taps_of(p);
  const WindowGrid map = grid_of(g);
  const WindowGrid keys = p.taps || !map.raster ? map : flat_grid(g.keys);
  const auto fits = [&](int patches) {
    return channels * patches <= kBackwardThreads &&
           kernels.passes->key_shared(taps, channels, patches, p.taps.per_channel) <= device.shared_bytes;
  };
  Plan plan{windows,
            taps,
            map,
            keys,
            0,
            Chunks(static_cast<int>(g.window_queries()), windows, kBackwardThreads / channels, device),
            Strips(keys, windows, device, fits)};
  const std::int64_t tokens = std::max(g.window_queries(), g.window_keys());
  if (kernels.window && tokens <= kMaxTokens && (tokens <= kFewTokens || windows >= kManyWindows) &&
      taps != 7) {
    for (int groups = keys.window_w <= kPatchColumns ? 1 : kMaxPatches; groups > 0 && !plan.groups;
         --groups) {
      const int shared = kernels.window->shared_bytes(taps, channels, groups, p.taps.per_channel,
                                                      keys.window_h * keys.window_w);
      if (channels * groups <= kernels.window_threads && shared <= device.shared_bytes) plan.groups = groups;
    }
  }
  return plan;
}

QueryGradientParams query_params_of(const AttentionBackward& p, const Plan& plan,
                                    const BackwardBuffers& buffers) {
  const Geometry& g = p.geometry;
  return {plan.queries,
          focus_of(p),
          tokens(p.query),
          tokens(p.grad_out),
          tokens(p.grad_query),
          buffers.state,
          static_cast<int>(g.channels()),
          static_cast<int>(g.window_queries()),
          plan.chunks.chunk,
          plan.chunks.groups,
          static_cast<float>(p.eps),
          1.0f / static_cast<float>(g.window_keys()),
          plan.chunks.chunks > 1 ? buffers.state_gradient_partials : buffers.state_gradient,
          buffers.scale_partials};
}

KeyGradientParams key_params_of(const AttentionBackward& p, const Plan& plan,
                                const BackwardBuffers& buffers) {
  const Geometry& g = p.geometry;
  FocusParams focus = focus_of(p);
  focus.key_bias = floats(p.mapping.key_bias);
  return {plan.keys,
          focus,
          tokens(p.key),
          tokens(p.value),
          tokens(p.grad_out),
          tokens(p.grad_key),
          tokens(p.grad_value),
          buffers.state_gradient,
          floats(p.taps.weight),
          p.taps.per_channel,
          static_cast<int>(g.channels()),
          static_cast<int>(g.keys),
          static_cast<int>(g.window_keys()),
          plan.groups ? plan.groups : plan.strips.patches,
          plan.strips.rows,
          buffers.scale_partials,
          buffers.tap_partials};
}

}  // namespace

bool takes(const AttentionBackward& p, const Device& device) {
  const Kernels kernels = kernels_of(p);
  if (!kernels.passes || !p.mapping.focused || !suits(p, device)) return false;
  if (p.geometry.head_dim >= 64 && taps_of(p) == 7) return false;  // their operands do not fit the registers
  if (!p.grad_query.data || !p.grad_key.data || !p.grad_value.data || !aligned(p.grad_out)) return false;
  for (const MutableTokens* x : {&p.grad_query, &p.grad_key, &p.grad_value}) {
    if (!aligned(*x)) return false;
  }
  const int channels = static_cast<int>(p.geometry.channels());
  if (channels > max_threads(static_cast<int>(p.geometry.head_dim))) return false;  // launch_state
  if (p.geometry.windows() > kMostBlocks) return false;                             // launch_state
  const Plan plan = plan_of(p, device);
  if (plan.groups) return true;
  return channels <= kBackwardThreads && plan.windows <= kMostBlocks &&
         kernels.passes->query_shared(channels, plan.chunks.groups) <= device.shared_bytes &&
         kernels.passes->key_shared(plan.taps, channels, plan.strips.patches, p.taps.per_channel) <=
             device.shared_bytes;
}

BackwardRows backward_rows(const AttentionBackward& p, const Device& device) {
  const Plan plan = plan_of(p, device);
  if (plan.groups) return {1, false, plan.windows, plan.windows};
  const std::int64_t windows = plan.windows, strips = plan.strips.strips * plan.strips.runs;
  return {plan.chunks.chunks, true, windows * (plan.chunks.chunks + strips),
          sums_taps(plan.taps) ? windows * strips : 0};
}

cudaError_t launch(const AttentionBackward& p, const Device& device, const BackwardBuffers& buffers,
                   cudaStream_t stream) {
  const Kernels kernels = kernels_of(p);
  const Plan plan = plan_of(p, device);
  const Geometry& g = p.geometry;
  const QueryGradientParams query = query_params_of(p, plan, buffers);
  KeyGradientParams key = key_params_of(p, plan, buffers);
  if (plan.groups) return kernels.window->launch({query, key}, plan.taps, plan.windows, stream);

  cudaError_t error = kernels.passes->query(query, plan.chunks.chunks, plan.windows, stream);
  if (error == cudaSuccess && plan.chunks.chunks > 1) {
    error = reduce_state(buffers.state_gradient_partials, buffers.state_gradient, plan.windows,
                         plan.chunks.chunks, g.channels() * (g.head_dim + 1), stream);
  }
  if (error != cudaSuccess) return error;
  if (key.scale_partials) {  // after the queries'
    key.scale_partials += static_cast<std::int64_t>(plan.windows) * plan.chunks.chunks * g.channels();
  }
  return kernels.passes->key(key, plan.taps, dim3(plan.strips.strips, plan.strips.runs, plan.windows),
                             stream);
}

}  // namespace flatten::cuda::tensorcore
