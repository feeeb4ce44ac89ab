// Plans the general kernels' backward pass and the convolution alone, both directions.
#include <algorithm>

#include "general_plan.h"
#include "tensorcore.h"

namespace flatten::cuda::general {
namespace {

bool wanted(const MutableTokens& t) { return t.data != nullptr; }

std::int64_t accumulate_size(Dtype dtype) { return element_size(accumulate_dtype(dtype)); }

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

std::int64_t taps_bytes(const TapsCall& call, Dtype dtype) {
  return round_up(call.chunks * (call.taps.kernel_h * call.taps.kernel_w + 1) * call.plan.channels *
                  accumulate_size(dtype));
}

/// The plan of everything a backward call enqueues, and its scratch memory.
struct BackwardPlan {
  BackwardCall call;
  TapsCall taps;
  ParameterCall parameters;
  bool on_tensor_cores = false;
  tensorcore::BackwardRows rows{};
  bool key_scratch = false;  // key_bias's gradient is summed from k's, which nobody else wants
  std::int64_t pairs = 0;

  BackwardPlan(const AttentionBackward& params, const Device& device) {
    const Geometry& g = params.geometry;
    const Dtype dtype = params.dtype;
    pairs = g.batch * g.windows();
    call.params = params;
    key_scratch = params.grad_key_bias && !wanted(params.grad_key);
    call.attention = wanted(params.grad_query) || wanted(params.grad_key) || wanted(params.grad_value) ||
                     params.grad_scale || params.grad_key_bias;
    Plan& plan = call.plan = plan_of(params, device);
    plan.vector = plan.vector && aligned(params.grad_out, dtype);
    for (const MutableTokens* t : {&params.grad_query, &params.grad_key, &params.grad_value}) {
      plan.vector = plan.vector && aligned(*t, dtype);
    }
    plan.resident = plan.blocks == 1;
    plan.matrix_blocks = 1;
    const Tiling queries = linear_tiling(g.window_queries());
    call.queries = side_of(queries, plan, pairs, device, Prefer::kGroups);
    const Tiling keys = params.taps ? map_tiling(g, params.taps, device) : linear_tiling(g.window_keys());
    call.keys = side_of(keys, plan, pairs, device, Prefer::kChunks);
    if constexpr (tensorcore::kBuilt) {
      on_tensor_cores = tensorcore::takes(params, device);
      if (on_tensor_cores) {
        rows = tensorcore::backward_rows(params, device);
        call.queries.chunks = rows.chunks;
      }
    }
    const bool ask_taps = params.grad_weight || params.grad_bias;
    taps = plan_taps(g, plan, params.taps, ask_taps && rows.taps == 0, device);
    taps.in = params.value;
    taps.grad_out = params.grad_out;

    parameters.plan = plan;
    parameters.pairs = pairs;
    parameters.grad_scale = params.grad_scale;
    parameters.grad_key_bias = params.grad_key_bias;
    parameters.grad_weight = params.grad_weight;
    parameters.grad_bias = params.grad_bias;
    if (params.grad_scale) {
      parameters.scale_rows = on_tensor_cores ? rows.scale : pairs * (call.queries.chunks + call.keys.chunks);
    }
    parameters.keys = static_cast<int>(g.window_keys());
    parameters.taps = static_cast<int>(params.taps.kernel_h * params.taps.kernel_w);
    parameters.per_channel = params.taps.per_channel;
    parameters.taps_chunks = taps.chunks;
    parameters.taps_channels = plan.channels;
    if (ask_taps && rows.taps > 0) {
      parameters.taps_chunks = static_cast<int>(rows.taps);
      if (!params.taps.per_channel) parameters.taps_channels = plan.head_dim;
    }
  }

  /// Points the calls at their parts of the workspace (null: only counts) and returns the bytes taken.
  std::int64_t place(void* workspace, const Device& device, void** state_scratch) {
    const AttentionBackward& params = call.params;
    const Geometry& g = params.geometry;
    const std::int64_t size = accumulate_size(params.dtype), channels = g.channels();
    std::int64_t total = 0;
    char* base = static_cast<char*>(workspace);
    const auto take = [&](std::int64_t bytes) -> void* {
      char* at = base ? base + total : nullptr;
      total += round_up(bytes);
      return bytes ? at : nullptr;
    };
    if (call.attention) {
      call.state = params.state ? params.state : take(state_bytes(g, params.dtype));
      *state_scratch =
          params.state || on_tensor_cores ? nullptr : take(state_workspace_bytes(params, device));
      call.grad_state = take(on_tensor_cores && !rows.state_gradient ? 0 : state_bytes(g, params.dtype));
      call.grad_partials =
          take(call.queries.chunks > 1 ? pairs * call.queries.chunks * call.plan.state() * size : 0);
      call.row_terms = take(on_tensor_cores ? 0 : g.batch * g.queries * g.heads * 2 * size);
      parameters.scale_partials = call.scale_partials = take(parameters.scale_rows * channels * size);
      if (key_scratch) {
        call.params.grad_key = {take(g.batch * g.keys * channels * element_size(params.dtype)),
                                g.keys * channels, channels};
      }
      const MutableTokens& key = call.params.grad_key;
      parameters.grad_key = {key.data, key.batch_stride, key.token_stride};
    }
    parameters.taps_partials = taps.partials = take(static_cast<std::int64_t>(parameters.taps_chunks) *
                                                    (parameters.taps + 1) * parameters.taps_channels * size);
    return total;
  }
};

Plan plan_conv(const ConvInputs& in, const Device& device) {
  Plan plan = plan_of(in.geometry, in.dtype, in.taps, device);
  plan.vector = in.geometry.channels() % (16 / element_size(in.dtype)) == 0 && aligned(in.x, in.dtype);
  return plan;
}

ConvCall conv_call(const ConvInputs& in, const Tokens& from, const MutableTokens& to, bool mirrored,
                   const Device& device) {
  ConvCall call;
  call.taps = in.taps;
  call.plan = plan_conv(in, device);
  call.plan.vector = call.plan.vector && aligned(from, in.dtype) && aligned(to, in.dtype);
  call.tiling = map_tiling(in.geometry, in.taps, device);
  call.batch = in.geometry.batch;
  call.in = from;
  call.out = to;
  call.mirrored = mirrored;
  return call;
}

TapsCall conv_taps(const ConvBackward& params, const Device& device) {
  TapsCall call = plan_taps(params.geometry, plan_conv(params, device), params.taps,
                            params.grad_weight || params.grad_bias, device);
  call.plan.vector = call.plan.vector && aligned(params.grad_out, params.dtype);
  call.in = params.x;
  call.grad_out = params.grad_out;
  return call;
}

}  // namespace

std::int64_t workspace_bytes(const AttentionBackward& params, const Device& device) {
  void* state_scratch = nullptr;
  return BackwardPlan(params, device).place(nullptr, device, &state_scratch);
}

cudaError_t launch(const AttentionBackward& params, const Device& device, void* workspace,
                   cudaStream_t stream) {
  BackwardPlan plan(params, device);
  void* state_scratch = nullptr;
  plan.place(workspace, device, &state_scratch);
  cudaError_t error = cudaSuccess;
  const bool state_missing = plan.call.attention && !params.state;
  void* state = const_cast<void*>(plan.call.state);
  if (plan.on_tensor_cores) {
    if constexpr (tensorcore::kBuilt) {
      if (state_missing) {
        error = tensorcore::launch_state(params, static_cast<float*>(state), device, stream);
      }
      if (error == cudaSuccess) {
        error = tensorcore::launch(
            params, device,
            {static_cast<const float*>(state), static_cast<float*>(plan.call.grad_state),
             static_cast<float*>(plan.call.grad_partials), static_cast<float*>(plan.call.scale_partials),
             static_cast<float*>(plan.rows.taps > 0 ? plan.taps.partials : nullptr)},
            stream);
      }
    }
  } else if (state_missing) {
    error = launch_state(params, state, device, state_scratch, stream);
  }
  return with_element(params.dtype, [&](auto e) {
    using T = decltype(e);
    if (error == cudaSuccess && plan.call.attention && !plan.on_tensor_cores) {
      error = launch_backward<T>(plan.call, stream);
    }
    if (error == cudaSuccess && plan.taps.chunks > 0) error = launch_taps<T>(plan.taps, stream);
    return error == cudaSuccess ? launch_parameters<T>(plan.parameters, stream) : error;
  });
}

std::int64_t workspace_bytes(const ConvForward&, const Device&) { return 0; }

cudaError_t launch(const ConvForward& params, const Device& device, void*, cudaStream_t stream) {
  const ConvCall call = conv_call(params, params.x, params.out, false, device);
  return with_element(params.dtype, [&](auto e) { return launch_conv<decltype(e)>(call, stream); });
}

std::int64_t workspace_bytes(const ConvBackward& params, const Device& device) {
  return taps_bytes(conv_taps(params, device), params.dtype);
}

cudaError_t launch(const ConvBackward& params, const Device& device, void* workspace, cudaStream_t stream) {
  TapsCall taps = conv_taps(params, device);
  taps.partials = workspace;
  ParameterCall parameters;
  parameters.plan = taps.plan;
  parameters.grad_weight = params.grad_weight;
  parameters.grad_bias = params.grad_bias;
  parameters.taps_partials = workspace;
  parameters.taps = static_cast<int>(params.taps.kernel_h * params.taps.kernel_w);
  parameters.taps_chunks = taps.chunks;
  parameters.taps_channels = taps.plan.channels;
  parameters.per_channel = params.taps.per_channel;
  return with_element(params.dtype, [&](auto e) {
    using T = decltype(e);
    cudaError_t error = cudaSuccess;
    if (wanted(params.grad_x)) {
      error = launch_conv<T>(conv_call(params, params.grad_out, params.grad_x, true, device), stream);
    }
    if (error == cudaSuccess && taps.chunks > 0) error = launch_taps<T>(taps, stream);
    return error == cudaSuccess ? launch_parameters<T>(parameters, stream) : error;
  });
}

}  // namespace flatten::cuda::general
