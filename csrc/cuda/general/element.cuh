// Element types: what a kernel reads and writes (T) and what it computes in (Acc<T>).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../../params.h"

namespace flatten::cuda::general {

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// Elements in a 16-byte load.
template <class T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(Acc<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

/// N adjacent elements from an address aligned for the widest loads that cover them.
template <int N, class T, class A>
__device__ __forceinline__ void load_pack(const T* from, A (&to)[N]) {
  constexpr int step = N < kVector<T> ? N : kVector<T>;
#pragma unroll
  for (int i = 0; i < N; i += step) {
    const auto pack = *reinterpret_cast<const Pack<T, step>*>(from + i);
#pragma unroll
    for (int j = 0; j < step; ++j) to[i + j] = widen(pack.at[j]);
  }
}

template <int N, class T>
__device__ __forceinline__ void store_pack(T* to, const Acc<T> (&from)[N]) {
  constexpr int step = N < kVector<T> ? N : kVector<T>;
#pragma unroll
  for (int i = 0; i < N; i += step) {
    Pack<T, step> pack;
#pragma unroll
    for (int j = 0; j < step; ++j) pack.at[j] = narrow<T>(from[i + j]);
    *reinterpret_cast<Pack<T, step>*>(to + i) = pack;
  }
}

/// Parameters come in float32 or in the call's own dtype.
template <class T>
__device__ __forceinline__ Acc<T> load_parameter(const Parameter& p, std::int64_t i) {
  if constexpr (sizeof(T) == 2) {
    if (p.dtype == Dtype::kFloat32) return static_cast<const float*>(p.data)[i];
  }
  return widen(static_cast<const T*>(p.data)[i]);
}

template <int N, class T>
__device__ __forceinline__ void load_parameter_pack(const Parameter& p, std::int64_t i, Acc<T> (&to)[N]) {
  if constexpr (sizeof(T) == 2) {
    if (p.dtype == Dtype::kFloat32) {
      load_pack<N>(static_cast<const float*>(p.data) + i, to);
      return;
    }
  }
  load_pack<N>(static_cast<const T*>(p.data) + i, to);
}

template <class T>
__device__ __forceinline__ void store_parameter(const MutableParameter& p, std::int64_t i, Acc<T> x) {
  if constexpr (sizeof(T) == 2) {
    if (p.dtype == Dtype::kFloat32) {
      static_cast<float*>(p.data)[i] = x;
      return;
    }
  }
  static_cast<T*>(p.data)[i] = narrow<T>(x);
}

}  // namespace flatten::cuda::general
