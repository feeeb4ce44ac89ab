#include "backward_launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const BackwardKernels& backward_kernels<Dtype::kFloat16, 128, kRuntimeMode>() {
  return Backward<__half, 128, kRuntimeMode>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
