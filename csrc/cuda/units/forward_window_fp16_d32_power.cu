// Made by make_units.py from units.txt.
#include "../tensorcore/launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const WindowKernels& window_kernels<Dtype::kFloat16, 32, kRuntimeMode>() {
  return WindowLaunch<__half, 32, kRuntimeMode>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
