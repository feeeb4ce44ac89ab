// Which forward calls the tensor-core kernels take, and how they are cut into blocks: small windows in one
// launch, a block each; everything else in two, S and m and then the output.
#include <algorithm>

#include "plan.h"

namespace flatten::cuda::tensorcore {
namespace {

bool is_cubic(const AttentionInputs& p) {
  return p.mapping.map == FeatureMap::kFocused && p.mapping.focusing_factor == 3;
}

const ForwardKernels* kernels_of(const AttentionInputs& p) {
  return with_half<const ForwardKernels*>(p.dtype, [&](auto dtype) {
    return with_head_dim<const ForwardKernels*>(p.geometry.head_dim, [&](auto head_dim) {
      if constexpr (head_dim == 32 || head_dim == 64) {
        if (is_cubic(p)) return &forward_kernels<dtype, head_dim, kCubicMode<dtype>>();
      }
      return &forward_kernels<dtype, head_dim, kRuntimeMode>();
    });
  });
}

const WindowKernels* window_kernels_of(const AttentionInputs& p) {
  return with_half<const WindowKernels*>(p.dtype, [&](auto dtype) {
    return with_head_dim<const WindowKernels*>(p.geometry.head_dim, [&](auto head_dim) {
      if constexpr (head_dim == 32 || head_dim == 64) {
        if (is_cubic(p)) return &window_kernels<dtype, head_dim, kCubicMode<dtype>>();
      }
      return &window_kernels<dtype, head_dim, kRuntimeMode>();
    });
  });
}

/// No taps, 3 x 3 or 5 x 5.
Call choose_windows(const AttentionForward& p, const Device& device) {
  const Geometry& g = p.geometry;
  const WindowKernels* kernels = window_kernels_of(p);
  const std::int64_t tokens_of_one = g.window_h * g.window_w, windows = g.batch * g.windows();
  const int taps = taps_of(p), channels = static_cast<int>(g.channels());
  if (taps == 7) return refuse("7 x 7 taps");
  if (g.queries != g.keys || g.window_h < kStepRows || g.window_w < kStepRows) return refuse("no windows");
  if (!are_small_windows(tokens_of_one, windows)) return refuse("large windows");
  if (channels > max_threads(static_cast<int>(g.head_dim), taps)) return refuse(kTooWide);
  if (kernels->shared_bytes(taps, channels, static_cast<int>(tokens_of_one), p.taps.per_channel) >
      device.shared_bytes) {
    return refuse(kTooMuchShared);
  }
  FocusParams focus = focus_of(p);
  focus.key_bias = floats(p.mapping.key_bias);
  const WindowParams params{grid_of(g),
                            focus,
                            tokens(p.query),
                            tokens(p.key),
                            tokens(p.value),
                            tokens(p.out),
                            static_cast<float*>(p.state),
                            floats(p.taps.weight),
                            floats(p.taps.bias),
                            p.taps.per_channel,
                            channels,
                            static_cast<float>(p.eps)};
  return {"tensorcore::forward_window", nullptr, 0,
          [=, count = static_cast<int>(windows)](void*, cudaStream_t stream) {
            return kernels->launch(params, taps, count, stream);
          }};
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

/// The launches of forward_state, reduce_state and forward_output.
struct Passes {
  const ForwardKernels* kernels;
  Plan plan;
  StateParams state;
  OutputParams output;
  float* saved_state;  // where S and m stay for the backward pass, or null
  std::int64_t state_size;

  /// Points the launches at the workspace.
  void place(Workspace& workspace) {
    const std::int64_t bytes = plan.windows * state_size * std::int64_t{sizeof(float)};
    float* whole = saved_state ? saved_state : workspace.take<float>(bytes);
    output.state = whole;
    state.partial = plan.chunks.chunks > 1 ? workspace.take<float>(plan.chunks.chunks * bytes) : whole;
  }

  cudaError_t launch(void* memory, cudaStream_t stream) const {
    Passes passes = *this;
    Workspace workspace(memory);
    passes.place(workspace);
    const int chunks = plan.chunks.chunks;
    cudaError_t error = kernels->state(passes.state, chunks, plan.windows, stream);
    if (error == cudaSuccess && chunks > 1) {
      error = reduce_state(passes.state.partial, const_cast<float*>(passes.output.state), plan.windows,
                           chunks, state_size, stream);
    }
    if (error != cudaSuccess) return error;
    return kernels->output(passes.output, plan.taps, dim3(plan.strips.strips, plan.strips.runs, plan.windows),
                           stream);
  }
};

Call choose_passes(const AttentionForward& p, const Device& device) {
  const Geometry& g = p.geometry;
  const int channels = static_cast<int>(g.channels()), head_dim = static_cast<int>(g.head_dim);
  if (g.batch * g.windows() > kMostBlocks) return refuse(kTooManyWindows);
  const ForwardKernels* kernels = kernels_of(p);
  const Plan plan = plan_of(p, device, *kernels);
  const int warps = channels / std::max(kSliceChannels, head_dim) * plan.strips.patches;
  if (warps * 32 > max_threads(head_dim, plan.taps)) return refuse(kTooWide);
  if (kernels->state_shared(channels, plan.chunks.groups) > device.shared_bytes ||
      kernels->output_shared(plan.taps, channels, plan.strips.patches, p.taps.per_channel) >
          device.shared_bytes) {
    return refuse(kTooMuchShared);
  }
  const OutputParams output{plan.queries,
                            focus_of(p),
                            tokens(p.query),
                            tokens(p.value),
                            tokens(p.out),
                            /*state=*/nullptr,
                            floats(p.taps.weight),
                            floats(p.taps.bias),
                            p.taps.per_channel,
                            channels,
                            static_cast<int>(g.queries),
                            static_cast<float>(p.eps),
                            plan.strips.patches,
                            plan.strips.rows};
  Passes passes{kernels,
                plan,
                state_params_of(p, plan.keys, plan.chunks),
                output,
                static_cast<float*>(p.state),
                window_state_elements(g)};
  Workspace measured;
  passes.place(measured);
  return {"tensorcore::forward_state, forward_output", nullptr, measured.taken(),
          [passes](void* memory, cudaStream_t stream) { return passes.launch(memory, stream); }};
}

}  // namespace

StateParams state_params_of(const AttentionInputs& p, const WindowGrid& keys, const Chunks& chunks) {
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
          /*partial=*/nullptr};
}

Call choose_all_heads(const AttentionForward& p, const Device& device) {
  if (const char* why = unsuited(p, device)) return refuse(why);
  if (!aligned(p.out)) return refuse(kUnaligned);
  if (Call call = choose_windows(p, device)) return call;
  return choose_passes(p, device);
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
    StateParams params = state_params_of(part, grid_of(g), whole);
    params.partial = state + image * window_state_elements(g) * g.windows();
    const cudaError_t error = kernels.state(params, 1, windows, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace flatten::cuda::tensorcore
