// The parameters of the one-launch window kernel, and the table of functions that launch it.
#pragma once

#include "tensorcore_params.h"

namespace flatten::cuda::tensorcore {

struct WindowParams {
  WindowGrid grid;
  FocusParams focus;
  TokenArray query, key, value, out;
  float* state;  // where to store S and m, laid out as launch.h says, or null
  Floats weight, bias;
  bool per_channel;
  int channels;
  float eps;  // added to the denominator
};

/// The kernels of one element type, head dimension and mode (3, the paper's, or kRuntimeMode), for no taps, 3
/// x 3 and 5 x 5; one instantiation unit each (forward_window_*.cu).
struct WindowKernels {
  int (*shared_bytes)(int taps, int channels, int keys, bool per_channel);
  cudaError_t (*launch)(const WindowParams& params, int taps, int windows, cudaStream_t stream);
};
template <Dtype kDtype, int kHeadDim, int kMode>
const WindowKernels& window_kernels();

}  // namespace flatten::cuda::tensorcore
