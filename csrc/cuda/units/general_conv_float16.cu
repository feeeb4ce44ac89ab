// Made by make_units.py from units.txt.
#include "../general/launch.cuh"

namespace flatten::cuda::general {
template cudaError_t launch_conv<__half>(const ConvCall&, cudaStream_t);
template cudaError_t launch_taps<__half>(const TapsCall&, cudaStream_t);
template cudaError_t launch_parameters<__half>(const ParameterCall&, cudaStream_t);
}  // namespace flatten::cuda::general
