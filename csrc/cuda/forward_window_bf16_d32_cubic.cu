#include "forward_window_launch.cuh"

template <>
const flatten::cuda::tensorcore::WindowKernels&
flatten::cuda::tensorcore::window_kernels<flatten::Dtype::kBFloat16, 32, 3>() {
  return WindowLaunch<__nv_bfloat16, 32, 3>::kKernels;
}
