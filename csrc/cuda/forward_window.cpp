// Which forward calls one block to a window takes, in one launch.
#include "tensorcore.h"
#include "tensorcore_plan.h"
#include "window_params.h"

namespace flatten::cuda::tensorcore {
namespace {

// A window's V stays in shared memory, and its products in the registers of one block.
constexpr std::int64_t kMaxKeys = 256;
// Windows of more tokens than this take a block many steps: only where enough of them fill the machine.
constexpr std::int64_t kFewKeys = 64, kManyWindows = 32;

template <Dtype kDtype>
const WindowKernels* kernels_of(const AttentionForward& p) {
  const bool cubic = p.mapping.focused && p.mapping.focusing_factor == 3;
  switch (p.geometry.head_dim) {
    case 16:
      return &window_kernels<kDtype, 16, kRuntimeMode>();
    case 32:
      return cubic ? &window_kernels<kDtype, 32, kCubicMode<kDtype>>()
                   : &window_kernels<kDtype, 32, kRuntimeMode>();
    case 64:
      return cubic ? &window_kernels<kDtype, 64, kCubicMode<kDtype>>()
                   : &window_kernels<kDtype, 64, kRuntimeMode>();
    default:
      return nullptr;
  }
}

const WindowKernels* kernels_of(const AttentionForward& p) {
  if (p.dtype == Dtype::kBFloat16) return kernels_of<Dtype::kBFloat16>(p);
  if (p.dtype == Dtype::kFloat16) return kernels_of<Dtype::kFloat16>(p);
  return nullptr;
}

}  // namespace

bool takes_windows(const AttentionForward& p, const Device& device) {
  const Geometry& g = p.geometry;
  const std::int64_t keys = g.window_h * g.window_w, windows = g.batch * g.windows();
  const int taps = taps_of(p), head_dim = static_cast<int>(g.head_dim),
            channels = static_cast<int>(g.channels());
  if (!suits(p, device) || !kernels_of(p) || !aligned(p.out) || taps == 7) return false;
  if (g.queries != g.keys || g.window_h < kStepRows || g.window_w < kStepRows) return false;
  if (keys > kMaxKeys || (keys > kFewKeys && windows < kManyWindows)) return false;
  return channels <= max_threads(head_dim, taps) &&
         kernels_of(p)->shared_bytes(taps, channels, static_cast<int>(keys), p.taps.per_channel) <=
             device.shared_bytes;
}

cudaError_t launch_windows(const AttentionForward& p, cudaStream_t stream) {
  const Geometry& g = p.geometry;
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
                            static_cast<int>(g.channels()),
                            static_cast<float>(p.eps)};
  return kernels_of(p)->launch(params, taps_of(p), static_cast<int>(g.batch * g.windows()), stream);
}

}  // namespace flatten::cuda::tensorcore
