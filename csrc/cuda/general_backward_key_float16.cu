#include "general_backward_key.cuh"

template cudaError_t flatten::cuda::general::launch_key_gradient<__half>(const BackwardCall&, cudaStream_t);
