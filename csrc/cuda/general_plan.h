// Planning shared by the general kernels' forward (general.cu) and backward (general_backward.cu).
#pragma once

#include <cstdint>

#include "general_calls.h"

namespace flatten::cuda::general {

/// f with an element of the dtype's type.
template <class F>
auto with_element(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat64:
      return f(double());
    case Dtype::kFloat32:
      return f(float());
    case Dtype::kBFloat16:
      return f(__nv_bfloat16());
    default:
      return f(__half());
  }
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

/// Parts of the workspace start on 256 bytes.
constexpr std::int64_t round_up(std::int64_t bytes) { return (bytes + 255) / 256 * 256; }

/// Hands out the workspace front to back.
class Scratch {
 public:
  explicit Scratch(void* data) : next_(static_cast<char*>(data)) {}
  void* take(std::int64_t bytes) {
    if (bytes == 0) return nullptr;
    void* at = next_;
    next_ += round_up(bytes);
    return at;
  }

 private:
  char* next_;
};

std::int64_t state_bytes(const Geometry& geometry, Dtype dtype);

/// Recomputes S and m from k and v, for a backward pass without them.
std::int64_t state_workspace_bytes(const AttentionInputs& inputs, const Device& device);
cudaError_t launch_state(const AttentionInputs& inputs, void* state, const Device& device, void* workspace,
                         cudaStream_t stream);

}  // namespace flatten::cuda::general
