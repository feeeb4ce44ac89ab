#include "forward_launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const ForwardKernels& forward_kernels<Dtype::kFloat16, 32, 3>() {
  return Forward<__half, 32, 3>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
