// fp16's narrow range. Before numbers are rounded to fp16 for a product, they are multiplied by the power of
// two that brings the largest of them near 2^13; the user of the product divides by it again. bf16 has the
// range of fp32: its factors are 1, and the compiler drops them.
#pragma once

#include "focus.cuh"

namespace flatten::cuda::tensorcore {

template <typename T>
constexpr bool kNarrow = std::is_same_v<T, __half>;

constexpr int kRoom = 13;

/// The power of two, at most 2^100, that brings the largest magnitude into 2^kRoom .. 2^(kRoom + 1).
__device__ __forceinline__ float fit(float largest) {
  const unsigned exponent = max(__float_as_uint(largest) >> 23, 127u + kRoom - 100u);
  return __uint_as_float((127 + kRoom + 127 - exponent) << 23);
}

/// The factor of S and m of one warp, whose lanes' largest magnitudes are `largest`: it brings the largest of
/// them into 2^12 .. 2^13, so that none overflows and as few as possible vanish.
template <typename T>
__device__ __forceinline__ float scale_for_rounding(float largest) {
  if constexpr (!kNarrow<T>) return 1.0f;
  const unsigned exponent = __reduce_max_sync(kAllLanes, __float_as_uint(largest)) >> 23;
  return __uint_as_float(min(127 + 12 + 127 - exponent, 254u) << 23);
}

/// The factor of numbers that are summed over tiles. It falls as larger numbers come.
struct RunningScale {
  float value = 0x1p100f;

  /// Lowers the factor where `largest`, the warp's largest magnitude, asks for it. Returns the number by
  /// which the sums so far are to be multiplied.
  __device__ __forceinline__ float make_room(float largest) {
    if (largest * value <= exp2f(kRoom + 1)) return 1.0f;
    const float next = fit(largest), change = next / value;
    value = next;
    return change;
  }
};

/// Rounds a warp's tiles of powers to words. In fp16 each row is first multiplied by a factor that makes room
/// for it, the same in all slices of a head. Returns the factor of the lane's own token.
template <typename T, int kPartners, int kSlices>
__device__ __forceinline__ float pack_powers(uint32_t (&words)[kSlices][4][4],
                                             const float (&y)[kSlices][4][8], SliceGroup& group,
                                             const Lane& lane) {
  float room[4] = {1.0f, 1.0f, 1.0f, 1.0f}, own = 1.0f;
  if constexpr (kNarrow<T>) {
    own = fit(group.largest_of_partners<kPartners>(largest_of_row(y, lane), lane.index));
    quad_gather(room, own);
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[s][r][w] = Pair<T>::pack(y[s][r][2 * w] * room[r], y[s][r][2 * w + 1] * room[r]);
      }
    }
  }
  return own;
}

}  // namespace flatten::cuda::tensorcore
