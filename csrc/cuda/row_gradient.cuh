// The gradient through phi, on the tiles of focus.cuh.
//
// With w = y^p and phi = f w, f = |y| / |w| (general_backward.cuh has the same formulas), and r the gradient
// of phi times f:
//   T  = w . r over all channels of the token
//   dy = T / |y|^2 y + p y^(p - 1) (r - T / |w|^2 w)
// y and w may have been scaled down together before they were raised (Norms::prescale): then dy is the
// gradient by the scaled y, and dx = dy * prescale / scale where x > 0.
//
// r comes out of mma with its columns in the order of the tiles (fragment_channel), a block of eight at a
// time, and twice: once for T, once for dy, since products are cheaper than registers.
#pragma once

#include "focus.cuh"
#include "windows.cuh"

namespace flatten::cuda::tensorcore {

/// The warp's tile of a gradient or an input as fragments of A: word w of token g + 8r, slice s.
template <int kSlices>
using TileWords = uint32_t[kSlices][4][4];

/// Channel of column n of n-block b in tile order: lane t's two columns of the four blocks of a slice are its
/// eight channels 8t .. 8t + 7.
__device__ __forceinline__ int fragment_channel(int b, int n) {
  return b / 4 * kSliceChannels + n / 2 * 8 + b % 4 * 2 + n % 2;
}

/// Packs the lane's part of a matrix of (kSlices * 32)^2 to B fragments in shared memory, 32 vectors apart:
/// block b, then slice. element(k, n): of the matrix; kTileOrder: columns in tile order.
template <typename T, int kSlices, bool kTileOrder, typename Element>
__device__ __forceinline__ void pack_matrix(uint4* fragments, const Lane& lane, Element element) {
#pragma unroll 1
  for (int b = 0; b < kSlices * 4; ++b) {
    const int n = kTileOrder ? fragment_channel(b, lane.g) : b * 8 + lane.g;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      uint32_t word[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int k = s * kSliceChannels + 8 * lane.t + 2 * w;
        word[w] = Pair<T>::pack(element(k, n), element(k + 1, n));
      }
      fragments[(b * kSlices + s) * 32] = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
}

/// d = tile times n-block: d[i][0..1] of token g + 16i, d[i][2..3] of token g + 16i + 8.
template <typename T, int kSlices>
__device__ __forceinline__ void times(float (&d)[2][4], const TileWords<kSlices>& tile,
                                      const uint4* fragments) {
  const float zero[4] = {};
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    const uint4 f = fragments[s * 32];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t (&upper)[4] = tile[s][2 * i], (&lower)[4] = tile[s][2 * i + 1];
      const float (&sum)[4] = s ? static_cast<const float (&)[4]>(d[i]) : zero;
      mma<T>(d[i], upper[0], lower[0], upper[1], lower[1], f.x, f.y, sum);
      mma<T>(d[i], upper[2], lower[2], upper[3], lower[3], f.z, f.w, d[i]);
    }
  }
}

/// p y^(p - 1).
template <int kMode>
__device__ __forceinline__ float derivative(float y, const FocusParams& params) {
  if constexpr (kMode == 3) return 3.0f * y * y;
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

template <int kMode>
__device__ __forceinline__ float power_of(float y, const FocusParams& params) {
  if constexpr (kMode == 3) return raise<3>(y, 3.0f);
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
  float linear[4], power[4], prescale[4];  // T / |y|^2, T / |w|^2, Norms::prescale
  /// dot: T of the lane's own token.
  __device__ __forceinline__ RowTerms(float dot, const Norms& norms) {
    quad_gather(linear, norms.linear > 0.0f ? __fdividef(dot, norms.linear) : 0.0f);
    quad_gather(power, norms.power > 0.0f ? __fdividef(dot, norms.power) : 0.0f);
    quad_gather(prescale, norms.prescale);
  }
};

/// dx of a tile, from r(b, d): d = block b of r, in the layout of `times`. Adds to scale_sum[s][i] what
/// channel 8t + i of slice s contributes to the gradient of 1 / scale, times 1 / scale. store(s, r, vector).
template <typename T, int kSlices, int kMode, typename Bias, typename Product, typename Store>
__device__ __forceinline__ void gradient_rows(uint32_t tile, const Bias& bias, const float* inverse_scale,
                                              const FocusParams& params, const RowTerms& terms,
                                              float (&scale_sum)[kSlices][8], Product r, Store store) {
  unrolled<kSlices>([&](auto slice) {
    constexpr int s = slice;
    uint32_t x[4][4];  // the inputs, word by word replaced by their gradients
    unrolled<4>([&](auto row) { load_shared<Focus<T, kSlices, kMode>::offset(s, row)>(x[row], tile); });
    unrolled<4>([&](auto word) {
      constexpr int w = word;
      const float2 scale = *reinterpret_cast<const float2*>(inverse_scale + s * kSliceChannels + 2 * w);
      float d[2][4];
      r(Constant<s * 4 + w>{}, d);
#pragma unroll
      for (int row = 0; row < 4; ++row) {
        const float2 input = add_bias<T>(Pair<T>::unpack(x[row][w]), bias, s, row, 2 * w);
        const auto gradient = [&](float value, float a, float r_value, float& sum) {
          const float y = fmaf(fmaxf(value, 0.0f), a, params.eps * a) * terms.prescale[row];
          const float rest = r_value - terms.power[row] * power_of<kMode>(y, params);
          const float dy = fmaf(derivative<kMode>(y, params), rest, terms.linear[row] * y);
          sum = fmaf(dy, y, sum);
          return value > 0.0f ? dy * terms.prescale[row] * a : 0.0f;
        };
        const float* pair = &d[row / 2][row % 2 * 2];
        const float low = gradient(input.x, scale.x, pair[0], scale_sum[s][2 * w]);
        x[row][w] = Pair<T>::pack(low, gradient(input.y, scale.y, pair[1], scale_sum[s][2 * w + 1]));
      }
    });
#pragma unroll
    for (int row = 0; row < 4; ++row) store(s, row, make_uint4(x[row][0], x[row][1], x[row][2], x[row][3]));
  });
}

/// Sums the warps' scale_sum into this block's row of partial gradients of scale. `sums`: channels floats.
template <int kSlices>
__device__ __forceinline__ void store_scale(float* row, float* sums, const float* inverse_scale,
                                            float (&scale_sum)[kSlices][8], int warp_channel, int group,
                                            int groups, const Lane& lane) {
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& sum = scale_sum[s][i];
      sum += shuffle_xor<4>(sum);
      sum += shuffle_xor<8>(sum);
      sum += shuffle_xor<16>(sum);
    }
  }
  for (int turn = 0; turn < groups; ++turn) {  // in order
    __syncthreads();
    if (turn == group && lane.g == 0) {
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int c = warp_channel + s * kSliceChannels + 8 * lane.t + i;
          sums[c] = turn ? sums[c] + scale_sum[s][i] : scale_sum[s][i];
          if (turn == groups - 1) row[c] = -sums[c] * inverse_scale[c];
        }
      }
    }
  }
}

}  // namespace flatten::cuda::tensorcore
