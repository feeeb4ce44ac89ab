// Made by make_units.py from units.txt.
#include "../tensorcore/launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const BackwardKernels& backward_kernels<Dtype::kFloat16, 16>() {
  return Backward<__half, 16>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
