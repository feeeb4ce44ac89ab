// The ordered reduction between forward_state and forward_output; and, as the smallest of the tensor-core
// kernels, the one by which it is found out whether they can run.
#include "../choose.h"
#include "../launch_error.h"
#include "params.h"

namespace flatten::cuda::tensorcore {
namespace {

__global__ void reduce_state_kernel(const float* partial, float* state, int chunks, int64_t size) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (i >= size) return;
  const float* from = partial + blockIdx.y * chunks * size + i;
  float4 sum = *reinterpret_cast<const float4*>(from);
  for (int c = 1; c < chunks; ++c) {
    const float4 next = *reinterpret_cast<const float4*>(from + c * size);
    sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
  }
  *reinterpret_cast<float4*>(state + blockIdx.y * size + i) = sum;
}

}  // namespace

cudaError_t find_image(bool* found) {
  // Changes nothing, since the kernel has no dynamic shared memory, but needs the kernel to be loaded. All
  // tensor-core kernels are compiled for the same architectures.
  const cudaError_t error =
      cudaFuncSetAttribute(reduce_state_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 0);
  *found = error == cudaSuccess;
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
      cudaGetLastError();  // not to be found by the next one who asks
      return cudaSuccess;
    default:
      return error;
  }
}

cudaError_t reduce_state(const float* partial, float* state, int windows, int chunks, int64_t size,
                         cudaStream_t stream) {
  constexpr int kThreads = 256;
  const dim3 grid(static_cast<unsigned>((size / 4 + kThreads - 1) / kThreads), windows);
  reduce_state_kernel<<<grid, kThreads, 0, stream>>>(partial, state, chunks, size);
  return noted(cudaGetLastError(), __PRETTY_FUNCTION__);
}

}  // namespace flatten::cuda::tensorcore
