// Made by make_units.py from units.txt.
#include "../tensorcore/launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const WindowKernels& window_kernels<Dtype::kFloat16, 64, kRuntimeMode>() {
  return WindowLaunch<__half, 64, kRuntimeMode>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
