#include "backward_launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const BackwardKernels& backward_kernels<Dtype::kBFloat16, 128, kRuntimeMode>() {
  return Backward<__nv_bfloat16, 128, kRuntimeMode>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
