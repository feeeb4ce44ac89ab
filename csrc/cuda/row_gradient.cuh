// The gradient through phi, on the tiles of focus.cuh.
//
// With w = y^p and phi = f w, f = |y| / |w| (general_backward.cuh has the same formulas), and r the gradient
// of phi times f:
//   T  = w . r over all channels of the token
//   dy = T / |y|^2 y + p y^(p - 1) (r - T / |w|^2 w)
// y and w may have been scaled down together before they were raised (Norms::prescale): then dy is the
// gradient by the scaled y, and dx = dy * prescale / scale where x > 0.
//
// r comes out of mma with its columns in the order of the tiles, a block of eight at a time: lane t's two
// columns of the four blocks are its eight channels 8t .. 8t + 7.
#pragma once

#include "focus.cuh"
#include "windows.cuh"

namespace flatten::cuda::tensorcore {

/// p y^(p - 1).
__device__ __forceinline__ float derivative(float y, const FocusParams& params) {
  switch (params.mode) {
    case 1:
      return 1.0f;
    case 2:
      return 2.0f * y;
    case 3:
      return 3.0f * y * y;
    case 4:
      return 4.0f * y * y * y;
    default:
      return params.power * raise<kAnyPower>(y, params.power - 1.0f);
  }
}

__device__ __forceinline__ float power_of(float y, const FocusParams& params) {
  switch (params.mode) {
    case 1:
      return y;
    case 2:
      return raise<2>(y, 2.0f);
    case 3:
      return raise<3>(y, 3.0f);
    case 4:
      return raise<4>(y, 4.0f);
    default:
      return raise<kAnyPower>(y, params.power);
  }
}

/// What dy needs of a lane's four tokens.
struct RowTerms {
  float linear[4], power[4], gain[4], prescale[4];  // T / |y|^2, T / |w|^2 / gain, gain, Norms::prescale
  bool prescaled;                                   // any token of the warp
  /// r is still to be multiplied by the tokens' `gain`. Of the lane's own token: its gain, and T without it.
  /// A gain of 0 makes all of dy 0.
  __device__ __forceinline__ RowTerms(const float (&gains)[4], float own_gain, float dot,
                                      const Norms& norms) {
    const float by_linear = norms.linear > 0.0f ? __fdividef(dot, norms.linear) : 0.0f;
    quad_gather(linear, by_linear * own_gain);
    quad_gather(power, norms.power > 0.0f ? __fdividef(dot, norms.power) : 0.0f);
#pragma unroll
    for (int r = 0; r < 4; ++r) gain[r] = gains[r];
    prescaled = !__all_sync(kAllLanes, norms.prescale == 1.0f);
    own_prescale_ = norms.prescale;
  }
  __device__ __forceinline__ void load_prescale() { quad_gather(prescale, own_prescale_); }

 private:
  float own_prescale_;
};

/// All bits of the 16-bit halves that are above zero, none of those that are zero; below zero there are none.
__device__ __forceinline__ uint32_t above_zero(uint32_t x) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(mask) : "r"(x + 0x7fff7fffu));  // the upper bytes' signs
  return mask;
}

template <typename T, typename Product>
__device__ __forceinline__ void gradient_of_cubes(uint32_t (&x)[4][4], const float* inverse_scale, float eps,
                                                  const RowTerms& terms, float (&scale_sum)[8], Product r) {
  float gain[4];
#pragma unroll
  for (int row = 0; row < 4; ++row) gain[row] = 3.0f * terms.gain[row];
  unrolled<4>([&](auto word) {
    constexpr int w = word;
    const float2 a = *reinterpret_cast<const float2*>(inverse_scale + 2 * w);
    const float2 b = {eps * a.x, eps * a.y};
    float d[2][4];
    r(word, d);
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const uint32_t positive = Pair<T>::relu(x[row][w]);
      const float2 input = Pair<T>::unpack(positive);
      const auto gradient = [&](float y, float r_value, float& sum) {
        const float rest = fmaf(-terms.power[row], y * y * y, r_value);
        const float dy = y * fmaf(y * rest, gain[row], terms.linear[row]);
        sum = fmaf(dy, y, sum);
        return dy;
      };
      const float* pair = &d[row / 2][row % 2 * 2];
      const float low = gradient(fmaf(input.x, a.x, b.x), pair[0], scale_sum[2 * w]);
      const float high = gradient(fmaf(input.y, a.y, b.y), pair[1], scale_sum[2 * w + 1]);
      x[row][w] = Pair<T>::pack(low * a.x, high * a.y) & above_zero(positive);
    }
  });
}

template <typename T, typename Product>
__device__ __forceinline__ void gradient_of_powers(uint32_t (&x)[4][4], const LaneBias& bias,
                                                   const float* inverse_scale, const FocusParams& params,
                                                   const RowTerms& terms, float (&scale_sum)[8], Product r) {
  unrolled<4>([&](auto word) {
    constexpr int w = word;
    const float2 scale = *reinterpret_cast<const float2*>(inverse_scale + 2 * w);
    float d[2][4];
    r(word, d);
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const float2 input = add_bias<T>(Pair<T>::unpack(x[row][w]), bias, 0, row, 2 * w);
      const auto gradient = [&](float value, float a, float r_value, float& sum) {
        const float y = fmaf(fmaxf(value, 0.0f), a, params.eps * a) * terms.prescale[row];
        const float rest = terms.gain[row] * (r_value - terms.power[row] * power_of(y, params));
        const float dy = fmaf(derivative(y, params), rest, terms.linear[row] * y);
        sum = fmaf(dy, y, sum);
        return value > 0.0f ? dy * terms.prescale[row] * a : 0.0f;
      };
      const float* pair = &d[row / 2][row % 2 * 2];
      const float low = gradient(input.x, scale.x, pair[0], scale_sum[2 * w]);
      x[row][w] = Pair<T>::pack(low, gradient(input.y, scale.y, pair[1], scale_sum[2 * w + 1]));
    }
  });
}

/// dx of the inputs x, in their place. Adds to scale_sum[i] what channel 8t + i contributes to the gradient
/// of 1 / scale, times 1 / scale. r(b, d): d = block b of r over the gain, in the layout of `times`.
template <typename T, int kMode, typename Product>
__device__ __forceinline__ void gradient_rows(uint32_t (&x)[4][4], const LaneBias& bias,
                                              const float* inverse_scale, const FocusParams& params,
                                              RowTerms& terms, float (&scale_sum)[8], Product r) {
  if (kMode == 3 && !terms.prescaled && !bias.bias.data) {
    gradient_of_cubes<T>(x, inverse_scale, params.eps, terms, scale_sum, r);
  } else {
    terms.load_prescale();
    gradient_of_powers<T>(x, bias, inverse_scale, params, terms, scale_sum, r);
  }
}

/// Sums the warps' scale_sum into this block's row of partial gradients of scale. `sums`: channels floats.
__device__ __forceinline__ void store_scale(float* row, float* sums, const float* inverse_scale,
                                            float (&scale_sum)[8], int warp_channel, int group, int groups,
                                            const Lane& lane) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float& sum = scale_sum[i];
    sum += shuffle_xor<4>(sum);
    sum += shuffle_xor<8>(sum);
    sum += shuffle_xor<16>(sum);
  }
  for (int turn = 0; turn < groups; ++turn) {  // in order
    __syncthreads();
    if (turn == group && lane.g == 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int c = warp_channel + 8 * lane.t + i;
        sums[c] = turn ? sums[c] + scale_sum[i] : scale_sum[i];
        if (turn == groups - 1) row[c] = -sums[c] * inverse_scale[c];
      }
    }
  }
}

}  // namespace flatten::cuda::tensorcore
