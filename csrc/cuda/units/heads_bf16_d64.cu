// Made by make_units.py from units.txt.
#include "../tensorcore/heads/launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const heads::Kernels& heads::kernels<Dtype::kBFloat16, 64>() {
  return heads::Launches<__nv_bfloat16, 64>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
