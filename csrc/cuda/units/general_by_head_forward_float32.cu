// Made by make_units.py from units.txt.
#include "../general/launch.cuh"

namespace flatten::cuda::general {
template cudaError_t launch_head_state<float>(const HeadForward&, cudaStream_t);
template cudaError_t launch_head_output<float>(const HeadForward&, cudaStream_t);
}  // namespace flatten::cuda::general
