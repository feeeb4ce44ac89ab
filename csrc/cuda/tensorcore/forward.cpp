// Which forward calls the tensor-core kernels take, and how they are cut into blocks: small windows in one
// launch, a block each; everything else in two, S and m and then the output.
#include <algorithm>

#include "plan.h"

namespace flatten::cuda::tensorcore {
namespace {

bool is_cubic(const AttentionInputs& p) {
  return p.mapping.map == FeatureMap::kFocused && p.mapping.focusing_factor == 3;
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

/// The launches of forward_state, reduce_state and forward_output.
struct Passes {
  const ForwardKernels* kernels;
  int windows, taps;
  StateLaunch state;
  Strips strips;
  OutputParams output;
  float* saved_state;  // where S and m stay for the backward pass, or null
  std::int64_t state_bytes;

  /// Points the launches at the workspace.
  void place(Workspace& workspace) {
    float* whole = saved_state ? saved_state : workspace.take<float>(state_bytes);
    output.state = whole;
    state.place(whole, workspace);
  }

  cudaError_t launch(void* memory, cudaStream_t stream) const {
    Passes passes = *this;
    Workspace workspace(memory);
    passes.place(workspace);
    const cudaError_t error = passes.state.launch(stream);
    if (error != cudaSuccess) return error;
    return kernels->output(passes.output, taps, dim3(strips.strips, strips.runs, windows), stream);
  }
};

Call choose_passes(const AttentionForward& p, const Device& device) {
  const Geometry& g = p.geometry;
  const int channels = static_cast<int>(g.channels()), head_dim = static_cast<int>(g.head_dim);
  if (g.batch * g.windows() > kMostBlocks) return refuse(kTooManyWindows);
  const ForwardKernels* kernels = forward_kernels_of(p);
  const int windows = static_cast<int>(g.batch * g.windows()), taps = taps_of(p);
  const WindowGrid keys = grid_of(g);
  const WindowGrid queries = p.taps || !keys.raster ? keys : flat_grid(g.queries);
  const auto threads = [&](int patches) {
    return channels / std::max(kSliceChannels, head_dim) * patches * 32;
  };
  const auto shared = [&](int patches) {
    return kernels->output_shared(taps, channels, patches, p.taps.per_channel);
  };
  const Strips strips(queries, windows, max_threads(head_dim, taps),
                      of_head_dim(taps == 7 ? kWideOutputCosts : kOutputCosts, head_dim), device, threads,
                      shared);
  if (threads(strips.patches) > max_threads(head_dim, taps)) return refuse(kTooWide);
  const StateLaunch state(p, device);
  if (std::max(state.shared_bytes(), shared(strips.patches)) > device.shared_bytes) {
    return refuse(kTooMuchShared);
  }
  const OutputParams output{queries,
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
                            strips.patches,
                            strips.rows};
  Passes passes{kernels,
                windows,
                taps,
                state,
                strips,
                output,
                static_cast<float*>(p.state),
                windows * window_state_elements(g) * std::int64_t{sizeof(float)}};
  Workspace measured;
  passes.place(measured);
  return {"tensorcore::forward_state, forward_output", nullptr, measured.taken(),
          [passes](void* memory, cudaStream_t stream) { return passes.launch(memory, stream); }};
}

}  // namespace

const ForwardKernels* forward_kernels_of(const AttentionInputs& p) {
  return with_half<const ForwardKernels*>(p.dtype, [&](auto dtype) {
    return with_head_dim<const ForwardKernels*>(p.geometry.head_dim, [&](auto head_dim) {
      if constexpr (head_dim == 32 || head_dim == 64) {
        if (is_cubic(p)) return &forward_kernels<dtype, head_dim, kCubicMode<dtype>>();
      }
      return &forward_kernels<dtype, head_dim, kRuntimeMode>();
    });
  });
}

Call choose_all_heads(const AttentionForward& p, const Device& device) {
  if (const char* why = unsuited(p, device)) return refuse(why);
  if (!aligned(p.out)) return refuse(kUnaligned);
  if (Call call = choose_windows(p, device)) return call;
  return choose_passes(p, device);
}

}  // namespace flatten::cuda::tensorcore
