// Made by make_units.py from units.txt.
#include "../general/launch.cuh"

namespace flatten::cuda::general {
template cudaError_t launch_conv<float>(const ConvCall&, cudaStream_t);
template cudaError_t launch_taps<float>(const TapsCall&, cudaStream_t);
template cudaError_t launch_parameters<float>(const ParameterCall&, cudaStream_t);
}  // namespace flatten::cuda::general
