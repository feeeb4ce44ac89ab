#include "forward_window_launch.cuh"

template <>
const flatten::cuda::tensorcore::WindowKernels& flatten::cuda::tensorcore::window_kernels<
    flatten::Dtype::kBFloat16, 64, flatten::cuda::tensorcore::kRuntimeMode>() {
  return WindowLaunch<__nv_bfloat16, 64, kRuntimeMode>::kKernels;
}
