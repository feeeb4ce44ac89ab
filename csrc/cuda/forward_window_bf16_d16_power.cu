#include "forward_window_launch.cuh"

template <>
const flatten::cuda::tensorcore::WindowKernels& flatten::cuda::tensorcore::window_kernels<
    flatten::Dtype::kBFloat16, 16, flatten::cuda::tensorcore::kRuntimeMode>() {
  return WindowLaunch<__nv_bfloat16, 16, kRuntimeMode>::kKernels;
}
