// Made by make_units.py from units.txt.
#include "../tensorcore/launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const BackwardKernels& backward_kernels<Dtype::kBFloat16, 128>() {
  return Backward<__nv_bfloat16, 128>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
