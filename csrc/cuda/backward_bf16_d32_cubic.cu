#include "backward_launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const BackwardKernels& backward_kernels<3>() {
  return Backward<3>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
