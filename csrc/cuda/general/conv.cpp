// Plans the depthwise convolution alone, both directions, and the sums that end every backward pass.
#include <algorithm>

#include "planning.h"

namespace flatten::cuda::general {
namespace {

/// The gradients of taps and bias, if either is asked for: `call.chunks` is 0 otherwise.
TapsCall plan_taps(const Geometry& g, const Plan& plan, const Taps& taps, bool asked, const Device& device) {
  TapsCall call;
  call.taps = taps;
  call.plan = plan;
  call.chunks = 0;
  if (!asked) return call;
  call.tiling = map_tiling(g, taps, device);
  call.tiles = g.batch * g.windows() * call.tiling.tiles;
  // Few enough chunks that their partial sums stay small beside the tokens.
  const std::int64_t chunks = std::clamp<std::int64_t>(
      8 * device.multiprocessors / ((plan.channels + kWidth - 1) / kWidth), 1, call.tiles);
  call.chunk_tiles = static_cast<int>((call.tiles + chunks - 1) / chunks);
  call.chunks = static_cast<int>((call.tiles + call.chunk_tiles - 1) / call.chunk_tiles);
  return call;
}

Plan conv_plan(const ConvInputs& in, const Device& device) {
  Plan plan = plan_of(in.geometry, in.dtype, in.taps, device);
  plan.vector = in.geometry.channels() % (16 / element_size(in.dtype)) == 0 && aligned(in.x, in.dtype);
  return plan;
}

ConvCall conv_call(const ConvInputs& in, const Tokens& from, const MutableTokens& to, bool mirrored,
                   const Device& device) {
  ConvCall call;
  call.taps = in.taps;
  call.plan = conv_plan(in, device);
  call.plan.vector = call.plan.vector && aligned(from, in.dtype) && aligned(to, in.dtype);
  call.tiling = map_tiling(in.geometry, in.taps, device);
  call.batch = in.geometry.batch;
  call.in = from;
  call.out = to;
  call.mirrored = mirrored;
  return call;
}

cudaError_t launch_conv_of(const ConvCall& call, Dtype dtype, cudaStream_t stream) {
  return with_element(dtype, [&](auto e) { return launch_conv<decltype(e)>(call, stream); });
}

}  // namespace

/// How many threads share the sum over pairs, a power of two: each is to have eight loads on their way, or,
/// where a device would have too few threads, at least one.
static int stripes_of(const ParameterCall& call) {
  constexpr std::int64_t kLoads = 8, kThreadsOfDevice = 1 << 16;
  const std::int64_t fours = static_cast<std::int64_t>(call.keys) * call.plan.channels / 4;
  int stripes = 1;
  while (stripes < 16) {
    const std::int64_t least = fours * stripes < kThreadsOfDevice ? 1 : kLoads;
    if (call.pairs < 2 * stripes * least) break;
    stripes *= 2;
  }
  return stripes;
}

ParameterSums::ParameterSums(const AttentionBackward& params, const Plan& plan, std::int64_t scale_rows,
                             std::int64_t tap_rows, const Device& device)
    : dtype(params.dtype) {
  const Geometry& g = params.geometry;
  const bool ask_taps = params.grad_weight || params.grad_bias;
  taps = plan_taps(g, plan, params.taps, ask_taps && tap_rows == 0, device);
  taps.in = params.value;
  taps.grad_out = params.grad_out;
  parameters.plan = plan;
  parameters.pairs = g.batch * g.windows();
  parameters.grad_scale = params.grad_scale;
  parameters.grad_key_bias = params.grad_key_bias;
  parameters.grad_weight = params.grad_weight;
  parameters.grad_bias = params.grad_bias;
  if (params.grad_scale) parameters.scale_rows = scale_rows;
  parameters.grad_key = {params.grad_key.data, params.grad_key.batch_stride, params.grad_key.token_stride};
  parameters.keys = static_cast<int>(g.window_keys());
  if (plan.vector && plan.channels % 4 == 0) parameters.key_bias_stripes = stripes_of(parameters);
  parameters.taps = static_cast<int>(params.taps.kernel_h * params.taps.kernel_w);
  parameters.per_channel = params.taps.per_channel;
  parameters.taps_chunks = taps.chunks;
  parameters.taps_channels = plan.channels;
  if (ask_taps && tap_rows > 0) {
    parameters.taps_chunks = static_cast<int>(tap_rows);
    if (!params.taps.per_channel) parameters.taps_channels = plan.head_dim;
  }
}

ParameterSums::ParameterSums(const ConvBackward& params, const Plan& plan, const Device& device)
    : dtype(params.dtype),
      taps(plan_taps(params.geometry, plan, params.taps, params.grad_weight || params.grad_bias, device)) {
  taps.plan.vector = taps.plan.vector && aligned(params.grad_out, params.dtype);
  taps.in = params.x;
  taps.grad_out = params.grad_out;
  parameters.plan = taps.plan;
  parameters.grad_weight = params.grad_weight;
  parameters.grad_bias = params.grad_bias;
  parameters.taps = static_cast<int>(params.taps.kernel_h * params.taps.kernel_w);
  parameters.taps_chunks = taps.chunks;
  parameters.taps_channels = taps.plan.channels;
  parameters.per_channel = params.taps.per_channel;
}

void ParameterSums::place(Workspace& workspace) {
  const std::int64_t size = accumulate_size(dtype);
  parameters.scale_partials = workspace.take(parameters.scale_rows * parameters.plan.channels * size);
  parameters.taps_partials = taps.partials =
      workspace.take(static_cast<std::int64_t>(parameters.taps_chunks) * (parameters.taps + 1) *
                     parameters.taps_channels * size);
}

cudaError_t ParameterSums::launch(cudaStream_t stream) const {
  return with_element(dtype, [&](auto e) {
    using T = decltype(e);
    const cudaError_t error = taps.chunks > 0 ? launch_taps<T>(taps, stream) : cudaSuccess;
    return error == cudaSuccess ? launch_parameters<T>(parameters, stream) : error;
  });
}

Call choose(const ConvForward& params, const Device& device) {
  const ConvCall call = conv_call(params, params.x, params.out, false, device);
  return {"general::convolve_tiles", nullptr, 0, [call, dtype = params.dtype](void*, cudaStream_t stream) {
            return launch_conv_of(call, dtype, stream);
          }};
}

Call choose(const ConvBackward& params, const Device& device) {
  ParameterSums sums(params, conv_plan(params, device), device);
  Workspace measured;
  sums.place(measured);
  ConvCall of_x;
  const bool want_x = params.grad_x.data != nullptr;
  if (want_x) of_x = conv_call(params, params.grad_out, params.grad_x, true, device);
  return {"general::convolve_tiles, sum_taps", nullptr, measured.taken(),
          [=](void* memory, cudaStream_t stream) {
            const cudaError_t error = want_x ? launch_conv_of(of_x, sums.dtype, stream) : cudaSuccess;
            if (error != cudaSuccess) return error;
            ParameterSums placed = sums;
            Workspace workspace(memory);
            placed.place(workspace);
            return placed.launch(stream);
          }};
}

}  // namespace flatten::cuda::general
