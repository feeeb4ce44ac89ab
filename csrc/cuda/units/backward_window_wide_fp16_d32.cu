// Made by make_units.py from units.txt.
#include "../tensorcore/launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const WindowGradientKernels& window_gradient_kernels<Dtype::kFloat16, 32, kWideThreads>() {
  return BackwardWindow<__half, 32, kWideThreads>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
