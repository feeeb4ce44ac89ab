// phi_p of a tile as fragments, ready for the forward products.
//
// In bf16 the paper's p = 3 has a path of its own, mostly on tensor cores (focus.cuh computes in fp32 lanes):
//   y = a relu(x) + b        one mma for 16 tokens x 8 channels: A is the input twice, B two diagonals that
//                            hold a = 1 / scale as the sum of two bf16 numbers, and b = eps / scale is C
//   |y|^2, |y^3|^2           mma of the rounded squares against columns of ones, in fp32
// so that lanes only square, cube and round. Rounding the terms of the norms costs little: their errors are
// independent, and a norm's own error only weighs one token of S against others, or scales eps. Measured
// without taps, where nothing hides it: 3.0e-3 from float64, and 2.8e-3 with norms in fp32.
#pragma once

#include "range.cuh"
#include "warp_tile.cuh"

namespace flatten::cuda::tensorcore {

/// A tile's rows as fragments: [s][r][w], channels 8t + 2w and 8t + 2w + 1 of slice s, token g + 8r.
template <int kSlices>
using Words = uint32_t[kSlices][4][4];

/// `scale` as phi uses it, in shared memory: a = 1 / scale, b = eps / scale, and the diagonals that hold a. A
/// lane (g, t) with g / 2 == t has numbers on them: half g % 2 of its word w belongs to channel 8t + 2w + g %
/// 2; its first vector holds a rounded to bf16, its second what rounding left. All other lanes read zeros.
struct ScaleTable {
  static constexpr int kZeros = 128;
  static constexpr __host__ __device__ int bytes(int channels) { return channels * 16 + kZeros; }

  unsigned char* data;
  int channels;
  __device__ __forceinline__ float* inverse() const { return reinterpret_cast<float*>(data); }
  __device__ __forceinline__ float* offset() const { return inverse() + channels; }
  __device__ __forceinline__ unsigned char* diagonal() const { return data + channels * 8; }

  template <typename T>
  __device__ __forceinline__ void load(const FocusParams& params) const {
    for (int c = threadIdx.x; c < channels; c += blockDim.x) {
      const float a = params.scale.data ? 1.0f / element<T>(params.scale, c) : 1.0f;
      inverse()[c] = a;
      offset()[c] = params.eps * a;
      const float upper = Pair<T>::unpack(Pair<T>::pack(a, 0.0f)).x;
      auto* word = reinterpret_cast<uint32_t*>(diagonal() + c / 8 * 64 + c % 2 * 32 + c % 8 / 2 * 4);
      word[0] = c % 2 ? Pair<T>::pack(0.0f, a) : Pair<T>::pack(a, 0.0f);
      word[4] = c % 2 ? Pair<T>::pack(0.0f, a - upper) : Pair<T>::pack(a - upper, 0.0f);
    }
    auto* zeros = reinterpret_cast<uint32_t*>(diagonal() + channels * 8);
    for (int i = threadIdx.x; i < kZeros / 4; i += blockDim.x) zeros[i] = 0;
  }

  /// Shared address of the lane's diagonals for the channels from `channel` on, and the step to the next
  /// slice.
  __device__ __forceinline__ uint32_t lane_diagonal(int channel, const Lane& lane, int* step) const {
    const bool own = lane.g / 2 == lane.t;
    // Lanes without numbers read zeros from banks that the two lanes with numbers, in each quarter warp,
    // leave free.
    const int zeros = channels * 8 + (lane.g / 2 % 2 ? 0 : 64);
    *step = own ? kSliceChannels * 8 : 0;
    return shared_address(diagonal()) + (own ? channel * 8 + lane.t * 64 + lane.g % 2 * 32 : zeros);
  }
};

/// phi of a warp's tiles (warp_tile.cuh), one after the other. kMode is that of Focus. kPartners warps with
/// consecutive slices multiply each other's words, so in fp16 they all round at one scale.
template <typename T, int kSlices, int kMode, int kPartners = 1>
class FeatureMap {
 public:
  static constexpr int kBytes = kSlices * kTileBytes;  // of a warp's tile

  __device__ FeatureMap(const FocusParams& params, const ScaleTable& table, int channel, SliceGroup& group,
                        const Lane& lane)
      : focus_(params, table.inverse() + channel + 8 * lane.t, group, lane),
        offset_(shared_address(table.offset() + channel + 8 * lane.t)),
        diagonal_(table.lane_diagonal(channel, lane, &step_)),
        group_(group),
        lane_(lane) {
    keep(offset_), keep(diagonal_), keep(step_);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ones_[i] = lane.g / 4 * 2 + lane.g % 2 == i ? Pair<T>::pack(1.0f, 1.0f) : 0u;
      keep(ones_[i]);
    }
  }

  /// Makes Q without its norm factor: words = y^p, in fp16 times a factor that makes room for it. Writes eps
  /// in the same units to `denominator`, for all four rows. tile: shared address of the lane's first vector.
  __device__ __forceinline__ void queries(Words<kSlices>& words, float (&denominator)[4], float eps,
                                          uint32_t tile) const {
    float own_room = 1.0f;
    const auto pack = [&](const Powers& y) { own_room = pack_powers<T, kPartners>(words, y, group_, lane_); };
    Norms norms;
    bool safe = false;
    if constexpr (kByTensorCores) {
      norms = focus_.exchange(cube(tile, NoBias{}, [&](int s, int r, int w, float, float, uint32_t packed) {
        words[s][r][w] = packed;
      }));
      safe = Map::safe(norms);
    }
    if (!safe) norms = focus_.pack(tile, NoBias{}, pack);
    quad_gather(denominator, __fdividef(eps, phi_factor(norms)) * own_room);
  }

  /// Makes K: words = phi, in fp16 times the running scale, and 0 for tokens that are not there (`present` is
  /// for the lane's own token, g + 8t). Returns the factor by which earlier sums are to be multiplied.
  /// Bias: LaneBias or BiasTile.
  template <typename Bias>
  __device__ __forceinline__ float keys(Words<1>& words, const Bias& bias, bool present, RunningScale& scale,
                                        uint32_t tile) const {
    static_assert(kSlices == 1);
    Powers y;
    Norms norms;
    bool safe = false;
    if constexpr (kByTensorCores) {
      const auto take = [&](int s, int r, int w, float low, float high, uint32_t) {
        y[s][r][2 * w] = low, y[s][r][2 * w + 1] = high;
      };
      norms = focus_.exchange(bias.bias.data ? cube(tile, bias, take) : cube(tile, NoBias{}, take));
      safe = Map::safe(norms);
    }
    if (!safe) {
      norms = focus_.pack(tile, bias, [&](const Powers& powers) {
#pragma unroll
        for (int i = 0; i < 32; ++i) y[0][i / 8][i % 8] = powers[0][i / 8][i % 8];
      });
    }
    float factor[4], change = 1.0f;
    quad_gather(factor, present ? phi_factor(norms) : 0.0f);
    if constexpr (kNarrow<T>) {
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < 32; ++i) largest = fmaxf(largest, fabsf(y[0][i / 8][i % 8] * factor[i / 8]));
      change =
          scale.make_room(group_.template largest_of_partners<kPartners>(warp_max(largest), lane_.index));
#pragma unroll
      for (int r = 0; r < 4; ++r) factor[r] *= scale.value;
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[0][r][w] = Pair<T>::pack(y[0][r][2 * w] * factor[r], y[0][r][2 * w + 1] * factor[r]);
      }
    }
    return change;
  }

 private:
  static constexpr bool kByTensorCores = std::is_same_v<T, __nv_bfloat16> && kMode == 3;
  using Map = Focus<T, kSlices, kMode>;
  using Powers = typename Map::Powers;

  /// take(s, r, w, low, high, packed): y^3 of two channels. Returns |y|^2 and |y^3|^2 of the lane's own token
  /// over the warp's channels. With a positional encoding, which bf16 would round, y is computed in lanes.
  template <typename Bias, typename Take>
  __device__ __forceinline__ float2 cube(uint32_t tile, const Bias& bias, Take take) const {
    constexpr bool kBiased = !std::is_same_v<Bias, NoBias>;
    // Columns 4i .. 4i + 3 belong to the tokens g + 16i and g + 16i + 8: the even ones hold |y|^2, the odd
    // ones |y^3|^2.
    float sums[4] = {};
    unrolled<kSlices>([&](auto s) {
      uint32_t x[4][4];
      [[maybe_unused]] uint32_t upper[4], lower[4];
      [[maybe_unused]] float a[8];
      float b[8];
      unrolled<4>([&](auto r) { load_shared<Map::offset(s, r)>(x[r], tile); });
      if constexpr (kBiased) {
        load8(a, focus_.inverse_scale() + s * kSliceChannels);
      } else {
        load_shared<0>(upper, diagonal_ + s * step_);
        load_shared<16>(lower, diagonal_ + s * step_);
      }
      load_shared<s * kSliceChannels * 4>(b, offset_);
      load_shared<s * kSliceChannels * 4 + 16>(b + 4, offset_);
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // tokens g + 16i and g + 16i + 8
        uint32_t squares[4][2], sixths[4][2];
        [[maybe_unused]] float input[2][8];
        if constexpr (kBiased) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t (&row)[4] = x[2 * i + half];
            unpack8<T>(input[half], {row[0], row[1], row[2], row[3]});
            bias.template add<T>(input[half], s, 2 * i + half);
          }
        }
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          float y[4];
          if constexpr (kBiased) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int c = 2 * w + e % 2;
              y[e] = fmaf(relu(input[e / 2][c]), a[c], b[c]);
            }
          } else {
            const float start[4] = {b[2 * w], b[2 * w + 1], b[2 * w], b[2 * w + 1]};
            const uint32_t x0 = Pair<T>::relu(x[2 * i][w]), x1 = Pair<T>::relu(x[2 * i + 1][w]);
            mma<T>(y, x0, x1, x0, x1, upper[w], lower[w], start);
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float u = y[2 * half], v = y[2 * half + 1], uu = u * u, vv = v * v;
            const float uuu = uu * u, vvv = vv * v;
            squares[w][half] = Pair<T>::pack(uu, vv);
            const uint32_t packed = Pair<T>::pack(uuu, vvv);
            sixths[w][half] = Pair<T>::multiply(packed, packed);
            take(s, 2 * i + half, w, uuu, vvv, packed);
          }
        }
        const auto add = [&](const uint32_t (&a)[4][2], uint32_t ones) {
          mma<T>(sums, a[0][0], a[0][1], a[1][0], a[1][1], ones, ones, sums);
          mma<T>(sums, a[2][0], a[2][1], a[3][0], a[3][1], ones, ones, sums);
        };
        add(squares, ones_[2 * i]);
        add(sixths, ones_[2 * i + 1]);
      }
    });
    return lane_.t % 2 ? float2{sums[2], sums[3]} : float2{sums[0], sums[1]};
  }

  Map focus_;
  uint32_t offset_, diagonal_;
  int step_;
  SliceGroup& group_;
  uint32_t ones_[4];  // fragments of B: ones in the columns of |y|^2 and of |y^3|^2 of either 16 tokens
  const Lane& lane_;
};

}  // namespace flatten::cuda::tensorcore
