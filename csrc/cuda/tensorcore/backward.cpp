// Which backward calls the tensor-core kernels take, and how they are cut into blocks: small windows in one
// launch; everything else in two, by queries and by keys. The gradients of 7 x 7 taps and the sums that give
// the gradients of parameters are the general kernels'.
#include "../general/planning.h"
#include "plan.h"

namespace flatten::cuda::tensorcore {
namespace {

struct Kernels {
  const BackwardKernels* passes = nullptr;
  const WindowGradientKernels* window = nullptr;
  int window_threads = kBackwardThreads;
};

Kernels kernels_of(const AttentionBackward& p) {
  return with_half<Kernels>(p.dtype, [&](auto dtype) {
    return with_head_dim<Kernels>(p.geometry.head_dim, [&](auto head_dim) {
      Kernels found{&backward_kernels<dtype, head_dim>(), &window_gradient_kernels<dtype, head_dim>()};
      if constexpr (head_dim == 32) {
        if (p.geometry.channels() > kBackwardThreads) {
          found.window = &window_gradient_kernels<dtype, head_dim, kWideThreads>();
          found.window_threads = kWideThreads;
        }
      }
      return found;
    });
  });
}

struct Plan {
  int windows, taps;
  WindowGrid queries, keys;
  int groups = 0;  // of warps in the one launch, if one block takes a window; else:
  Chunks chunks;   // of queries
  Strips strips;   // of keys
};

Plan plan_of(const AttentionBackward& p, const Device& device, const Kernels& kernels) {
  const Geometry& g = p.geometry;
  const int channels = static_cast<int>(g.channels()), head_dim = static_cast<int>(g.head_dim);
  const int windows = static_cast<int>(g.batch * g.windows()), taps = taps_of(p);
  const WindowGrid map = grid_of(g);
  const WindowGrid keys = p.taps || !map.raster ? map : flat_grid(g.keys);
  Plan plan{windows,
            taps,
            map,
            keys,
            0,
            Chunks(static_cast<int>(g.window_queries()), windows, channels, window_state_elements(g),
                   kBackwardThreads, of_head_dim(kQueryCosts, head_dim), device,
                   [&](int groups) { return kernels.passes->query_shared(channels, groups); }),
            Strips(
                keys, windows, kBackwardThreads, of_head_dim(kKeyCosts, head_dim), device,
                [&](int patches) { return channels * patches; },
                [&](int patches) {
                  return kernels.passes->key_shared(taps, channels, patches, p.taps.per_channel);
                })};
  const std::int64_t tokens = std::max(g.window_queries(), g.window_keys());
  if (are_small_windows(tokens, windows) && taps != 7) {
    for (int groups = keys.window_w <= kPatchColumns ? 1 : kMaxPatches; groups > 0 && !plan.groups;
         --groups) {
      const int shared = kernels.window->shared_bytes(taps, channels, groups, p.taps.per_channel,
                                                      keys.window_h * keys.window_w);
      if (channels * groups <= kernels.window_threads && shared <= device.shared_bytes) plan.groups = groups;
    }
  }
  return plan;
}

QueryGradientParams query_params_of(const AttentionBackward& p, const Plan& plan) {
  const Geometry& g = p.geometry;
  return {plan.queries,
          focus_of(p),
          tokens(p.query),
          tokens(p.grad_out),
          tokens(p.grad_query),
          /*state=*/nullptr,
          static_cast<int>(g.channels()),
          static_cast<int>(g.window_queries()),
          plan.chunks.chunk,
          plan.chunks.groups,
          static_cast<float>(p.eps),
          1.0f / static_cast<float>(g.window_keys()),
          /*partial=*/nullptr,
          /*scale_partials=*/nullptr};
}

KeyGradientParams key_params_of(const AttentionBackward& p, const Plan& plan) {
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
          /*state_gradient=*/nullptr,
          floats(p.taps.weight),
          p.taps.per_channel,
          static_cast<int>(g.channels()),
          static_cast<int>(g.keys),
          static_cast<int>(g.window_keys()),
          plan.groups ? plan.groups : plan.strips.patches,
          plan.strips.rows,
          /*scale_partials=*/nullptr,
          /*tap_partials=*/nullptr};
}

/// All that a call enqueues.
struct Backward {
  AttentionInputs inputs;
  Device device;
  Kernels kernels;
  Plan plan;
  QueryGradientParams query;
  KeyGradientParams key;
  general::ParameterSums sums;
  StateLaunch state_launch;  // where they are not saved:
  const float* saved_state;  // S and m as the forward left them, or null
  float* state_gradient = nullptr;

  /// The strips of keys, in each of which partial gradients of the taps are left.
  static std::int64_t key_blocks(const Plan& plan) {
    return plan.windows *
           (plan.groups ? std::int64_t{1} : std::int64_t{plan.strips.strips} * plan.strips.runs);
  }
  /// Partial gradients of scale: by chunks of queries, then by strips of keys.
  static std::int64_t scale_rows(const Plan& plan) {
    return key_blocks(plan) + (plan.groups ? 0 : std::int64_t{plan.windows} * plan.chunks.chunks);
  }
  static std::int64_t tap_rows(const Plan& plan) { return sums_taps(plan.taps) ? key_blocks(plan) : 0; }

  Backward(const AttentionBackward& p, const Device& device, const Kernels& kernels, const Plan& plan)
      : inputs(p),
        device(device),
        kernels(kernels),
        plan(plan),
        query(query_params_of(p, plan)),
        key(key_params_of(p, plan)),
        sums(p, general::plan_of(p, device), scale_rows(plan), tap_rows(plan), device),
        state_launch(p, device),
        saved_state(static_cast<const float*>(p.state)) {}

  std::int64_t state_size() const { return window_state_elements(inputs.geometry); }

  /// Points the launches at the workspace.
  void place(Workspace& workspace) {
    const std::int64_t bytes = plan.windows * state_size() * std::int64_t{sizeof(float)};
    query.state = saved_state;
    if (!saved_state) {
      float* state = workspace.take<float>(bytes);
      query.state = state;
      state_launch.place(state, workspace);
    }
    if (!plan.groups) {
      state_gradient = workspace.take<float>(bytes);
      const int chunks = plan.chunks.chunks;
      query.partial = chunks > 1 ? workspace.take<float>(chunks * bytes) : state_gradient;
      key.state_gradient = state_gradient;
    }
    sums.place(workspace);
    query.scale_partials = key.scale_partials = static_cast<float*>(sums.scale_partials());
    if (key.scale_partials && !plan.groups) {  // after the queries'
      key.scale_partials += std::int64_t{plan.windows} * plan.chunks.chunks * key.channels;
    }
    if (tap_rows(plan) > 0) key.tap_partials = static_cast<float*>(sums.taps_partials());
  }

  cudaError_t launch(cudaStream_t stream) const {
    cudaError_t error = saved_state ? cudaSuccess : state_launch.launch(stream);
    if (error == cudaSuccess) error = plan.groups ? launch_window(stream) : launch_passes(stream);
    return error == cudaSuccess ? sums.launch(stream) : error;
  }

  cudaError_t launch_window(cudaStream_t stream) const {
    return kernels.window->launch({query, key}, plan.taps, plan.windows, stream);
  }

  cudaError_t launch_passes(cudaStream_t stream) const {
    const int chunks = plan.chunks.chunks;
    cudaError_t error = kernels.passes->query(query, chunks, plan.windows, stream);
    if (error == cudaSuccess && chunks > 1) {
      error = reduce_state(query.partial, state_gradient, plan.windows, chunks, state_size(), stream);
    }
    if (error != cudaSuccess) return error;
    return kernels.passes->key(key, plan.taps, dim3(plan.strips.strips, plan.strips.runs, plan.windows),
                               stream);
  }
};

}  // namespace

/// As forward, but up to 256 channels only (384 in heads of 32 where windows are small) and no 7 x 7 taps
/// from head dimension 64 on.
Call choose_all_heads(const AttentionBackward& p, const Device& device) {
  if (const char* why = unsuited(p, device)) return refuse(why);
  if (p.mapping.map != FeatureMap::kFocused) return refuse("features that are mapped already");
  if (p.geometry.head_dim >= 64 && taps_of(p) == 7) {  // their operands do not fit the registers
    return refuse("7 x 7 taps with a head dimension of 64 or more");
  }
  if (!p.grad_query.data || !p.grad_key.data || !p.grad_value.data) {
    return refuse("not all gradients of q, k and v are wanted");
  }
  if (!aligned(p.grad_out)) return refuse(kUnaligned);
  for (const MutableTokens* x : {&p.grad_query, &p.grad_key, &p.grad_value}) {
    if (!aligned(*x)) return refuse(kUnaligned);
  }
  if (p.geometry.windows() > kMostBlocks) return refuse(kTooManyWindows);  // launch_state counts them in y
  const int channels = static_cast<int>(p.geometry.channels());
  const Kernels kernels = kernels_of(p);
  const Plan plan = plan_of(p, device, kernels);
  if (!plan.groups) {
    if (plan.windows > kMostBlocks) return refuse(kTooManyWindows);
    if (channels > kBackwardThreads) return refuse("more than 256 channels in large windows");
    if (kernels.passes->query_shared(channels, plan.chunks.groups) > device.shared_bytes ||
        kernels.passes->key_shared(plan.taps, channels, plan.strips.patches, p.taps.per_channel) >
            device.shared_bytes) {
      return refuse(kTooMuchShared);
    }
  }
  Backward backward(p, device, kernels, plan);
  if (!p.state && backward.state_launch.shared_bytes() > device.shared_bytes) return refuse(kTooMuchShared);
  Workspace measured;
  backward.place(measured);
  return {plan.groups ? "tensorcore::backward_window" : "tensorcore::backward_query, backward_key", nullptr,
          measured.taken(), [backward](void* memory, cudaStream_t stream) {
            Backward placed = backward;
            Workspace workspace(memory);
            placed.place(workspace);
            return placed.launch(stream);
          }};
}

}  // namespace flatten::cuda::tensorcore
