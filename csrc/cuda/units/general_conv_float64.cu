// Made by make_units.py from units.txt.
#include "../general/launch.cuh"

namespace flatten::cuda::general {
template cudaError_t launch_conv<double>(const ConvCall&, cudaStream_t);
template cudaError_t launch_taps<double>(const TapsCall&, cudaStream_t);
template cudaError_t launch_parameters<double>(const ParameterCall&, cudaStream_t);
}  // namespace flatten::cuda::general
