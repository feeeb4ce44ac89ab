// Made by make_units.py from units.txt.
#include "../tensorcore/launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const ForwardKernels& forward_kernels<Dtype::kFloat16, 128, kRuntimeMode>() {
  return Forward<__half, 128, kRuntimeMode>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
