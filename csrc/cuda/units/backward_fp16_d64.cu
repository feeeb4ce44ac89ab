// Made by make_units.py from units.txt.
#include "../tensorcore/launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const BackwardKernels& backward_kernels<Dtype::kFloat16, 64>() {
  return Backward<__half, 64>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
