// A warp's tile of a token tensor in shared memory: 32 tokens of 32 channels, 64 bytes each.
//
// The four 16-byte vectors of a token change places from token to token, so that no access meets a bank
// twice: neither the copies (two adjacent lanes copy 32 adjacent bytes, a sector), nor lane (g, t) reading
// vector t of token g, nor ldmatrix reading one vector of eight tokens.
#pragma once

#include "mma.cuh"
#include "params.h"

namespace flatten::cuda::tensorcore {

constexpr int kTileBytes = kTileTokens * kSliceChannels * 2;

constexpr __host__ __device__ int tile_offset(int token, int vector) {
  return token * 64 + (vector ^ (token % 4 / 2 * 2 + token % 8 / 4)) * 16;
}

/// base + count * stride bytes.
__device__ __forceinline__ const char* advance(const char* base, int count, int stride) {
  const char* sum;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(sum) : "r"(count), "r"(stride), "l"(base));
  return sum;
}

/// A lane's part of a copy to a tile: the vectors lane % 2 and lane % 2 + 2 of tokens lane / 2 and lane / 2
/// + 16.
struct TileCopy {
  static constexpr int kTokens = 2, kStep = 16;
  static __device__ __forceinline__ int token() { return threadIdx.x % 32 / 2; }
  static __device__ __forceinline__ int byte() { return threadIdx.x % 2 * 16; }  // of a token's slice

  uint32_t near, far;  // shared addresses to which the two vectors of the lane's first token go
  __device__ __forceinline__ explicit TileCopy(uint32_t tile)
      : near(tile + tile_offset(token(), threadIdx.x % 2)) {
    far = near ^ 32;
    keep(near), keep(far);
  }

  /// from: the lane's first vector of each of its two tokens. The tiles of kSlices adjacent slices follow one
  /// another.
  template <int kSlices>
  __device__ __forceinline__ void operator()(const char* const (&from)[kTokens], int shift = 0) const {
    unrolled<kSlices>([&](auto s) {
      unrolled<kTokens>([&](auto i) {
        copy_async<s * kTileBytes + i * kTileBytes / 2, s * 64>(near + shift, from[i]);
        copy_async<s * kTileBytes + i * kTileBytes / 2, s * 64 + 32>(far + shift, from[i]);
      });
    });
  }
};

}  // namespace flatten::cuda::tensorcore
