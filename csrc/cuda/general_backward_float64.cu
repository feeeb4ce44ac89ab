#include "general_backward_launch.cuh"

template cudaError_t flatten::cuda::general::launch_backward<double>(const BackwardCall&, cudaStream_t);
