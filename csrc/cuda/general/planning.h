// What the host code of the general kernels shares, forward (forward.cpp) and backward (backward.cpp,
// conv.cpp).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../workspace.h"
#include "plan.h"

namespace flatten::cuda::general {

/// The launches of one element type: a unit each (units.txt).
template <class T>
cudaError_t launch_forward(const ForwardCall& call, cudaStream_t stream);
template <class T>
cudaError_t launch_small(const ForwardCall& call, cudaStream_t stream);
template <class T>
cudaError_t launch_backward(const BackwardCall& call, cudaStream_t stream);
template <class T>
cudaError_t launch_key_gradient(const BackwardCall& call, cudaStream_t stream);
template <class T>
cudaError_t launch_conv(const ConvCall& call, cudaStream_t stream);
template <class T>
cudaError_t launch_taps(const TapsCall& call, cudaStream_t stream);
template <class T>
cudaError_t launch_parameters(const ParameterCall& call, cudaStream_t stream);

/// f with an element of the dtype's type.
template <class F>
cudaError_t with_element(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat64:
      return f(double());
    case Dtype::kFloat32:
      return f(float());
    case Dtype::kBFloat16:
      return f(__nv_bfloat16());
    case Dtype::kFloat16:
      return f(__half());
  }
  return cudaErrorInvalidValue;  // there is no other
}

bool aligned(const Tokens& tokens, Dtype dtype);
bool aligned(const MutableTokens& tokens, Dtype dtype);

/// The plan of a geometry, with `vector` as far as its shape goes.
Plan plan_of(const Geometry& geometry, Dtype dtype, const Taps& taps, const Device& device);
/// The plan of an attention call, with `vector` as far as its inputs go.
Plan plan_of(const AttentionInputs& inputs, const Device& device);

Tiling linear_tiling(std::int64_t tokens);
Tiling map_tiling(const Geometry& geometry, const Taps& taps, const Device& device);

/// What to do first when there are fewer thread blocks than the device holds: split the heads or the tokens.
enum class Prefer { kGroups, kChunks, kOneChunk };
Side side_of(const Tiling& tiling, const Plan& plan, std::int64_t pairs, const Device& device, Prefer prefer);

constexpr std::int64_t accumulate_size(Dtype dtype) { return element_size(accumulate_dtype(dtype)); }

/// S and m of all windows.
std::int64_t state_bytes(const Geometry& geometry, Dtype dtype);
/// The partial ones of a forward call.
std::int64_t partials_bytes(const ForwardCall& call);

/// A forward call that leaves S and m and no output, for a backward pass without them.
ForwardCall plan_state(const AttentionInputs& inputs, const Device& device);

/// The end of every backward pass: ordered sums of what thread blocks left behind, into the gradients of
/// parameters. Those of the taps come from a kernel of their own, unless the passes before leave theirs.
struct ParameterSums {
  Dtype dtype = Dtype::kFloat32;
  TapsCall taps;  // of no chunks: not wanted, or left by the passes
  ParameterCall parameters;

  /// `tap_rows` of partial gradients of the taps are left by the passes, `scale_rows` of those of scale.
  ParameterSums(const AttentionBackward& params, const Plan& plan, std::int64_t scale_rows,
                std::int64_t tap_rows, const Device& device);
  ParameterSums(const ConvBackward& params, const Plan& plan, const Device& device);

  void place(Workspace& workspace);
  /// Where the passes leave their partial gradients; null where nobody wants them.
  void* scale_partials() const { return const_cast<void*>(parameters.scale_partials); }
  void* taps_partials() const { return const_cast<void*>(parameters.taps_partials); }
  cudaError_t launch(cudaStream_t stream) const;
};

/// A call on the kernels that give a warp to each head (by_head.h), without kernels where these do not take
/// it.
Call choose_by_head(const AttentionForward& params, const Device& device);
Call choose_by_head(const AttentionBackward& params, const Device& device);

/// The plan of what a backward call shares: with `vector` as far as all its tensors go.
Plan plan_of(const AttentionBackward& params, const Device& device);

}  // namespace flatten::cuda::general
