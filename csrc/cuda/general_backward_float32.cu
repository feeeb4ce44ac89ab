#include "general_backward_launch.cuh"

template cudaError_t flatten::cuda::general::launch_backward<float>(const BackwardCall&, cudaStream_t);
