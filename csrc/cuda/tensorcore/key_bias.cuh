// The positional encoding of keys, added to a warp's tile of K in fp32: read where it is used (LaneBias), or
// brought to shared memory beside K, ahead of time (BiasTile).
#pragma once

#include "lane.cuh"

namespace flatten::cuda::tensorcore {

/// The positional encoding of a tile's tokens, seen by one lane.
struct LaneBias {
  Floats bias;            // rows aligned to 16 bytes, or null
  int channels, channel;  // channels of a row; the lane's first channel
  int token, last;        // the lane's first token of the window; the window's last token
  int step = 8;           // from one of the lane's tokens to the next
  template <typename T>
  __device__ __forceinline__ void add(float (&x)[8], int slice, int r) const {
    if (!bias.data) return;
    const int64_t row = min(token + step * r, last);
    add8<T>(x, bias, row * channels + channel + slice * kSliceChannels);
  }
};
struct NoBias {};

/// The same, brought to a warp's own shared memory ahead of time. In fp32 a row's eight vectors change places
/// by the row, so that neither the copies nor the reads of a quarter warp meet a bank twice.
struct BiasTile {
  static constexpr int kBytes = 4 * 1024;  // of a warp

  Floats bias;
  uint32_t write, read;  // the lane's first vector as it is copied and as it is read

  __device__ __forceinline__ BiasTile(const Floats& bias, uint32_t shared, const Lane& lane) : bias(bias) {
    const int turn = lane.g % 2 * 5;
    write = shared + (bias.half ? lane.index * 16 : lane.g * 128 + (lane.t ^ turn) * 16);
    read = shared + (bias.half ? lane.index * 16 : lane.g * 128 + (2 * lane.t ^ turn) * 16);
    keep(write), keep(read);
  }

  /// Begins to copy the warp's channels, from `channel` on, of the tokens `token`, + 8, + 16 and + 24; the
  /// `last` one beyond it. token: the lane's first.
  __device__ __forceinline__ void load(int channels, int channel, int token, int last,
                                       const Lane& lane) const {
    if (!bias.data) return;
    unrolled<4>([&](auto r) {
      const int64_t at = static_cast<int64_t>(min(token + 8 * r, last)) * channels + channel;
      if (bias.half) {
        copy_async<r * 512, 0>(write, static_cast<const char*>(bias.data) + (at + 8 * lane.t) * 2);
      } else {
        const char* from = static_cast<const char*>(bias.data) + (at + 4 * lane.t) * 4;
        copy_async<r * 1024, 0>(write, from);
        copy_async<r * 1024, 64>(write ^ 64, from);
      }
    });
  }

  template <typename T>
  __device__ __forceinline__ void add(float (&x)[8], int, int r) const {
    float addend[8];
    if (bias.half) {
      uint32_t words[4];
      load_shared<0>(words, read + r * 512);
      unpack8<T>(addend, {words[0], words[1], words[2], words[3]});
    } else {
      float low[4], high[4];
      load_shared<0>(low, read + r * 1024);
      load_shared<0>(high, (read ^ 16) + r * 1024);
#pragma unroll
      for (int i = 0; i < 4; ++i) addend[i] = low[i], addend[4 + i] = high[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] += addend[i];
  }
};

/// The same for two channels 8t + i and 8t + i + 1 of token r; i is even.
template <typename T>
__device__ __forceinline__ float2 add_bias(float2 x, const LaneBias& bias, int slice, int r, int i) {
  if (!bias.bias.data) return x;
  const int64_t row = min(bias.token + bias.step * r, bias.last);
  const int64_t at = row * bias.channels + bias.channel + slice * kSliceChannels + i;
  const float2 addend =
      bias.bias.half
          ? Pair<T>::unpack(*reinterpret_cast<const uint32_t*>(static_cast<const T*>(bias.bias.data) + at))
          : *reinterpret_cast<const float2*>(static_cast<const float*>(bias.bias.data) + at);
  return {x.x + addend.x, x.y + addend.y};
}
template <typename T>
__device__ __forceinline__ float2 add_bias(float2 x, const NoBias&, int, int, int) {
  return x;
}

}  // namespace flatten::cuda::tensorcore
