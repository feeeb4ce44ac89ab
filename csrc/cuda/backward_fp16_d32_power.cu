#include "backward_launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const BackwardKernels& backward_kernels<Dtype::kFloat16, 32, kRuntimeMode>() {
  return Backward<__half, 32, kRuntimeMode>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
