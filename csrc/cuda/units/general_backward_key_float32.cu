// Made by make_units.py from units.txt.
#include "../general/launch.cuh"

namespace flatten::cuda::general {
extern template cudaError_t launch_key_taps<float, 7>(const BackwardCall&, cudaStream_t);
extern template cudaError_t launch_key_taps<float, kAnyTaps>(const BackwardCall&, cudaStream_t);
template cudaError_t launch_key_gradient<float>(const BackwardCall&, cudaStream_t);
}  // namespace flatten::cuda::general
