// Plans the general kernels: how a call is cut into tiles, chunks and head groups; and the forward pass.
#include <algorithm>

#include "planning.h"

namespace flatten::cuda::general {

namespace {

/// More than the 64 KiB a block may have on sm_75: everything from sm_80 on.
bool roomy(const Device& device) { return device.shared_bytes >= 96 * 1024; }

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

bool has_wide_halo(const Taps& taps) { return std::max(taps.kernel_h, taps.kernel_w) > 5; }

/// Channels whose 1 / scale lies in shared memory, 4 KiB in float: those of all published models. Further
/// ones are divided by as they come.
constexpr int kStagedScale = 1024;

/// With 64 KiB, float64 and the halo of 7 x 7 taps leave no room for it.
int staged_scale(const Geometry& g, Dtype dtype, const Taps& taps, const Device& device) {
  if (!roomy(device) && (dtype == Dtype::kFloat64 || has_wide_halo(taps))) return 0;
  return static_cast<int>(std::min<std::int64_t>(ceil_div(g.channels(), 4) * 4, kStagedScale));
}

bool aligned_rows(const void* data, std::int64_t batch_stride, std::int64_t token_stride, Dtype dtype) {
  const std::int64_t vector = 16 / element_size(dtype);
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && batch_stride % vector == 0 &&
         token_stride % vector == 0;
}

}  // namespace

bool aligned(const Tokens& t, Dtype dtype) {
  return aligned_rows(t.data, t.batch_stride, t.token_stride, dtype);
}
bool aligned(const MutableTokens& t, Dtype dtype) {
  return aligned_rows(t.data, t.batch_stride, t.token_stride, dtype);
}

Plan plan_of(const Geometry& g, Dtype dtype, const Taps& taps, const Device& device) {
  Plan plan;
  plan.map = {static_cast<int>(g.prefix),
              static_cast<int>(g.map_h),
              static_cast<int>(g.map_w),
              static_cast<int>(g.window_h),
              static_cast<int>(g.window_w),
              static_cast<int>(g.windows_w()),
              static_cast<int>(g.shift_h),
              static_cast<int>(g.shift_w),
              g.windows() == 1 && g.shift_h == 0 && g.shift_w == 0};
  plan.windows = static_cast<int>(g.windows());
  plan.heads = static_cast<int>(g.heads);
  plan.head_dim = static_cast<int>(g.head_dim);
  plan.channels = static_cast<int>(g.channels());
  plan.staged_scale = staged_scale(g, dtype, taps, device);
  plan.blocks = static_cast<int>(ceil_div(g.head_dim, kWidth));
  plan.inverse_keys = 1.0 / static_cast<double>(g.window_keys());
  plan.resident = plan.blocks == 1 || (plan.blocks == 2 && dtype != Dtype::kFloat64 && roomy(device));
  plan.matrix_blocks = plan.resident ? plan.blocks * plan.blocks : 1;
  plan.vector = g.head_dim % (16 / element_size(dtype)) == 0;
  return plan;
}

Plan plan_of(const AttentionInputs& in, const Device& device) {
  Plan plan = plan_of(in.geometry, in.dtype, in.taps, device);
  for (const Tokens* t : {&in.query, &in.key, &in.value}) plan.vector = plan.vector && aligned(*t, in.dtype);
  const Parameter& bias = in.mapping.key_bias;
  plan.bias_vector = plan.vector && aligned_rows(bias.data, 0, in.geometry.channels(), bias.dtype);
  return plan;
}

Tiling linear_tiling(std::int64_t tokens) {
  const int tiles = static_cast<int>(ceil_div(tokens, kSlots));
  return {static_cast<int>(tokens), tiles, 1, tiles, 6, 0, 0};
}

Tiling map_tiling(const Geometry& g, const Taps& taps, const Device& device) {
  // 8 x 8 has the smallest border; 4 x 16 and 16 x 4 may fit the window in fewer tiles, but 64 KiB do not
  // hold their border of 7 x 7 taps.
  int log_width = 3;
  std::int64_t best = 0;
  for (int candidate : {3, 4, 2}) {
    if (candidate != 3 && has_wide_halo(taps) && !roomy(device)) continue;
    const std::int64_t tiles =
        ceil_div(g.window_w, 1 << candidate) * ceil_div(g.window_h, kSlots >> candidate);
    if (best == 0 || tiles < best) {
      best = tiles;
      log_width = candidate;
    }
  }
  const int prefix_tiles = static_cast<int>(ceil_div(g.prefix, kSlots));
  return {static_cast<int>(g.prefix),
          prefix_tiles,
          static_cast<int>(ceil_div(g.window_w, 1 << log_width)),
          prefix_tiles + static_cast<int>(best),
          log_width,
          static_cast<int>(g.window_h),
          static_cast<int>(g.window_w)};
}

Side side_of(const Tiling& tiling, const Plan& plan, std::int64_t pairs, const Device& device,
             Prefer prefer) {
  Side side;
  side.tiling = tiling;
  side.chunk_tiles = std::min(kChunkTiles, tiling.tiles);
  // Two blocks of 128 threads for each multiprocessor at least. More groups cost reads of the rows' norms,
  // from the second-level cache; more chunks of keys cost partial sums in memory.
  const std::int64_t wanted = 2 * device.multiprocessors;
  const auto blocks = [&] { return pairs * ceil_div(tiling.tiles, side.chunk_tiles) * side.groups; };
  const auto more_groups = [&] {
    side.groups = static_cast<int>(
        std::clamp<std::int64_t>(ceil_div(wanted, std::max<std::int64_t>(blocks(), 1)), 1, plan.heads));
  };
  if (prefer == Prefer::kGroups) more_groups();
  while (prefer != Prefer::kOneChunk && side.chunk_tiles > 1 && blocks() < wanted) --side.chunk_tiles;
  if (prefer != Prefer::kGroups) more_groups();
  side.chunks = static_cast<int>(ceil_div(tiling.tiles, side.chunk_tiles));
  side.heads_per_group = static_cast<int>(ceil_div(plan.heads, side.groups));
  side.groups = static_cast<int>(ceil_div(plan.heads, side.heads_per_group));
  return side;
}

namespace {

ForwardCall plan_forward(const AttentionForward& params, const Device& device, bool state_only) {
  const Geometry& g = params.geometry;
  ForwardCall call;
  call.params = params;
  call.plan = plan_of(params, device);
  call.plan.vector = call.plan.vector && (state_only || aligned(params.out, params.dtype));
  call.state_only = state_only;
  const std::int64_t pairs = g.batch * g.windows();
  const Tiling keys = linear_tiling(g.window_keys());
  const Tiling queries = params.taps ? map_tiling(g, params.taps, device) : linear_tiling(g.window_queries());
  call.small = !state_only && g.window_keys() <= kChunkSlots && queries.tiles <= kChunkTiles &&
               call.plan.resident && params.dtype != Dtype::kFloat64 &&
               (roomy(device) || !has_wide_halo(params.taps));
  const Prefer prefer = call.small ? Prefer::kOneChunk : Prefer::kGroups;
  call.keys = side_of(keys, call.plan, pairs, device, prefer);
  call.queries = side_of(queries, call.plan, pairs, device, call.small ? prefer : Prefer::kChunks);
  return call;
}

}  // namespace

std::int64_t state_bytes(const Geometry& g, Dtype dtype) {
  return state_elements(g) * accumulate_size(dtype);
}

std::int64_t partials_bytes(const ForwardCall& call) {
  return call.keys.chunks == 1 ? 0 : call.keys.chunks * state_bytes(call.params.geometry, call.params.dtype);
}

ForwardCall plan_state(const AttentionInputs& in, const Device& device) {
  AttentionForward forward;
  static_cast<AttentionInputs&>(forward) = in;
  return plan_forward(forward, device, true);
}

Call choose(const AttentionForward& params, const Device& device) {
  if (Call call = choose_by_head(params, device)) return call;
  const auto place = [](ForwardCall& call, Workspace& workspace) {
    const AttentionForward& p = call.params;
    call.state = p.state;
    if (!call.small && !p.state) call.state = workspace.take(state_bytes(p.geometry, p.dtype));
    call.partials = workspace.take(partials_bytes(call));
  };
  ForwardCall plan = plan_forward(params, device, false);
  Workspace measured;
  place(plan, measured);
  return {plan.small ? "general::attend_small" : "general::attend", nullptr, measured.taken(),
          [plan, place](void* memory, cudaStream_t stream) {
            ForwardCall call = plan;
            Workspace workspace(memory);
            place(call, workspace);
            return with_element(call.params.dtype, [&](auto e) {
              using T = decltype(e);
              return call.small ? launch_small<T>(call, stream) : launch_forward<T>(call, stream);
            });
          }};
}

}  // namespace flatten::cuda::general
