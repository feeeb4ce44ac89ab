// The norms of every row of q and k: eight lanes to a row.
#pragma once

#include "rows.cuh"

namespace flatten::cuda::tensorcore::heads {

constexpr int kRowLanes = 8;

__device__ __forceinline__ float sum_over_row(float x) {
  x += shuffle_xor<4>(x);
  x += shuffle_xor<2>(x);
  return x + shuffle_xor<1>(x);
}
__device__ __forceinline__ float largest_over_row(float x) {
  x = fmaxf(x, shuffle_xor<4>(x));
  x = fmaxf(x, shuffle_xor<2>(x));
  return fmaxf(x, shuffle_xor<1>(x));
}

/// The norms of the lane's row; all lanes of the warp call it. `inverse_scale`: of all channels, in shared
/// memory.
template <typename T>
__device__ __forceinline__ RowNorms measure(const Features& features, const char* row, int local,
                                            const float* inverse_scale) {
  const FocusParams& focus = features.focus;
  const int channels = features.heads * features.head_dim, lane = threadIdx.x % kRowLanes;
  const auto for_each_vector = [&](float prescale, auto use) {
#pragma unroll 3
    for (int c = lane * 8; c < channels; c += kRowLanes * 8) {
      float x[8], inverse[8];
      unpack8<T>(x, load16(row + c * 2));
      heads::add_bias<T>(x, features, local, c);
      load8(inverse, inverse_scale + c);
      scale8(x, focus, inverse, prescale);
      use(x);
    }
  };
  const auto largest = [&] {
    float most = 0.0f;
    for_each_vector(1.0f, [&](const float (&y)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(y[i]));
    });
    return largest_over_row(most);
  };
  if (focus.mode == kNoMapping) {
    // A power of two, so that nothing is rounded twice.
    const float prescale = kNarrow<T> ? fit(largest()) * 0x1p-13f : 1.0f;
    return {prescale, 1.0f / prescale, 0.0f, 0.0f};
  }
  float linear, power, prescale = 1.0f;
  for (bool again = kNarrow<T>;; again = true) {
    if (again) {
      const float most = largest();
      prescale = most > 0.0f ? 1.0f / most : 1.0f;
    }
    linear = power = 0.0f;
    for_each_vector(prescale, [&](float (&z)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) linear = fmaf(z[i], z[i], linear);
      raise8(z, focus);
#pragma unroll
      for (int i = 0; i < 8; ++i) power = fmaf(z[i], z[i], power);
    });
    linear = sum_over_row(linear), power = sum_over_row(power);
    // Between these no term that matters is lost: one of 2^-24 of the sum is a normal number of fp32.
    constexpr float kTiny = 1e-30f, kHuge = 1e30f;
    const bool held = fminf(linear, power) > kTiny && fmaxf(linear, power) < kHuge;
    if (again || __all_sync(kAllLanes, held)) break;
  }
  const float factor = power > 0.0f ? sqrtf(linear / power) / prescale : power;  // power: 0 or NaN
  return {prescale, factor, linear > 0.0f ? 1.0f / linear : 0.0f, power > 0.0f ? 1.0f / power : 0.0f};
}

template <typename T>
__global__ void __launch_bounds__(kMeasureThreads)
    measure_rows(const __grid_constant__ MeasureParams params) {
  extern __shared__ __align__(16) float inverse_scale[];
  const Features& first = params.sides[0];
  const int channels = first.heads * first.head_dim;
  for (int c = threadIdx.x; c < channels; c += blockDim.x) {
    const Floats& scale = first.focus.scale;
    inverse_scale[c] = scale.data ? 1.0f / element<T>(scale, c) : 1.0f;
  }
  __syncthreads();
  const int64_t all = params.rows[0] + params.rows[1];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (kMeasureThreads / kRowLanes) * kMeasureRows;
#pragma unroll 1
  for (int i = 0; i < kMeasureRows; ++i) {
    int64_t row = begin + i * (kMeasureThreads / kRowLanes) + threadIdx.x / kRowLanes;
    const bool inside = row < all;  // the others do the last row, but keep it to themselves
    row = min(row, all - 1);
    const int side = row < params.rows[0] ? 0 : 1;
    if (side) row -= params.rows[0];
    const Features& features = params.sides[side];
    const int index = static_cast<int>(row / features.rows.tokens);
    const int local = static_cast<int>(row - static_cast<int64_t>(index) * features.rows.tokens);
    const Window window(features.rows.grid, index);
    const Spot spot = row_spot(features.rows, window, local);
    const RowNorms norms =
        measure<T>(features, row_of(features.x, window.image, spot.token, 0), local, inverse_scale);
    if (inside && threadIdx.x % kRowLanes == 0) features.norms[row] = norms;
  }
}

}  // namespace flatten::cuda::tensorcore::heads
