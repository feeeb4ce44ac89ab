#include "backward_launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const BackwardKernels& backward_kernels<kRuntimeMode>() {
  return Backward<kRuntimeMode>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
