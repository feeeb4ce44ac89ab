// Made by make_units.py from units.txt.
#include "../tensorcore/launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const WindowGradientKernels& window_gradient_kernels<Dtype::kFloat16, 64>() {
  return BackwardWindow<__half, 64>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
