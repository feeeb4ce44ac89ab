// Made by make_units.py from units.txt.
#include "../tensorcore/launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const WindowKernels& window_kernels<Dtype::kBFloat16, 32, 3>() {
  return WindowLaunch<__nv_bfloat16, 32, 3>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
