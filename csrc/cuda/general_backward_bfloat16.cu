#include "general_backward_launch.cuh"

template cudaError_t flatten::cuda::general::launch_backward<__nv_bfloat16>(const BackwardCall&,
                                                                            cudaStream_t);
