// Made by make_units.py from units.txt.
#include "../general/launch.cuh"

namespace flatten::cuda::general {
template cudaError_t launch_conv<__nv_bfloat16>(const ConvCall&, cudaStream_t);
template cudaError_t launch_taps<__nv_bfloat16>(const TapsCall&, cudaStream_t);
template cudaError_t launch_parameters<__nv_bfloat16>(const ParameterCall&, cudaStream_t);
}  // namespace flatten::cuda::general
