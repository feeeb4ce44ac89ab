#include "general_forward_launch.cuh"

template cudaError_t flatten::cuda::general::launch_small<__nv_bfloat16>(const ForwardCall&, cudaStream_t);
