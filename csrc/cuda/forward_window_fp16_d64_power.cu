#include "forward_window_launch.cuh"

template <>
const flatten::cuda::tensorcore::WindowKernels& flatten::cuda::tensorcore::window_kernels<
    flatten::Dtype::kFloat16, 64, flatten::cuda::tensorcore::kRuntimeMode>() {
  return WindowLaunch<__half, 64, kRuntimeMode>::kKernels;
}
