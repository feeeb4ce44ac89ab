// Plans the general kernels' backward pass.
#include "planning.h"

namespace flatten::cuda::general {
namespace {

bool wanted(const MutableTokens& t) { return t.data != nullptr; }

/// The passes by queries and by keys, and S and m before them where the forward kept none.
struct Backward {
  BackwardCall call;
  ForwardCall state;
  ParameterSums sums;
  bool state_missing;
  bool key_scratch;  // key_bias's gradient is summed from k's, which nobody else wants

  Backward(const AttentionBackward& params, const Device& device)
      : call(plan_passes(params, device)),
        sums(params, call.plan,
             params.geometry.batch * params.geometry.windows() * (call.queries.chunks + call.keys.chunks),
             /*tap_rows=*/0, device),
        state_missing(call.attention && !params.state),
        key_scratch(params.grad_key_bias && !wanted(params.grad_key)) {
    if (state_missing) state = plan_state(params, device);
  }

  static BackwardCall plan_passes(const AttentionBackward& params, const Device& device) {
    const Geometry& g = params.geometry;
    BackwardCall call;
    call.params = params;
    call.plan = plan_of(params, device);
    call.attention = wanted(params.grad_query) || wanted(params.grad_key) || wanted(params.grad_value) ||
                     params.grad_scale || params.grad_key_bias;
    const std::int64_t pairs = g.batch * g.windows();
    call.queries = side_of(linear_tiling(g.window_queries()), call.plan, pairs, device, Prefer::kGroups);
    const Tiling keys = params.taps ? map_tiling(g, params.taps, device) : linear_tiling(g.window_keys());
    call.keys = side_of(keys, call.plan, pairs, device, Prefer::kChunks);
    return call;
  }

  void place(Workspace& workspace) {
    const AttentionBackward& p = call.params;
    const Geometry& g = p.geometry;
    const std::int64_t size = accumulate_size(p.dtype);
    if (call.attention) {
      call.state = p.state;
      if (state_missing) {
        call.state = state.state = workspace.take(state_bytes(g, p.dtype));
        state.partials = workspace.take(partials_bytes(state));
      }
      call.grad_state = workspace.take(state_bytes(g, p.dtype));
      if (call.queries.chunks > 1) {
        call.grad_partials = workspace.take(call.queries.chunks * state_bytes(g, p.dtype));
      }
      call.row_terms = workspace.take(g.batch * g.queries * g.heads * 2 * size);
      if (key_scratch) {
        call.params.grad_key = {workspace.take(g.batch * g.keys * g.channels() * element_size(p.dtype)),
                                g.keys * g.channels(), g.channels()};
      }
      const MutableTokens& key = call.params.grad_key;
      sums.parameters.grad_key = {key.data, key.batch_stride, key.token_stride};
    }
    sums.place(workspace);
    call.scale_partials = sums.scale_partials();
  }

  cudaError_t launch(cudaStream_t stream) const {
    return with_element(call.params.dtype, [&](auto e) {
      using T = decltype(e);
      cudaError_t error = state_missing ? launch_forward<T>(state, stream) : cudaSuccess;
      if (error == cudaSuccess && call.attention) error = launch_backward<T>(call, stream);
      return error == cudaSuccess ? sums.launch(stream) : error;
    });
  }
};

}  // namespace

Plan plan_of(const AttentionBackward& params, const Device& device) {
  Plan plan = plan_of(static_cast<const AttentionInputs&>(params), device);
  plan.vector = plan.vector && aligned(params.grad_out, params.dtype);
  for (const MutableTokens* t : {&params.grad_query, &params.grad_key, &params.grad_value}) {
    plan.vector = plan.vector && aligned(*t, params.dtype);
  }
  plan.resident = plan.blocks == 1;
  plan.matrix_blocks = 1;
  return plan;
}

Call choose(const AttentionBackward& params, const Device& device) {
  if (Call call = choose_by_head(params, device)) return call;
  Backward plan(params, device);
  Workspace measured;
  plan.place(measured);
  return {"general::gradient_of_query, gradient_of_key", nullptr, measured.taken(),
          [plan](void* memory, cudaStream_t stream) {
            Backward backward = plan;
            Workspace workspace(memory);
            backward.place(workspace);
            return backward.launch(stream);
          }};
}

}  // namespace flatten::cuda::general
