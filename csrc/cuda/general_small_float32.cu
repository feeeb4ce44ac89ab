#include "general_forward_launch.cuh"

template cudaError_t flatten::cuda::general::launch_small<float>(const ForwardCall&, cudaStream_t);
