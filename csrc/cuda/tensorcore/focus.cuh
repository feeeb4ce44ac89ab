// phi_p on tensor-core tiles: 32 tokens by 32 channels to a warp and step.
//
// Lane 4g + t holds tokens g, g + 8, g + 16, g + 24 and of each the channels 8t .. 8t + 7: one 16-byte load
// from global memory per token, 64 adjacent bytes per token over the quad. The registers of a load are
// fragment registers already, for a channel order that mma never notices: word w of lane t holds channels
// 8t + 2w and 8t + 2w + 1 of its eight.
//
// The norms run over all channels, that is over the warps of a group that hold the slices of the same 32
// tokens; they exchange partial sums through shared memory.
#pragma once

#include "../relu.cuh"
#include "key_bias.cuh"

namespace flatten::cuda::tensorcore {

/// `scale` of a lane's eight channels, as a and b in y = (relu(x) + eps) / scale = a relu(x) + b.
struct LaneScale {
  float a[8], b[8];
  __device__ __forceinline__ LaneScale(const float* inverse, float eps) {
    load8(a, inverse);
#pragma unroll
    for (int i = 0; i < 8; ++i) b[i] = eps * a[i];
  }
};

/// |y|^2 and |y^p|^2 of one token, whose y was multiplied by `prescale` before it was raised.
struct Norms {
  float linear, power, prescale = 1.0f;
};

__device__ __forceinline__ float square_root(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// The factor that makes y^p phi(y): |y| / |y^p|, and 0 for a row of zeros. NaN is handed on.
__device__ __forceinline__ float phi_factor(const Norms& n) {
  const float ratio = n.power != 0.0f ? square_root(__fdividef(n.linear, n.power)) : 0.0f;
  return n.prescale == 1.0f ? ratio : __fdividef(ratio, n.prescale);
}

__device__ __forceinline__ float log_2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float exp_2(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// For `raise`: y to the power 1, 2, 3 or 4, chosen by selections instead of branches.
constexpr int kWholePower = -3;

template <int kPower>
__device__ __forceinline__ float raise(float y, float p) {
  if constexpr (kPower == 3) return y * y * y;
  if constexpr (kPower == kAnyPower) return exp_2(p * log_2(y));
  static_assert(kPower == 3 || kPower == kAnyPower || kPower == kWholePower);
  const float yy = y * y, x = p == 1.0f || p == 3.0f ? y : yy;
  return p > 2.0f ? x * yy : x;
}

__device__ __forceinline__ float warp_max(float v) {  // v >= 0
  return __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(v)));
}

/// Sums each of a lane's four values over its quad; lane t of the quad returns the sum of value t.
__device__ __forceinline__ float quad_sum(const float (&v)[4], int t) {
  const bool upper = t & 2, odd = t & 1;
  float a = upper ? v[2] : v[0], b = upper ? v[3] : v[1];
  a += shuffle_xor<2>(upper ? v[0] : v[2]);
  b += shuffle_xor<2>(upper ? v[1] : v[3]);
  return (odd ? b : a) + shuffle_xor<1>(odd ? a : b);
}

/// The same with the largest of four magnitudes.
__device__ __forceinline__ float quad_max(const float (&v)[4], int t) {
  const bool upper = t & 2, odd = t & 1;
  const float a = fmaxf(upper ? v[2] : v[0], shuffle_xor<2>(upper ? v[0] : v[2]));
  const float b = fmaxf(upper ? v[3] : v[1], shuffle_xor<2>(upper ? v[1] : v[3]));
  return fmaxf(odd ? b : a, shuffle_xor<1>(odd ? a : b));
}

/// The largest magnitude of the lane's own token in a warp's tiles.
template <int kSlices>
__device__ __forceinline__ float largest_of_row(const float (&y)[kSlices][4][8], const Lane& lane) {
  float largest[4] = {};
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int i = 0; i < kSlices * 8; ++i) largest[r] = fmaxf(largest[r], fabsf(y[i / 8][r][i % 8]));
  }
  return quad_max(largest, lane.t);
}

/// Each lane t of a quad holds one number, that of token g + 8t. Gives all four to every lane: value r is
/// that of token g + 8r.
__device__ __forceinline__ void quad_gather(float (&v)[4], float own) {
  v[0] = quad_broadcast<0>(own);
  v[1] = quad_broadcast<1>(own);
  v[2] = quad_broadcast<2>(own);
  v[3] = quad_broadcast<3>(own);
}

/// The warps that hold the channel slices of the same 32 tokens.
class SliceGroup {
 public:
  /// Bytes of shared memory for `groups` groups of `slices` warps.
  static constexpr __host__ __device__ int shared_bytes(int groups, int slices) {
    return 2 * groups * slices * kSlotBytes + kPairBytes;  // the last for alignment
  }

  __device__ SliceGroup(void* shared, int group, int slice, int slices)
      : buffer_((shared_address(shared) + kPairBytes - 1) / kPairBytes * kPairBytes +
                group * slices * kPairBytes),
        group_(group),
        slice_(slice),
        slices_(slices) {}

  /// Adds the partial values that every lane brings for its token over the slices, in their order; all warps
  /// of the group get the same totals. What the group wrote to shared memory before is visible afterwards.
  /// kAtOnce: how many slices' values are loaded before the first is added; each takes registers.
  template <int kAtOnce = 4, typename Add>
  __device__ __forceinline__ float2 exchange(float2 partial, int lane, Add add) {
    return exchange<kAtOnce>(partial, lane, add, 0, slices_);
  }
  /// The same over the `count` slices from `first` on. All warps of the group have to call it.
  template <int kAtOnce, typename Add>
  __device__ __forceinline__ float2 exchange(float2 partial, int lane, Add add, int first, int count) {
    store_shared_pair<0>(slot(slice_, lane), partial);
    barrier();
    uint32_t from = slot(first, lane);
    buffer_ ^= kSlotBytes;  // the next exchange uses the other half, since this one may still be read then
    keep(buffer_), keep(count);  // or what is made of them takes registers all the time
    float2 total = load<0>(from);
    const uint32_t last = from + (count - 1) * kPairBytes;
    if constexpr (kAtOnce > 1) {
#pragma unroll 1
      for (; last - from >= kAtOnce * kPairBytes; from += kAtOnce * kPairBytes) {
        unrolled<kAtOnce>([&](auto i) { total = add(total, load<(i + 1) * kPairBytes>(from)); });
      }
    }
#pragma unroll 1
    while (from != last) total = add(total, load<0>(from += kPairBytes));
    return total;
  }

  /// The largest of the numbers that lanes of the same index bring in the kPartners slices of a head.
  template <int kPartners>
  __device__ __forceinline__ float largest_of_partners(float x, int lane) {
    if constexpr (kPartners == 1) return x;
    const auto larger = [](float2 a, float2 b) { return float2{fmaxf(a.x, b.x), 0.0f}; };
    return exchange<1>({x, 0.0f}, lane, larger, slice_ / kPartners * kPartners, kPartners).x;
  }

  __device__ void barrier() { named_barrier(group_ + 1, slices_ * 32); }

  /// The values that the warp of `slice` brought to the last exchange; valid until the next one.
  __device__ __forceinline__ float2 brought(int slice, int lane) const {
    return load<0>(slot(slice, lane) ^ kSlotBytes);
  }

 private:
  // The bytes that a warp brings to one exchange. Each warp has two such places, used in turns.
  static constexpr uint32_t kSlotBytes = 32 * sizeof(float2), kPairBytes = 2 * kSlotBytes;

  __device__ __forceinline__ uint32_t slot(int slice, int lane) const {
    return buffer_ + slice * kPairBytes + lane * sizeof(float2);
  }
  template <int kOffset>
  static __device__ __forceinline__ float2 load(uint32_t address) {
    float x[2];
    load_shared_pair<kOffset>(x, address);
    return {x[0], x[1]};
  }

  uint32_t buffer_;  // in shared memory
  int group_, slice_, slices_;
};

/// phi of a tile, as one warp sees it: powers y^p of its channels and, for the lane's own token g + 8t, the
/// norms that make them phi. kMode is a power or kRuntimeMode (FocusParams::mode); kSlices slices of 32
/// channels to a warp.
template <typename T, int kSlices, int kMode>
class Focus {
 public:
  using Powers = float[kSlices][4][8];  // [s][r]: the channels of slice s, token g + 8r

  /// Bytes of shared memory that a warp's tile of inputs takes. Every lane copies its own 16-byte vectors
  /// there ahead of time (copy_async) and reads the same ones (load_shared), both at offset(s, r): no lane
  /// waits for another's copies.
  static constexpr int kTileBytes = kSlices * 4 * 512;
  static constexpr __host__ __device__ int offset(int s, int r) { return (s * 4 + r) * 512; }

  /// inverse_scale: of the lane's first channel.
  __device__ Focus(const FocusParams& params, const float* inverse_scale, SliceGroup& group, const Lane& lane)
      : params_(params), inverse_scale_(inverse_scale), group_(group), lane_(lane) {}

  /// Hands the powers to `pack` and returns the norms. Where fp32 does not hold the tile's sums of squares,
  /// it does all of that again with each row divided by its largest y. tile: shared address of the lane's
  /// first vector.
  template <typename Bias, typename Pack>
  __device__ __forceinline__ Norms pack(uint32_t tile, const Bias& bias, Pack pack) const {
    const bool mapped = kMode != kRuntimeMode || params_.mode != kNoMapping;
    float prescale = 1.0f;
#pragma unroll 1
    for (bool again = false;; again = true) {
      Powers y;
      float2 partial;
      if (mapped) {
        load(y, tile, bias);
        map(y);
        if (again) prescale = divide_by_largest(y);
        partial = raise_by_mode(y);
      } else {
        load(y, tile);
      }
      pack(y);
      if (!mapped) {
        group_.barrier();
        return {1.0f, 1.0f};
      }
      const Norms norms = exchange(partial);
      if (again || safe(norms)) return {norms.linear, norms.power, prescale};
    }
  }

  __device__ __forceinline__ const float* inverse_scale() const { return inverse_scale_; }

  /// The sums of squares of the lane's own token, over all warps of the group.
  __device__ __forceinline__ Norms exchange(float2 partial) const {
    const auto plus = [](float2 a, float2 b) { return float2{a.x + b.x, a.y + b.y}; };
    const float2 sum = group_.exchange(partial, lane_.index, plus);
    return {sum.x, sum.y};
  }
  /// Whether fp32 held all the sums of squares of the tile; the warps of a group agree.
  static __device__ __forceinline__ bool safe(const Norms& n) {
    constexpr float kTiny = 1e-36f, kHuge = 1e37f;
    return __all_sync(kAllLanes, fminf(n.linear, n.power) > kTiny && fmaxf(n.linear, n.power) < kHuge);
  }

 private:
  __device__ __forceinline__ float2 raise_by_mode(Powers& y) const {
    if constexpr (kMode != kRuntimeMode) {
      return raise_all<kMode>(y);
    } else {  // a run-time power: one copy of the code per power would cost compile time
      if (params_.mode == kAnyPower) return raise_all<kAnyPower>(y);
      if (kSlices <= 2 && params_.mode == 3) return raise_all<3>(y);
      return raise_all<kWholePower>(y);
    }
  }

  /// unpack(y[s][r], vector) for all of the tile's vectors.
  template <typename Unpack>
  static __device__ __forceinline__ void for_each_vector(Powers& y, uint32_t tile, Unpack unpack) {
    unrolled<kSlices>([&](auto s) {
      if constexpr (kSlices > 2) __syncwarp();  // one after the other, in fewer registers
      unrolled<4>([&](auto r) {
        uint32_t x[4];
        load_shared<offset(s, r)>(x, tile);
        unpack(y[s][r], x);
      });
    });
  }

  static __device__ __forceinline__ void load(Powers& y, uint32_t tile) {
    for_each_vector(
        y, tile, [](float (&row)[8], const uint32_t (&x)[4]) { unpack8<T>(row, {x[0], x[1], x[2], x[3]}); });
  }
  /// y = relu(input + positional encoding), for the whole tile.
  template <typename Bias>
  static __device__ __forceinline__ void load(Powers& y, uint32_t tile, const Bias& bias) {
    if (!bias.bias.data) return load(y, tile, NoBias{});
    load(y, tile);
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        bias.template add<T>(y[s][r], s, r);
#pragma unroll
        for (int i = 0; i < 8; ++i) y[s][r][i] = relu(y[s][r][i]);
      }
    }
  }
  static __device__ __forceinline__ void load(Powers& y, uint32_t tile, const NoBias&) {
    for_each_vector(y, tile, [](float (&row)[8], const uint32_t (&x)[4]) {
      unpack8<T>(row, {Pair<T>::relu(x[0]), Pair<T>::relu(x[1]), Pair<T>::relu(x[2]), Pair<T>::relu(x[3])});
    });
  }

  /// Turns relu(x) into y = (relu(x) + eps) / scale.
  __device__ __forceinline__ void map(Powers& y) const {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      const LaneScale scale(inverse_scale_ + s * kSliceChannels, params_.eps);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int i = 0; i < 8; ++i) y[s][r][i] = fmaf(y[s][r][i], scale.a[i], scale.b[i]);
      }
    }
  }

  /// Turns y into y^p. Returns the sums of squares of the lane's own token over the warp's channels: those of
  /// y and those of y^p.
  template <int kPower>
  __device__ __forceinline__ float2 raise_all(Powers& y) const {
    float linear[4] = {}, power[4] = {};
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& x = y[s][r][i];
          linear[r] = i + s ? fmaf(x, x, linear[r]) : x * x;
          x = raise<kPower>(x, params_.power);
          power[r] = i + s ? fmaf(x, x, power[r]) : x * x;
        }
      }
    }
    return {quad_sum(linear, lane_.t), quad_sum(power, lane_.t)};
  }

  /// Divides each row by its largest y over all channels. Returns the factor by which the lane's own token
  /// was multiplied.
  __device__ __forceinline__ float divide_by_largest(Powers& y) const {
    const auto larger = [](float2 a, float2 b) { return float2{fmaxf(a.x, b.x), 0.0f}; };
    const float largest = group_.exchange<1>({largest_of_row(y, lane_), 0.0f}, lane_.index, larger).x;
    const float own = largest > 0.0f ? 1.0f / largest : 1.0f;
    float factor[4];
    quad_gather(factor, own);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int i = 0; i < kSlices * 8; ++i) y[i / 8][r][i % 8] *= factor[r];
    }
    return own;
  }

  const FocusParams& params_;
  const float* inverse_scale_;
  SliceGroup& group_;
  const Lane& lane_;
};

}  // namespace flatten::cuda::tensorcore
