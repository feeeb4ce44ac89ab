#include "forward_window_launch.cuh"

template <>
const flatten::cuda::tensorcore::WindowKernels&
flatten::cuda::tensorcore::window_kernels<flatten::Dtype::kFloat16, 64, 3>() {
  return WindowLaunch<__half, 64, 3>::kKernels;
}
