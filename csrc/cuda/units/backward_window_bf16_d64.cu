// Made by make_units.py from units.txt.
#include "../tensorcore/launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const WindowGradientKernels& window_gradient_kernels<Dtype::kBFloat16, 64>() {
  return BackwardWindow<__nv_bfloat16, 64>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
