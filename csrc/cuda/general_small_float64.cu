#include "general_forward_launch.cuh"

template cudaError_t flatten::cuda::general::launch_small<double>(const ForwardCall&, cudaStream_t);
