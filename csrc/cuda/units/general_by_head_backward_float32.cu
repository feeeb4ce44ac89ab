// Made by make_units.py from units.txt.
#include "../general/launch.cuh"

namespace flatten::cuda::general {
template cudaError_t launch_head_backward<float>(const HeadBackward&, cudaStream_t);
}  // namespace flatten::cuda::general
