// The launches that give S and m: for the forward pass, and for a backward pass that was not given them.
#include <algorithm>

#include "plan.h"

namespace flatten::cuda::tensorcore {
namespace {

StateParams state_params_of(const AttentionInputs& p, const Chunks& chunks) {
  const Geometry& g = p.geometry;
  FocusParams focus = focus_of(p);
  focus.key_bias = floats(p.mapping.key_bias);
  return {grid_of(g),
          focus,
          tokens(p.key),
          tokens(p.value),
          static_cast<int>(g.channels()),
          static_cast<int>(g.window_keys()),
          chunks.chunk,
          chunks.groups,
          /*partial=*/nullptr};
}

int shared_of(const ForwardKernels& kernels, const AttentionInputs& p, int groups) {
  return kernels.state_shared(static_cast<int>(p.geometry.channels()), groups,
                              static_cast<bool>(p.mapping.key_bias));
}

}  // namespace

StateLaunch::StateLaunch(const AttentionInputs& p, const Device& device)
    : kernels_(forward_kernels_of(p)),
      chunks_(static_cast<int>(p.geometry.window_keys()), p.geometry.batch * p.geometry.windows(),
              static_cast<int>(p.geometry.channels()), window_state_elements(p.geometry),
              max_threads(static_cast<int>(p.geometry.head_dim)),
              of_head_dim(kStateCosts, p.geometry.head_dim), device,
              [&](int groups) { return shared_of(*kernels_, p, groups); }),
      params_(state_params_of(p, chunks_)),
      images_(p.geometry.batch),
      windows_(p.geometry.windows()),
      size_(window_state_elements(p.geometry)),
      shared_bytes_(shared_of(*kernels_, p, chunks_.groups)) {}

void StateLaunch::place(float* state, Workspace& workspace) {
  state_ = state;
  const std::int64_t bytes = images_ * windows_ * size_ * std::int64_t{sizeof(float)};
  params_.partial = chunks_.chunks > 1 ? workspace.take<float>(chunks_.chunks * bytes) : state;
}

cudaError_t StateLaunch::launch(cudaStream_t stream) const {
  // Small windows may be more than a grid has blocks in y: then some images at a time.
  const std::int64_t most = std::max<std::int64_t>(1, kMostBlocks / windows_);
  for (std::int64_t image = 0; image < images_; image += most) {
    const std::int64_t first = image * windows_ * size_;
    const int windows = static_cast<int>(std::min(most, images_ - image) * windows_);
    StateParams params = params_;
    for (TokenArray* x : {&params.key, &params.value}) {
      x->data = static_cast<const char*>(x->data) + image * x->image;
    }
    params.partial += first * chunks_.chunks;
    cudaError_t error = kernels_->state(params, chunks_.chunks, windows, stream);
    if (error == cudaSuccess && chunks_.chunks > 1) {
      error = reduce_state(params.partial, state_ + first, windows, chunks_.chunks, size_, stream);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace flatten::cuda::tensorcore
