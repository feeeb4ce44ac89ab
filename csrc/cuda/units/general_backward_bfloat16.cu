// Made by make_units.py from units.txt.
#include "../general/launch.cuh"

namespace flatten::cuda::general {
template cudaError_t launch_backward<__nv_bfloat16>(const BackwardCall&, cudaStream_t);
}  // namespace flatten::cuda::general
