// Plans the kernels that give a warp to each head (by_head.h), both directions.
#include "by_head.h"

#include <algorithm>
#include <limits>

#include "planning.h"

namespace flatten::cuda::general {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

int taps_of(const AttentionInputs& in) { return in.taps ? static_cast<int>(in.taps.kernel_h) : 0; }

/// Whether the kernels have everything a call asks for; `plan` is of all its tensors, `shared_each` the most
/// that a block of them needs.
bool takes(const AttentionInputs& in, const Plan& plan, std::int64_t shared_bytes, const Device& device) {
  const Geometry& g = in.geometry;
  const bool mapping = in.mapping.map == FeatureMap::kFocused && in.mapping.focusing_factor == 3.0;
  const bool taps = !in.taps || (!in.taps.per_image && in.taps.kernel_h == in.taps.kernel_w &&
                                 (in.taps.kernel_h == 3 || in.taps.kernel_h == 5));
  // Pixels are found by 32-bit strides.
  const auto short_stride = [](const Tokens& t) {
    return t.token_stride * std::int64_t{sizeof(float)} <= std::numeric_limits<std::int32_t>::max();
  };
  return in.dtype == Dtype::kFloat32 && mapping && taps && in.general.is_plain() &&
         g.value_dim == g.head_dim && g.head_dim <= kWidth && g.heads <= kMostHeads && plan.vector &&
         (!in.mapping.key_bias || plan.bias_vector) && short_stride(in.value) &&
         shared_bytes <= device.shared_bytes;
}

HeadTiling head_tiling(std::int64_t tokens) {
  const int tiles = static_cast<int>(ceil_div(tokens, kHeadSlots));
  return {static_cast<int>(tokens), tiles, 1, tiles, 0, 0};
}

HeadTiling head_map_tiling(const Geometry& g) {
  const int before = static_cast<int>(ceil_div(g.prefix, kHeadSlots));
  const std::int64_t across = ceil_div(g.window_w, kHeadColumns), down = ceil_div(g.window_h, kHeadRows);
  return {static_cast<int>(g.prefix),   before,
          static_cast<int>(across),     before + static_cast<int>(across * down),
          static_cast<int>(g.window_h), static_cast<int>(g.window_w)};
}

/// Cuts the tiles into chunks such that the busiest multiprocessor has the least to do, where a block's start
/// and end take as long as a tile or two.
HeadSide head_side(const HeadTiling& tiling, std::int64_t pairs, std::int64_t heads,
                   std::int64_t shared_bytes, const Device& device) {
  // The start and end of a block, in tiles, and the warps that keep a multiprocessor busy: estimates, not
  // measured on a GPU. A multiprocessor has 65,536 registers, a thread 168 (kMostHeads).
  constexpr double kAround = 1.5;
  constexpr std::int64_t kBusyWarps = 12;
  constexpr std::int64_t kRegisters = 65536, kOfThread = 168;
  const std::int64_t fit = std::max<std::int64_t>(
      1, std::min(kRegisters / (kOfThread * 32 * heads), device.shared_bytes / (shared_bytes + 1024)));
  HeadSide best;
  double least = std::numeric_limits<double>::max();
  for (int chunk_tiles = tiling.tiles; chunk_tiles >= 1; --chunk_tiles) {
    const std::int64_t chunks = ceil_div(tiling.tiles, chunk_tiles);
    const std::int64_t blocks = ceil_div(pairs * chunks, device.multiprocessors);  // of the busiest
    // A multiprocessor runs as many blocks at a time as fit. Few warps cost as much as kBusyWarps, since they
    // wait for memory.
    const auto round = [&](std::int64_t together) {
      return static_cast<double>(std::max(together * heads, together > 0 ? kBusyWarps : 0)) / heads;
    };
    const double cost =
        (chunk_tiles + kAround) * (static_cast<double>(blocks / fit) * round(fit) + round(blocks % fit));
    if (cost < least) {
      least = cost;
      best = {tiling, static_cast<int>(chunks), chunk_tiles};
    }
  }
  return best;
}

std::int64_t pairs_of(const Geometry& g) { return g.batch * g.windows(); }

HeadForward plan_state_by_head(const AttentionInputs& in, const Plan& plan, const Device& device) {
  HeadForward call;
  static_cast<AttentionInputs&>(call.params) = in;
  call.plan = plan;
  call.keys = head_side(head_tiling(in.geometry.window_keys()), pairs_of(in.geometry), in.geometry.heads,
                        head_shared_bytes(kStateShared, in.geometry.heads), device);
  return call;
}

/// Places S and m and the partial ones, unless the caller has memory for the state.
void place_state(HeadForward& call, void* state, Workspace& workspace) {
  const Geometry& g = call.params.geometry;
  const std::int64_t bytes = state_bytes(g, Dtype::kFloat32);
  call.state = state ? static_cast<float*>(state) : workspace.take<float>(bytes);
  call.partials = call.keys.chunks == 1 ? nullptr : workspace.take<float>(call.keys.chunks * bytes);
}

struct Backward {
  HeadBackward call;
  HeadForward state;
  ParameterSums sums;

  Backward(const AttentionBackward& params, const Plan& plan, const Device& device)
      : call(plan_passes(params, plan, device)),
        state(plan_state_by_head(params, plan, device)),
        sums(params, plan, pairs_of(params.geometry) * (call.queries.chunks + call.keys.chunks),
             params.taps ? pairs_of(params.geometry) * call.keys.chunks : 0, device) {
    sums.parameters.taps_channels = plan.channels;  // each head's own
  }

  static HeadBackward plan_passes(const AttentionBackward& params, const Plan& plan, const Device& device) {
    const Geometry& g = params.geometry;
    HeadBackward call;
    call.params = params;
    call.plan = plan;
    call.attention = params.grad_query.data || params.grad_key.data || params.grad_value.data ||
                     params.grad_scale || params.grad_key_bias;
    call.queries = head_side(head_tiling(g.window_queries()), pairs_of(g), g.heads,
                             head_shared_bytes(kGradStateShared, g.heads), device);
    call.keys = head_side(params.taps ? head_map_tiling(g) : head_tiling(g.window_keys()), pairs_of(g),
                          g.heads, grad_key_shared_bytes(params), device);
    return call;
  }

  void place_attention(Workspace& workspace) {
    const AttentionBackward& p = call.params;
    const Geometry& g = p.geometry;
    const std::int64_t bytes = state_bytes(g, p.dtype), rows = g.batch * g.queries;
    if (p.state) {
      call.state = static_cast<const float*>(p.state);
    } else {
      place_state(state, nullptr, workspace);
      call.state = state.state;
    }
    call.grad_state = workspace.take<float>(bytes);
    call.grad_partials =
        call.queries.chunks == 1 ? nullptr : workspace.take<float>(call.queries.chunks * bytes);
    call.row_norms = workspace.take<float4>(rows * std::int64_t{sizeof(float4)});
    call.row_terms = workspace.take<float2>(rows * g.heads * std::int64_t{sizeof(float2)});
    if (p.grad_key_bias && !p.grad_key.data) {  // it is summed from k's gradient, which nobody else wants
      call.params.grad_key = {workspace.take(g.batch * g.keys * g.channels() * element_size(p.dtype)),
                              g.keys * g.channels(), g.channels()};
    }
  }

  void place(Workspace& workspace) {
    if (call.attention) place_attention(workspace);
    const MutableTokens& key = call.params.grad_key;
    sums.parameters.grad_key = {key.data, key.batch_stride, key.token_stride};
    sums.place(workspace);
    call.scale_partials = static_cast<float*>(sums.scale_partials());
    call.taps_partials = static_cast<float*>(sums.taps_partials());
  }

  cudaError_t launch(cudaStream_t stream) const {
    cudaError_t error =
        call.params.state || !call.attention ? cudaSuccess : launch_head_state<float>(state, stream);
    if (error == cudaSuccess) error = launch_head_backward<float>(call, stream);
    return error == cudaSuccess ? sums.launch(stream) : error;
  }
};

}  // namespace

Call choose_by_head(const AttentionForward& params, const Device& device) {
  const Geometry& g = params.geometry;
  Plan plan = plan_of(params, device);
  plan.vector = plan.vector && aligned(params.out, params.dtype);
  if (!takes(params, plan, head_shared_bytes(std::max(kStateShared, output_shared(taps_of(params))), g.heads),
             device))
    return {};
  HeadForward call = plan_state_by_head(params, plan, device);
  call.params = params;
  call.queries = head_side(params.taps ? head_map_tiling(g) : head_tiling(g.window_queries()), pairs_of(g),
                           g.heads, head_shared_bytes(output_shared(taps_of(params)), g.heads), device);
  HeadForward measured = call;
  Workspace workspace;
  place_state(measured, params.state, workspace);
  return {"general::state_by_head, output_by_head", nullptr, workspace.taken(),
          [call](void* memory, cudaStream_t stream) {
            HeadForward placed = call;
            Workspace workspace(memory);
            place_state(placed, placed.params.state, workspace);
            const cudaError_t error = launch_head_state<float>(placed, stream);
            return error == cudaSuccess ? launch_head_output<float>(placed, stream) : error;
          }};
}

Call choose_by_head(const AttentionBackward& params, const Device& device) {
  const Plan plan = plan_of(params, device);
  const int most = std::max({kStateShared, kGradStateShared, kGradQueryShared});
  const std::int64_t bytes =
      std::max(head_shared_bytes(most, params.geometry.heads), grad_key_shared_bytes(params));
  if (!takes(params, plan, bytes, device)) return {};
  Backward backward(params, plan, device);
  Workspace measured;
  Backward(backward).place(measured);
  return {"general::grad_state_by_head, grad_query_by_head, grad_key_by_head", nullptr, measured.taken(),
          [backward](void* memory, cudaStream_t stream) {
            Backward placed = backward;
            Workspace workspace(memory);
            placed.place(workspace);
            return placed.launch(stream);
          }};
}

}  // namespace flatten::cuda::general
