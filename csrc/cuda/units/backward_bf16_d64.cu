// Made by make_units.py from units.txt.
#include "../tensorcore/launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const BackwardKernels& backward_kernels<Dtype::kBFloat16, 64>() {
  return Backward<__nv_bfloat16, 64>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
