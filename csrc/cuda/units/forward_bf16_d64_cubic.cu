// Made by make_units.py from units.txt.
#include "../tensorcore/launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const ForwardKernels& forward_kernels<Dtype::kBFloat16, 64, 3>() {
  return Forward<__nv_bfloat16, 64, 3>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
