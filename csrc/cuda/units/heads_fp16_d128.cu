// Made by make_units.py from units.txt.
#include "../tensorcore/heads/launch.cuh"

namespace flatten::cuda::tensorcore {
template <>
const heads::Kernels& heads::kernels<Dtype::kFloat16, 128>() {
  return heads::Launches<__half, 128>::kKernels;
}
}  // namespace flatten::cuda::tensorcore
