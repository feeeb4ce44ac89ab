// Which forward calls the tensor-core kernels take, and how they are cut into blocks.
#include <algorithm>

#include "tensorcore.h"
#include "tensorcore_params.h"

namespace flatten::cuda::tensorcore {
namespace {

template <Dtype kDtype>
const ForwardKernels* kernels_of(const AttentionForward& p) {
  const bool cubic = p.mapping.focused && p.mapping.focusing_factor == 3;
  switch (p.geometry.head_dim) {
    case 16:
      return &forward_kernels<kDtype, 16, kRuntimeMode>();
    case 32:
      return cubic ? &forward_kernels<kDtype, 32, 3>() : &forward_kernels<kDtype, 32, kRuntimeMode>();
    case 64:
      return cubic ? &forward_kernels<kDtype, 64, 3>() : &forward_kernels<kDtype, 64, kRuntimeMode>();
    case 128:
      return &forward_kernels<kDtype, 128, kRuntimeMode>();
    default:
      return nullptr;
  }
}

const ForwardKernels* kernels_of(const AttentionForward& p) {
  switch (p.dtype) {
    case Dtype::kBFloat16:
      return kernels_of<Dtype::kBFloat16>(p);
    case Dtype::kFloat16:
      return kernels_of<Dtype::kFloat16>(p);
    default:
      return nullptr;
  }
}

bool aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

bool aligned(const Tokens& x) {
  return aligned(x.data) && x.batch_stride % 8 == 0 && x.token_stride % 8 == 0;
}

constexpr std::int64_t kMany = std::int64_t{1} << 30;  // what counts in 32 bits, with room

constexpr int ceil_div(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }

/// How a call is cut: `groups` of warps and `chunks` of tokens for S; `patches` side by side in a strip,
/// strips and runs of rows for the output.
struct Plan {
  int windows, groups, chunk, chunks;
  int taps, patches, strips, rows, runs;
  WindowGrid keys, queries;
};

WindowGrid grid_of(const Geometry& g) {
  const bool raster = g.windows() == 1 && g.shift_h == 0 && g.shift_w == 0;
  return {static_cast<int>(g.map_h),    static_cast<int>(g.map_w),       static_cast<int>(g.window_h),
          static_cast<int>(g.window_w), static_cast<int>(g.windows_h()), static_cast<int>(g.windows_w()),
          static_cast<int>(g.shift_h),  static_cast<int>(g.shift_w),     raster};
}

/// Without taps one raster window need not know its map: its tokens make rows of their own.
WindowGrid flat_grid(std::int64_t tokens) {
  constexpr int kWidth = kMaxPatches * kPatchColumns;
  const int height = ceil_div(tokens, kWidth);
  return {height, kWidth, height, kWidth, 1, 1, 0, 0, true};
}

Plan plan_of(const AttentionForward& p, const Device& device, const ForwardKernels& kernels) {
  const Geometry& g = p.geometry;
  const int channels = static_cast<int>(g.channels());
  const int max_warps = max_threads(static_cast<int>(g.head_dim)) / 32;
  Plan plan{};
  plan.windows = static_cast<int>(g.batch * g.windows());

  // Fewest chunks that fill the machine: every one of them costs a partial state.
  const int keys = static_cast<int>(g.window_keys());
  const int slices = channels / kSliceChannels;
  plan.groups = std::min(std::max(1, max_warps / slices), ceil_div(keys, kTileTokens));
  const int step = plan.groups * kTileTokens;
  const int wanted = std::min(ceil_div(device.multiprocessors, plan.windows), ceil_div(keys, step));
  plan.chunk = ceil_div(ceil_div(keys, wanted), step) * step;
  plan.chunks = ceil_div(keys, plan.chunk);

  // Strips as wide as shared memory allows; again the fewest runs that fill the machine, since every run
  // reads a state and a halo.
  plan.keys = grid_of(g);
  plan.taps = p.taps ? static_cast<int>(p.taps.kernel_h) : 0;
  plan.queries = p.taps || !plan.keys.raster ? plan.keys : flat_grid(g.queries);
  const int warps = channels / std::max<int>(kSliceChannels, static_cast<int>(g.head_dim));
  plan.patches = plan.queries.window_w <= kPatchColumns ? 1 : kMaxPatches;
  while (
      plan.patches > 1 &&
      (warps * plan.patches * 32 > max_threads(static_cast<int>(g.head_dim), plan.taps) ||
       kernels.output_shared(plan.taps, channels, plan.patches, p.taps.per_channel) > device.shared_bytes)) {
    --plan.patches;
  }
  plan.strips = ceil_div(plan.queries.window_w, plan.patches * kPatchColumns);
  const int runs = std::min(ceil_div(3 * device.multiprocessors, 2 * plan.strips * plan.windows),
                            ceil_div(plan.queries.window_h, kStepRows));
  plan.rows = ceil_div(ceil_div(plan.queries.window_h, runs), kStepRows) * kStepRows;
  plan.runs = ceil_div(plan.queries.window_h, plan.rows);
  return plan;
}

std::int64_t state_bytes(const AttentionForward& p) {
  return (state_elements(p.geometry) * 4 + 255) / 256 * 256;
}

Floats floats(const Parameter& parameter) { return {parameter.data, parameter.dtype != Dtype::kFloat32}; }

TokenArray tokens(const Tokens& x) {
  return {x.data, x.batch_stride * 2, static_cast<int>(x.token_stride * 2)};
}

FocusParams focus_of(const AttentionForward& p) {
  const double power = p.mapping.focusing_factor;
  int mode = kNoMapping;
  if (p.mapping.focused)
    mode = power == 1 || power == 2 || power == 3 || power == 4 ? static_cast<int>(power) : kAnyPower;
  return {
      floats(p.mapping.scale), {nullptr, false}, static_cast<float>(p.eps), mode, static_cast<float>(power)};
}

}  // namespace

bool takes(const AttentionForward& p, const Device& device) {
  const Geometry& g = p.geometry;
  const ForwardKernels* kernels = kernels_of(p);
  if (device.compute_capability < 80 || !kernels || g.prefix != 0 || g.batch < 1 || g.queries < 1)
    return false;
  if (g.channels() % kSliceChannels != 0 || g.channels() > max_threads(static_cast<int>(g.head_dim)))
    return false;
  if (g.queries > kMany || g.keys > kMany || g.batch * g.windows() > 65535) return false;
  if (p.taps) {
    const std::int64_t size = p.taps.kernel_h;
    if (size != p.taps.kernel_w || (size != 3 && size != 5 && size != 7)) return false;
  }
  for (std::int64_t stride :
       {p.query.token_stride, p.key.token_stride, p.value.token_stride, p.out.token_stride}) {
    if (stride >= kMany) return false;
  }
  if (!aligned(p.query) || !aligned(p.key) || !aligned(p.value) || !aligned(p.mapping.key_bias.data) ||
      !aligned({p.out.data, p.out.batch_stride, p.out.token_stride})) {
    return false;
  }
  const Plan plan = plan_of(p, device, *kernels);
  const int channels = static_cast<int>(g.channels());
  const int warps = channels / std::max(kSliceChannels, static_cast<int>(g.head_dim)) * plan.patches;
  return warps * 32 <= max_threads(static_cast<int>(g.head_dim), plan.taps) &&
         kernels->state_shared(channels, plan.groups) <= device.shared_bytes &&
         kernels->output_shared(plan.taps, channels, plan.patches, p.taps.per_channel) <= device.shared_bytes;
}

std::int64_t workspace_bytes(const AttentionForward& p, const Device& device) {
  const Plan plan = plan_of(p, device, *kernels_of(p));
  const std::int64_t partials = plan.chunks > 1 ? plan.chunks * state_bytes(p) : 0;
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
  float* partial = plan.chunks > 1 ? reinterpret_cast<float*>(scratch) : state;

  FocusParams focus = focus_of(p);
  focus.key_bias = floats(p.mapping.key_bias);
  const StateParams state_params{plan.keys,       focus,       tokens(p.key),
                                 tokens(p.value), channels,    static_cast<int>(g.window_keys()),
                                 plan.chunk,      plan.groups, partial};
  cudaError_t error = kernels.state(state_params, plan.chunks, plan.windows, stream);
  if (error == cudaSuccess && plan.chunks > 1) {
    error = reduce_state(partial, state, plan.windows, plan.chunks, channels * (g.head_dim + 1), stream);
  }
  if (error != cudaSuccess) return error;

  const OutputParams output_params{plan.queries,
                                   focus_of(p),
                                   tokens(p.query),
                                   tokens(p.value),
                                   tokens({p.out.data, p.out.batch_stride, p.out.token_stride}),
                                   state,
                                   floats(p.taps.weight),
                                   floats(p.taps.bias),
                                   p.taps.per_channel,
                                   channels,
                                   static_cast<int>(g.queries),
                                   static_cast<float>(p.eps),
                                   plan.patches,
                                   plan.rows};
  return kernels.output(output_params, plan.taps, dim3(plan.strips, plan.runs, plan.windows), stream);
}

}  // namespace flatten::cuda::tensorcore
