// fp16's narrow range. Numbers that are rounded to fp16 for a product are first multiplied by what brings the
// largest of them near 2^13; whoever uses the product divides again. bf16 has fp32's range: its factors are
// 1, and the compiler drops them.
#pragma once

#include "focus.cuh"

namespace flatten::cuda::tensorcore {

template <typename T>
constexpr bool kNarrow = std::is_same_v<T, __half>;

constexpr int kRoom = 13;

/// The power of two that brings a largest magnitude to 2^kRoom .. 2^(kRoom + 1), 2^100 at most.
__device__ __forceinline__ float fit(float largest) {
  const unsigned exponent = max(__float_as_uint(largest) >> 23, 127u + kRoom - 100u);
  return __uint_as_float((127 + kRoom + 127 - exponent) << 23);
}

/// What numbers that are summed over tiles are multiplied by: it follows the largest seen.
struct RunningScale {
  float value = 0x1p100f;

  /// Makes room for a largest magnitude, the warp's; what was summed so far is to be multiplied by what this
  /// returns.
  __device__ __forceinline__ float make_room(float largest) {
    if (largest * value <= exp2f(kRoom + 1)) return 1.0f;
    const float next = fit(largest), change = next / value;
    value = next;
    return change;
  }
};

/// A warp's tiles of powers as words, in fp16 times what makes room for their rows, the same in all slices of
/// a head. Returns that of the lane's own token.
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
