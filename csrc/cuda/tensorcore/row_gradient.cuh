// The gradient through phi, on the tiles of focus.cuh.
//
// With w = y^p and phi = f w, f = |y| / |w| (general/backward.cuh has the same formulas), and r the gradient
// of phi times f:
//   T  = w . r over all channels of the token
//   dy = T / |y|^2 y + p y^(p - 1) (r - T / |w|^2 w)
// y and w may have been scaled down together before they were raised (Norms::prescale): then dy is the
// gradient by the scaled y, and dx = dy * prescale / scale where x > 0.
//
// r comes out of mma with its columns in the order of the tiles, a block of eight at a time: lane t's two
// columns of the four blocks are its eight channels 8t .. 8t + 7.
#pragma once

#include "range.cuh"
#include "windows.cuh"

namespace flatten::cuda::tensorcore {

/// y^(p - 1) of a pair of channels.
__device__ __forceinline__ float2 raise_less_one(float2 y, const FocusParams& params) {
  const float p = params.power - 1.0f;
  if (params.mode == kAnyPower) return {raise<kAnyPower>(y.x, p), raise<kAnyPower>(y.y, p)};
  if (params.mode == 1) return {1.0f, 1.0f};
  return {raise<kWholePower>(y.x, p), raise<kWholePower>(y.y, p)};
}

/// The numbers that dy takes for each of a lane's four tokens.
struct RowTerms {
  float linear[4], power[4], gain[4], prescale[4];  // T / |y|^2, T / |w|^2 / gain, gain, Norms::prescale
  bool prescaled;                                   // any token of the warp
  /// Takes the gain of the lane's own token, by which r is still to be multiplied, and T without that gain. A
  /// gain of 0 makes all of dy 0.
  __device__ __forceinline__ RowTerms(const float (&gains)[4], float own_gain, float dot,
                                      const Norms& norms) {
    const float by_linear = norms.linear != 0.0f ? __fdividef(dot, norms.linear) : 0.0f;
    quad_gather(linear, by_linear * own_gain);
    quad_gather(power, norms.power != 0.0f ? __fdividef(dot, norms.power) : 0.0f);
#pragma unroll
    for (int r = 0; r < 4; ++r) gain[r] = gains[r];
    prescaled = !__all_sync(kAllLanes, norms.prescale == 1.0f);
    own_prescale_ = norms.prescale;
  }
  __device__ __forceinline__ void load_prescale() { quad_gather(prescale, own_prescale_); }

 private:
  float own_prescale_;
};

/// The part of a lane's tokens in the gradient of scale, for a pair of channels 8t + 2w and 8t + 2w + 1 at a
/// time.
struct RegisterSums {
  __device__ __forceinline__ explicit RegisterSums(const void*) {}
  template <int w>
  __device__ __forceinline__ float2 get() const {
    return pairs_[w];
  }
  template <int w>
  __device__ __forceinline__ void set(float2 x) {
    pairs_[w] = x;
  }

 private:
  float2 pairs_[4] = {};
};

/// The same sums in shared memory, for kernels that have no registers for them.
struct SharedSums {
  static constexpr __host__ __device__ int bytes(int channels) { return channels * 32; }

  __device__ __forceinline__ explicit SharedSums(const void* shared)
      : address_(shared_address(shared) + threadIdx.x / 32 * 1024 + threadIdx.x % 32 * 8) {
    keep(address_);
    unrolled<4>([&](auto w) { set<w>({0.0f, 0.0f}); });
  }
  template <int w>
  __device__ __forceinline__ float2 get() const {
    float x[2];
    load_shared_pair<w * 256>(x, address_);
    return {x[0], x[1]};
  }
  template <int w>
  __device__ __forceinline__ void set(float2 x) {
    store_shared_pair<w * 256>(address_, x);
  }

 private:
  uint32_t address_;
};

/// A mask with all bits set in each 16-bit half that is above zero and none in each half that is zero. No
/// half is below zero.
__device__ __forceinline__ uint32_t above_zero(uint32_t x) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(mask) : "r"(x + 0x7fff7fffu));  // the upper bytes' signs
  return mask;
}

/// Bias: LaneBias, or NoBias where no positional encoding was added to the inputs.
template <typename T, typename Bias, typename Sums, typename Product>
__device__ __forceinline__ void gradient_of_cubes(uint32_t (&x)[4][4], const Bias& bias,
                                                  const float* inverse_scale, float eps,
                                                  const RowTerms& terms, Sums& scale_sums, Product r) {
  constexpr bool kBiased = std::is_same_v<Bias, LaneBias>;
  float gain[4];
#pragma unroll
  for (int row = 0; row < 4; ++row) gain[row] = 3.0f * terms.gain[row];
  unrolled<4>([&](auto word) {
    constexpr int w = word;
    const float2 a = *reinterpret_cast<const float2*>(inverse_scale + 2 * w);
    const float2 b = {eps * a.x, eps * a.y};
    float d[2][4];
    r(word, d);
    float2 sums = scale_sums.template get<w>();
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      [[maybe_unused]] uint32_t positive = 0;
      float2 input;
      if constexpr (kBiased) {
        input = add_bias<T>(Pair<T>::unpack(x[row][w]), bias, 0, row, 2 * w);
      } else {
        positive = Pair<T>::relu(x[row][w]);
        input = Pair<T>::unpack(positive);
      }
      const auto gradient = [&](float y, float r_value, float& sum) {
        const float rest = fmaf(-terms.power[row], y * y * y, r_value);
        const float dy = y * fmaf(y * rest, gain[row], terms.linear[row]);
        sum = fmaf(dy, y, sum);
        return dy;
      };
      const float* pair = &d[row / 2][row % 2 * 2];
      const auto y = [&](float value, float a, float b) { return fmaf(kBiased ? relu(value) : value, a, b); };
      const float low = gradient(y(input.x, a.x, b.x), pair[0], sums.x) * a.x;
      const float high = gradient(y(input.y, a.y, b.y), pair[1], sums.y) * a.y;
      if constexpr (kBiased) {  // NaN is not below zero, and handed on
        x[row][w] = Pair<T>::pack(input.x <= 0.0f ? 0.0f : low, input.y <= 0.0f ? 0.0f : high);
      } else {
        x[row][w] = Pair<T>::pack(low, high) & above_zero(positive);
      }
    }
    scale_sums.template set<w>(sums);
  });
}

template <typename T, typename Sums, typename Product>
__device__ __forceinline__ void gradient_of_powers(uint32_t (&x)[4][4], const LaneBias& bias,
                                                   const float* inverse_scale, const FocusParams& params,
                                                   const RowTerms& terms, Sums& scale_sums, Product r) {
  unrolled<4>([&](auto word) {
    constexpr int w = word;
    const float2 scale = *reinterpret_cast<const float2*>(inverse_scale + 2 * w);
    float d[2][4];
    r(word, d);
    float2 sums = scale_sums.template get<w>();
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const float2 input = add_bias<T>(Pair<T>::unpack(x[row][w]), bias, 0, row, 2 * w);
      const auto mapped = [&](float value, float a) {
        return fmaf(relu(value), a, params.eps * a) * terms.prescale[row];
      };
      const float2 y = {mapped(input.x, scale.x), mapped(input.y, scale.y)};
      const float2 raised = raise_less_one(y, params);
      const auto gradient = [&](float value, float a, float y, float raised, float r_value, float& sum) {
        const float rest = terms.gain[row] * fmaf(-terms.power[row], y * raised, r_value);
        const float dy = fmaf(params.power * raised, rest, terms.linear[row] * y);
        sum = fmaf(dy, y, sum);
        return value <= 0.0f ? 0.0f : dy * terms.prescale[row] * a;  // NaN is neither, and handed on
      };
      const float* pair = &d[row / 2][row % 2 * 2];
      const float low = gradient(input.x, scale.x, y.x, raised.x, pair[0], sums.x);
      x[row][w] = Pair<T>::pack(low, gradient(input.y, scale.y, y.y, raised.y, pair[1], sums.y));
    }
    scale_sums.template set<w>(sums);
  });
}

/// Replaces the inputs x by their gradients dx. Adds to scale_sums what the lane's channels contribute to the
/// gradient of 1 / scale, times 1 / scale. r(b, d) sets d to block b of r over the gain, in the layout of
/// `times`. kCubes: p = 3 has code of its own, where there are registers for both.
template <typename T, bool kCubes, typename Sums, typename Product>
__device__ __forceinline__ void gradient_rows(uint32_t (&x)[4][4], const LaneBias& bias,
                                              const float* inverse_scale, const FocusParams& params,
                                              RowTerms& terms, Sums& scale_sums, Product r) {
  if (kCubes && params.mode == 3 && !terms.prescaled) {
    if (bias.bias.data) {
      gradient_of_cubes<T>(x, bias, inverse_scale, params.eps, terms, scale_sums, r);
    } else {
      gradient_of_cubes<T>(x, NoBias{}, inverse_scale, params.eps, terms, scale_sums, r);
    }
  } else {
    terms.load_prescale();
    gradient_of_powers<T>(x, bias, inverse_scale, params, terms, scale_sums, r);
  }
}

/// The block's copy of 1 / scale.
template <typename T, typename Block>
__device__ __forceinline__ void load_inverse_scale(const Block& block, const FocusParams& params) {
  for (int c = threadIdx.x; c < block.channels; c += blockDim.x) {
    block.inverse_scale(c / kSliceChannels)[c % kSliceChannels] =
        params.scale.data ? 1.0f / element<T>(params.scale, c) : 1.0f;
  }
}

/// Sums the lanes' scale_sums into this block's row of partial gradients of scale.
template <typename Block, typename Sums>
__device__ __forceinline__ void store_scale(float* row, const Block& block, const Sums& scale_sums, int slice,
                                            int group, int groups, const Lane& lane) {
  float sum[8];
  unrolled<4>([&](auto w) {
    const float2 pair = scale_sums.template get<w>();
    sum[2 * w] = pair.x, sum[2 * w + 1] = pair.y;
  });
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    sum[i] += shuffle_xor<4>(sum[i]);
    sum[i] += shuffle_xor<8>(sum[i]);
    sum[i] += shuffle_xor<16>(sum[i]);
  }
  float* sums = block.scale_sums(slice) + 8 * lane.t;
  const float* inverse_scale = block.inverse_scale(slice) + 8 * lane.t;
  for (int turn = 0; turn < groups; ++turn) {  // one group after the other, in order
    __syncthreads();
    if (turn == group && lane.g == 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sums[i] = turn ? sums[i] + sum[i] : sum[i];
        if (turn == groups - 1) row[slice * kSliceChannels + 8 * lane.t + i] = -sums[i] * inverse_scale[i];
      }
    }
  }
}

}  // namespace flatten::cuda::tensorcore
