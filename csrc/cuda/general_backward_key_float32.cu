#include "general_backward_key.cuh"

template cudaError_t flatten::cuda::general::launch_key_gradient<float>(const BackwardCall&, cudaStream_t);
