// max(x, 0) as torch has it, for the kernels of both rooms.
#pragma once

namespace flatten::cuda {

/// max(x, 0), and NaN where x is NaN.
__device__ __forceinline__ float relu(float x) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < 0 ? 0.0f : x;
#endif
}

}  // namespace flatten::cuda
