#include "forward_window_launch.cuh"

template <>
const flatten::cuda::tensorcore::WindowKernels& flatten::cuda::tensorcore::window_kernels<
    flatten::Dtype::kBFloat16, 32, flatten::cuda::tensorcore::kRuntimeMode>() {
  return WindowLaunch<__nv_bfloat16, 32, kRuntimeMode>::kKernels;
}
