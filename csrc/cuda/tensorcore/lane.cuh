// What a lane is and holds: its place in a warp, and parameters as fp32.
#pragma once

#include "mma.cuh"
#include "params.h"

namespace flatten::cuda::tensorcore {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Lane {
  int index = threadIdx.x % 32;
  int g = index / 4;
  int t = index % 4;
  __device__ Lane() { keep(index), keep(g), keep(t); }
};

/// Element i of a parameter, as fp32.
template <typename T>
__device__ __forceinline__ float element(const Floats& floats, int64_t i) {
  return floats.half ? static_cast<float>(static_cast<const T*>(floats.data)[i])
                     : static_cast<const float*>(floats.data)[i];
}

__device__ __forceinline__ void load8(float (&x)[8], const float* from) {
  const float4 low = reinterpret_cast<const float4*>(from)[0],
               high = reinterpret_cast<const float4*>(from)[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

template <typename T>
__device__ __forceinline__ void unpack8(float (&y)[8], const uint4& raw) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float2 x = Pair<T>::unpack(words[w]);
    y[2 * w] = x.x;
    y[2 * w + 1] = x.y;
  }
}

/// Adds eight numbers from `at` on, which is a multiple of 8.
template <typename T>
__device__ __forceinline__ void add8(float (&x)[8], const Floats& from, int64_t at) {
  float addend[8];
  if (from.half) {
    unpack8<T>(addend, *reinterpret_cast<const uint4*>(static_cast<const T*>(from.data) + at));
  } else {
    load8(addend, static_cast<const float*>(from.data) + at);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] += addend[i];
}

}  // namespace flatten::cuda::tensorcore
