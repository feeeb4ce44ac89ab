// What the backward kernels' blocks share: how warps divide the channels, and what lies where in memory.
//
// A warp owns 32 channels ("slice") of 32 tokens a step. A head of 64 or 128 channels belongs to as many
// partner warps, which read each other's tiles; two heads of 16 channels share a warp, whose 32 x 32 product
// drops what mixes them. The warps of all slices of the same tokens are a group (SliceGroup).
#pragma once

#include "focus.cuh"
#include "windows.cuh"

namespace flatten::cuda::tensorcore {

/// The warp's tile of a gradient or an input as fragments of A: word w of token g + 8r, slice s.
template <int kSlices>
using TileWords = uint32_t[kSlices][4][4];

/// d = tile times n-block: d[i][0..1] of token g + 16i, d[i][2..3] of token g + 16i + 8; plus `start`.
template <typename T, int kSlices>
__device__ __forceinline__ void times(float (&d)[2][4], const TileWords<kSlices>& tile,
                                      const uint4* fragments, const float (&start)[2][4]) {
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    const uint4 f = fragments[s * 32];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t (&upper)[4] = tile[s][2 * i], (&lower)[4] = tile[s][2 * i + 1];
      const float (&sum)[4] = s ? static_cast<const float (&)[4]>(d[i]) : start[i];
      mma<T>(d[i], upper[0], lower[0], upper[1], lower[1], f.x, f.y, sum);
      mma<T>(d[i], upper[2], lower[2], upper[3], lower[3], f.z, f.w, d[i]);
    }
  }
}

template <typename T, int kSlices>
__device__ __forceinline__ void times(float (&d)[2][4], const TileWords<kSlices>& tile,
                                      const uint4* fragments) {
  const float zero[2][4] = {};
  times<T, kSlices>(d, tile, fragments, zero);
}

__device__ __forceinline__ void store_tile(uint32_t address, const uint32_t (&words)[4][4]) {
  unrolled<4>([&](auto r) { store_shared<r * 512>(address, words[r]); });
}

/// Sizes, for the host too. kStages: tiles of an input that a warp has room for.
template <int kHeadDim, int kStages>
struct BackwardLayout {
  static_assert(kHeadDim == 16 || kHeadDim % kSliceChannels == 0, "a slice lies in one head, or holds two");
  static constexpr int kPartners = kHeadDim <= 32 ? 1 : kHeadDim / kSliceChannels;
  static constexpr int kHeads = kHeadDim == 16 ? 2 : 1;  // of a warp
  static constexpr int kTile = 4 * 512;
  // Of a warp: `kStages` tiles of two inputs, and one for partners to read w from.
  static constexpr int kSecond = kStages * kTile, kShared = 2 * kStages * kTile;
  static constexpr int kTileBytes = kShared + (kPartners > 1 ? kTile : 0);
  // B fragments of a slice, 512 bytes each: by n-block and partner a matrix, its transpose, a vector.
  static constexpr int kTransposed = 4 * kPartners, kVector = 8 * kPartners;
  static constexpr int kFragmentBytes = 9 * kPartners * 512;

  static constexpr __host__ __device__ int fixed_bytes(int channels, int groups) {
    const int slices = channels / kSliceChannels;
    return channels * 12 + SliceGroup::shared_bytes(groups, slices) + slices * kFragmentBytes;
  }
  static constexpr __host__ __device__ int tile_bytes(int channels, int groups) {
    return channels / kSliceChannels * groups * kTileBytes;
  }
};

/// A warp's view of its block.
template <int kHeadDim, int kStages>
struct BackwardBlock {
  using Layout = BackwardLayout<kHeadDim, kStages>;
  static constexpr int kPartners = Layout::kPartners;

  Lane lane;
  int channels, slices, groups, group, slice, partner;
  int position;  // of the lane's vector in a tile or fragment: so that an 8x8 block's rows lie in other banks
  float *inverse_scale, *mean, *scale_sums;  // (channels): 1 / scale, m or its gradient, sums for scale
  unsigned char *exchange, *fragments, *tiles, *rest;
  uint32_t tile;  // the lane's vector of the warp's first tile

  __device__ __forceinline__ BackwardBlock(unsigned char* shared, int channels, int groups)
      : channels(channels), slices(channels / kSliceChannels), groups(groups) {
    const int warp = threadIdx.x / 32;
    group = warp / slices, slice = warp - group * slices, partner = slice % kPartners;
    position = lane.g * 4 + (lane.t ^ lane.g / 2);
    inverse_scale = reinterpret_cast<float*>(shared);
    mean = inverse_scale + channels;
    scale_sums = mean + channels;
    exchange = shared + channels * 12;
    fragments = exchange + SliceGroup::shared_bytes(groups, slices);
    tiles = fragments + slices * Layout::kFragmentBytes;
    rest = tiles + Layout::tile_bytes(channels, groups);
    tile = shared_address(tiles) + warp * Layout::kTileBytes + position * 16;
    keep(position), keep(tile);
  }

  __device__ __forceinline__ int first_channel() const { return slice * kSliceChannels + 8 * lane.t; }
  /// The lane's vector of the slice's first fragment.
  __device__ __forceinline__ const uint4* slice_fragments() const {
    return reinterpret_cast<const uint4*>(fragments + slice * Layout::kFragmentBytes) + position;
  }
  /// For ldmatrix: row lane % 8 of the 8x8 block of tokens 8 r and on, channels 8 c and on, of a warp's tile.
  __device__ __forceinline__ uint32_t block_row(int r, int c) const {
    const int row = lane.index % 8;
    return tile - position * 16 + r * 512 + row * 64 + (c ^ row / 2) * 16;
  }

  /// What partner p has where this warp has `address`.
  __device__ __forceinline__ uint32_t of_partner(uint32_t address, int p) const {
    return address + (p - partner) * Layout::kTileBytes;
  }
  /// The tiles of all partners at `address`.
  __device__ __forceinline__ void load_tiles(TileWords<kPartners>& words, uint32_t address) const {
#pragma unroll
    for (int p = 0; p < kPartners; ++p) {
      unrolled<4>([&](auto r) { load_shared<r * 512>(words[p][r], of_partner(address, p)); });
    }
  }

  /// B fragments of `mean`: kSplit: of this head, each column twice (rounded, and what that cuts off) and the
  /// lane's own head in its columns; else of the slice, once.
  template <typename T, bool kSplit>
  __device__ __forceinline__ void pack_mean() const {
    uint4* to = reinterpret_cast<uint4*>(fragments + slice * Layout::kFragmentBytes) + Layout::kVector * 32 +
                position;
#pragma unroll
    for (int p = 0; p < (kSplit ? kPartners : 1); ++p) {
      const float* from = mean + (kSplit ? slice - partner + p : slice) * kSliceChannels + 8 * lane.t;
      const bool used = kSplit ? Layout::kHeads == 1 || lane.t / 2 == lane.g / 4 : lane.g < 2;
      uint32_t word[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 v = *reinterpret_cast<const float2*>(from + 2 * w);
        const uint32_t upper = Pair<T>::pack(v.x, v.y);
        const float2 cut = Pair<T>::unpack(upper);
        word[w] = used ? lane.g % 2 ? Pair<T>::pack(v.x - cut.x, v.y - cut.y) : upper : 0;
      }
      to[p * 32] = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
};

}  // namespace flatten::cuda::tensorcore
