#include "forward_window_launch.cuh"

template <>
const flatten::cuda::tensorcore::WindowKernels&
flatten::cuda::tensorcore::window_kernels<flatten::Dtype::kFloat16, 32, 3>() {
  return WindowLaunch<__half, 32, 3>::kKernels;
}
