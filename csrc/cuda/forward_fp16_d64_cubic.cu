#include "forward_launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const ForwardKernels& forward_kernels<Dtype::kFloat16, 64, 3>() {
  return Forward<__half, 64, 3>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
