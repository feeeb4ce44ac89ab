// The gradient of the depthwise taps on tensor cores: as tap_product.cuh, with pixels as the long axis.
//
// dW of a tap and channel is the sum over pixels of v times grad_out, shifted against the tap. An mma
// m16n8k16 takes two taps: A is their two shifted views of 16 pixels by eight channels of grad_out,
// transposed, B the pixels of v by the same eight channels, and of the two 8x8 blocks of the product the
// diagonals are wanted. They are added up step by step; the lanes that hold a diagonal differ between the
// four n-blocks of a slice, whose channels are rotated in B, so that every lane sums the taps of one channel.
#pragma once

#include "tap_product.cuh"

namespace flatten::cuda::tensorcore {

template <typename T, int kTaps>
struct TapGradient {
  static constexpr int kSums =
      kTaps * kTaps + 1;  // one for each shift of grad_out against v, then that of the bias
  float sum[kSums] = {};

  // The order of the taps, two by two, in which the rows of grad_out are used as they come: two rows of taps
  // at a time, first each row's taps by twos, then the last tap of both rows. The very last tap is alone.
  static constexpr int kRows = kTaps + 3, kPairs = (kTaps * kTaps + 1) / 2;
  static_assert(kPairs % 4 == 1);
  struct Taps {
    int first, second;
  };
  static constexpr __host__ __device__ Taps pair(int i) {
    const int dy = i / kTaps * 2, at = i % kTaps, half = kTaps / 2;
    const int first = at < half        ? dy * kTaps + 2 * at
                      : at < kTaps - 1 ? (dy + 1) * kTaps + 2 * (at - half)
                                       : dy * kTaps + kTaps - 1;
    return {first, at < kTaps - 1 ? first + 1 : first + kTaps};
  }
  /// How many rows of grad_out the pairs up to this one use.
  static constexpr __host__ __device__ int rows_of(int i) { return pair(i).second / kTaps + 4; }

  /// The channel of the slice whose sums the lane holds.
  static __device__ __forceinline__ int channel(const Lane& lane) {
    return (lane.g / 2 - lane.t & 3) * 8 + lane.g;
  }

  /// Adds the products of 8 x 4 pixels for the eight channels of n-block `block`. pixels: address of grad_out
  /// at these channels. v: the transposed 8x8 block of each row.
  __device__ __forceinline__ void add(const PixelRows<kTaps>& pixels, uint32_t (&v)[4], int block,
                                      const Lane& lane) {
#pragma unroll
    for (int r = 0; r < 4; ++r) v[r] = __shfl_sync(kAllLanes, v[r], lane.index + 8 * block);
    const bool active = channel(lane) / 8 == block;
    const bool even = active && lane.g % 2 == 0, odd = active && lane.g % 2 != 0;
    uint32_t x[kRows][(kTaps + 3) / 4 * 4];  // fragments of grad_out, by row and shift
    const auto load_rows = [&](auto begin, auto end) {
      unrolled<end - begin>([&](auto i) {
        constexpr int j = begin + i;
        load_matrix_x4_transposed<0>(reinterpret_cast<uint32_t (&)[4]>(x[j][0]), pixels.row[j]);
        if constexpr (kTaps == 7) {
          load_matrix_x4_transposed<0>(reinterpret_cast<uint32_t (&)[4]>(x[j][4]),
                                       pixels.row[j] + pixels.rest);
        }
        if constexpr (kTaps == 5 && j % 4 == 0) {
          uint32_t four[4];
          load_matrix_x4_transposed<0>(four, pixels.fifth[j / 4]);
#pragma unroll
          for (int k = 0; k < 4; ++k) x[j + k][4] = four[k];
        }
      });
    };
    const float zero[4] = {};
    const auto product = [&](auto first, auto second, float (&d)[4]) {  // the product of two taps
      constexpr int dy0 = first / kTaps, dx0 = first % kTaps, dy1 = second / kTaps, dx1 = second % kTaps;
      mma<T>(d, x[dy0][dx0], x[dy1][dx1], x[dy0 + 1][dx0], x[dy1 + 1][dx1], v[0], v[1], zero);
      mma<T>(d, x[dy0 + 2][dx0], x[dy1 + 2][dx1], x[dy0 + 3][dx0], x[dy1 + 3][dx1], v[2], v[3], d);
    };
    constexpr int kCentre = kTaps / 2;
    const uint32_t one = Pair<T>::pack(1.0f, 1.0f);
    float last[4], bias[4];
    unrolled<kPairs / 4>([&](auto group) {
      constexpr int kFirst = 4 * group;
      constexpr int kLoaded = group ? rows_of(kFirst - 1) : 0, kNeeded = rows_of(kFirst + 3);
      load_rows(Constant<kLoaded>{}, Constant<kNeeded>{});
      if constexpr (kLoaded < kCentre + 4 && kNeeded >= kCentre + 4) {
        mma<T>(bias, x[kCentre][kCentre], 0u, x[kCentre + 1][kCentre], 0u, one, one, zero);
        mma<T>(bias, x[kCentre + 2][kCentre], 0u, x[kCentre + 3][kCentre], 0u, one, one, bias);
      }
      float d[4][4];
      unrolled<4>([&](auto i) {
        product(Constant<pair(kFirst + i).first>{}, Constant<pair(kFirst + i).second>{}, d[i]);
      });
      const auto to = [&](auto i) -> float& {
        constexpr Taps kTwo = pair(kFirst + i / 2);
        return sum[i % 2 ? kTwo.second : kTwo.first];
      };
      add_diagonals(to(Constant<0>{}), to(Constant<1>{}), to(Constant<2>{}), to(Constant<3>{}),
                    to(Constant<4>{}), to(Constant<5>{}), to(Constant<6>{}), to(Constant<7>{}), d, even, odd);
    });
    load_rows(Constant<rows_of(kPairs - 2)>{}, Constant<kRows>{});
    product(Constant<kSums - 2>{}, Constant<kSums - 2>{}, last);
    add_last(sum[kSums - 2], last[0], last[1], sum[kSums - 1], bias[0], even, odd);
  }

  /// The same for the four n-blocks of a slice. value_row: BackwardBlock::block_row of row lane / 8 of v,
  /// n-block 0. Leaves `pixels` 64 bytes further on.
  __device__ __forceinline__ void add_slice(PixelRows<kTaps>& pixels, uint32_t value_row, const Lane& lane) {
#pragma unroll 1
    for (int block = 0; block < 4; ++block) {
      uint32_t v[4];
      load_matrix_x4_transposed<0>(v, value_row ^ (block * 16));
      add(pixels, v, block, lane);
      pixels.advance(16);
    }
  }

  /// The floats of shared memory that `store` takes.
  static constexpr __host__ __device__ int floats(int warps) { return kTaps ? warps * kSums * 32 : 0; }

  /// Stores the block's row of partial gradients (tap, kernel), the bias last. A kernel is a channel, or one
  /// of the `kernels` that repeat every head. Warps and channels are added in order. All threads call it; it
  /// synchronises first.
  __device__ __forceinline__ void store(float* row, float* shared, int slices, int groups, int kernels,
                                        const Lane& lane) const {
    __syncthreads();
    const int channels = slices * kSliceChannels, warp = threadIdx.x / 32;
    float* own = shared + warp / slices * kSums * channels + warp % slices * kSliceChannels + channel(lane);
#pragma unroll
    for (int i = 0; i < kSums; ++i, own += channels) *own = sum[i < kSums - 1 ? kSums - 2 - i : i];
    __syncthreads();
    const int repeats = channels / kernels;
    for (int i = threadIdx.x; i < kSums * kernels; i += blockDim.x) {
      const int tap = i / kernels, kernel = i - tap * kernels;
      float total = 0.0f;
      for (int group = 0; group < groups; ++group) {
        const float* from = shared + (group * kSums + tap) * channels + kernel;
#pragma unroll 4
        for (int n = repeats; n > 0; --n, from += kernels) total += *from;
      }
      row[i] = total;
    }
  }

 private:
  /// Adds d[i][0] and d[i][2] where `even`, d[i][1] and d[i][3] where `odd`, to two sums of each i. The
  /// additions are predicated, in one piece of assembly that shares one pair of predicates.
  static __device__ __forceinline__ void add_diagonals(float& s0, float& s1, float& s2, float& s3, float& s4,
                                                       float& s5, float& s6, float& s7,
                                                       const float (&d)[4][4], bool even, bool odd) {
    asm("{ .reg .pred p, q; setp.ne.b32 p, %24, 0; setp.ne.b32 q, %25, 0;\n"
        "@p add.f32 %0, %0, %8; @q add.f32 %0, %0, %9; @p add.f32 %1, %1, %10; @q add.f32 %1, %1, %11;\n"
        "@p add.f32 %2, %2, %12; @q add.f32 %2, %2, %13; @p add.f32 %3, %3, %14; @q add.f32 %3, %3, %15;\n"
        "@p add.f32 %4, %4, %16; @q add.f32 %4, %4, %17; @p add.f32 %5, %5, %18; @q add.f32 %5, %5, %19;\n"
        "@p add.f32 %6, %6, %20; @q add.f32 %6, %6, %21; @p add.f32 %7, %7, %22; @q add.f32 %7, %7, %23; }"
        : "+f"(s0), "+f"(s1), "+f"(s2), "+f"(s3), "+f"(s4), "+f"(s5), "+f"(s6), "+f"(s7)
        : "f"(d[0][0]), "f"(d[0][1]), "f"(d[0][2]), "f"(d[0][3]), "f"(d[1][0]), "f"(d[1][1]), "f"(d[1][2]),
          "f"(d[1][3]), "f"(d[2][0]), "f"(d[2][1]), "f"(d[2][2]), "f"(d[2][3]), "f"(d[3][0]), "f"(d[3][1]),
          "f"(d[3][2]), "f"(d[3][3]), "r"(static_cast<int>(even)), "r"(static_cast<int>(odd)));
  }

  static __device__ __forceinline__ void add_last(float& tap, float d0, float d1, float& bias, float d,
                                                  bool even, bool odd) {
    asm("{ .reg .pred p, q; setp.ne.b32 p, %5, 0; setp.ne.b32 q, %6, 0;\n"
        "@p add.f32 %0, %0, %2; @q add.f32 %0, %0, %3; @p add.f32 %1, %1, %4; @q add.f32 %1, %1, %4; }"
        : "+f"(tap), "+f"(bias)
        : "f"(d0), "f"(d1), "f"(d), "r"(static_cast<int>(even)), "r"(static_cast<int>(odd)));
  }
};

template <typename T>
struct TapGradient<T, 0> {
  static constexpr __host__ __device__ int floats(int) { return 0; }
};

}  // namespace flatten::cuda::tensorcore
