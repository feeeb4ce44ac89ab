// Made by make_units.py from units.txt.
#include "../tensorcore/heads/launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const heads::Kernels& heads::kernels<Dtype::kFloat16, 64>() {
  return heads::Launches<__half, 64>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
