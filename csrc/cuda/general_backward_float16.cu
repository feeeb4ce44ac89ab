#include "general_backward_launch.cuh"

template cudaError_t flatten::cuda::general::launch_backward<__half>(const BackwardCall&, cudaStream_t);
