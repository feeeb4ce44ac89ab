// What the backward kernels' blocks share: how warps divide the channels, and what lies where in memory.
//
// A warp owns 32 channels ("slice") of 32 tokens a step. A head of 64 or 128 channels belongs to as many
// partner warps, which read each other's tiles; two heads of 16 channels share a warp, whose 32 x 32 product
// drops what mixes them. The warps of all slices of the same tokens are a group (SliceGroup).
#pragma once

#include "range.cuh"
#include "windows.cuh"

namespace flatten::cuda::tensorcore {

/// The tiles of kSlices slices as fragments of A, [slice][r][w]. Word w of token g + 8r holds either the
/// channels 8t + 2w and 8t + 2w + 1 (tile order: the lane's own vector) or the channels 8w + 2t and 8w + 2t +
/// 1 (their own order). Called as a function (s, r, words), which is what `times` takes.
template <int kSlices>
struct TileWords {
  uint32_t words[kSlices][4][4];

  template <typename S, typename R>
  __device__ __forceinline__ void operator()(S s, R r, uint32_t (&x)[4]) const {
#pragma unroll
    for (int w = 0; w < 4; ++w) x[w] = words[s][r][w];
  }
};

/// The tiles that load(s, r, words) brings. They are loaded at once, but for a head of 128, whose tiles do
/// not fit in registers, each time they are used.
template <int kSlices, typename Load>
__device__ __forceinline__ auto hold(Load load) {
  if constexpr (kSlices <= 2) {
    TileWords<kSlices> tiles;
    unrolled<kSlices>([&](auto s) { unrolled<4>([&](auto r) { load(s, r, tiles.words[s][r]); }); });
    return tiles;
  } else {
    return load;
  }
}

/// Computes d = start + tiles times an n-block: d[i][0..1] belong to token g + 16i, d[i][2..3] to token
/// g + 16i + 8. block(s, f) gives the B fragments of the n-block for the channels of slice s.
template <typename T, int kSlices, typename Tiles, typename Block>
__device__ __forceinline__ void times(float (&d)[2][4], const Tiles& tiles, Block block,
                                      const float (&start)[2][4] = {}) {
  unrolled<kSlices>([&](auto s) {
    uint32_t f[4];
    block(s, f);
    unrolled<2>([&](auto i) {
      uint32_t upper[4], lower[4];
      tiles(s, Constant<2 * i>{}, upper);
      tiles(s, Constant<2 * i + 1>{}, lower);
      const float (&sum)[4] = s > 0 ? static_cast<const float (&)[4]>(d[i]) : start[i];
      mma<T>(d[i], upper[0], lower[0], upper[1], lower[1], f[0], f[1], sum);
      mma<T>(d[i], upper[2], lower[2], upper[3], lower[3], f[2], f[3], d[i]);
    });
  });
}

__device__ __forceinline__ void store_tile(uint32_t address, const uint32_t (&words)[4][4]) {
  unrolled<4>([&](auto r) { store_shared<r * 512>(address, words[r]); });
}

/// Sizes, which the host needs too. kStages: how many tiles of an input a warp has room for.
template <int kHeadDim, int kStages>
struct BackwardLayout {
  static_assert(kHeadDim == 16 || kHeadDim % kSliceChannels == 0, "a slice lies in one head, or holds two");
  static constexpr int kPartners = kHeadDim <= 32 ? 1 : kHeadDim / kSliceChannels;
  static constexpr int kHeads = kHeadDim == 16 ? 2 : 1;  // of a warp
  static constexpr int kTile = 4 * 512;
  // Of a warp: `kStages` tiles of two inputs, and one for partners to read w from.
  static constexpr int kSecond = kStages * kTile, kShared = 2 * kStages * kTile;
  static constexpr int kTileBytes = kShared + (kPartners > 1 ? kTile : 0);
  // Of a slice: its rows of S, 32 columns at a time; m as B fragments of 512 bytes, one to a partner; and
  // three numbers for each channel.
  static constexpr int kMatrix = kSliceChannels * kSliceChannels * 2, kMean = kPartners * kMatrix;
  static constexpr int kNumbers = kMean + kPartners * 512;
  static constexpr int kSliceBytes = kNumbers + 3 * kSliceChannels * 4;

  static constexpr int kFront = 128;  // of the block, for one number, see agree_on_scale
  static constexpr __host__ __device__ int fixed_bytes(int channels, int groups) {
    const int slices = channels / kSliceChannels;
    return slices * kSliceBytes + SliceGroup::shared_bytes(groups, slices) + kFront;
  }
  static constexpr __host__ __device__ int tile_bytes(int channels, int groups) {
    return channels / kSliceChannels * groups * kTileBytes;
  }
};

/// A warp's view of its block. kShort: registers are short, so addresses are computed where they are used.
template <int kHeadDim, int kStages, bool kShort = false>
struct BackwardBlock {
  using Layout = BackwardLayout<kHeadDim, kStages>;
  static constexpr int kPartners = Layout::kPartners;
  static constexpr int kPartnerBytes = Layout::kSliceBytes - Layout::kMatrix;

  Lane lane;
  int channels, slices, groups, group, slice;
  // Shared memory holds, in this order: the slices' data (first, because low addresses take the fewest
  // registers), what warps exchange, the tiles, and the rest.
  unsigned char *states, *exchange, *tiles, *rest;
  uint32_t tile;  // address of the lane's vector in the warp's first tile
  uint32_t rows;  // of S, see `row_block`

  __device__ __forceinline__ BackwardBlock(unsigned char* shared, int channels, int groups)
      : channels(channels),
        slices(channels / kSliceChannels),
        groups(groups),
        states(shared + Layout::kFront) {
    int warp = threadIdx.x / 32;
    keep_if<kShort>(warp);  // so that a block made anew is computed anew
    group = groups > 1 ? warp / slices : 0, slice = warp - group * slices;
    exchange = states + slices * Layout::kSliceBytes;
    tiles = shared + Layout::fixed_bytes(channels, groups);
    rest = tiles + Layout::tile_bytes(channels, groups);
    tile = shared_address(tiles) + warp * Layout::kTileBytes + position() * 16;
    const int matrix = lane.index / 8, r = lane.index % 8, row = r / 2 * 8 + r % 2;
    rows = slice_state() - partner() * kPartnerBytes + (row + 2 * matrix) * 64 + (r / 2 ^ matrix) * 16;
    keep(tile), keep(rows);
  }

  /// The byte offset of the lane's vector in a tile or fragment. It is vector t ^ g / 2 of its row, so that
  /// the rows of an 8x8 block lie in different banks.
  __device__ __forceinline__ int position() const { return position(lane.index); }
  static __device__ __forceinline__ int position(int index) { return index ^ index / 8; }
  __device__ __forceinline__ int partner() const {  // of the head's slices
    int slice = this->slice;
    keep_if<kShort>(slice);
    return slice % kPartners;
  }
  __device__ __forceinline__ int first_channel() const { return slice * kSliceChannels + 8 * lane.t; }
  __device__ __forceinline__ uint32_t slice_state() const { return slice_state(slice); }
  __device__ __forceinline__ uint32_t slice_state(int slice) const {
    return shared_address(states) + slice * Layout::kSliceBytes;
  }
  /// Arrays with one number for each channel of a slice: 1 / scale, m or its gradient, sums for scale.
  __device__ __forceinline__ float* inverse_scale(int slice) const { return numbers(slice); }
  __device__ __forceinline__ float* mean(int slice) const { return numbers(slice) + kSliceChannels; }
  __device__ __forceinline__ float* scale_sums(int slice) const {
    return numbers(slice) + 2 * kSliceChannels;
  }
  /// The address of channel `channel` of the slice in token 0 of an image. It is computed where it is used,
  /// so that it takes no registers in between.
  __device__ __forceinline__ const char* base(const TokenArray& x, int image, int channel) const {
    int slice = this->slice;
    keep(image), keep_if<kShort>(slice);
    return static_cast<const char*>(x.data) + image * x.image + (slice * kSliceChannels + channel) * 2u;
  }
  /// The warp's first tile.
  __device__ __forceinline__ uint32_t warp_tile() const { return tile - position() * 16; }
  /// The lane's word of row g of a tile, channels 8 b + 2t and 8 b + 2t + 1. That of row g + 8 is 512 bytes
  /// on.
  __device__ __forceinline__ uint32_t word(uint32_t tile, int b) const {
    return tile + lane.g * 64 + (lane.g / 2 ^ b) * 16 + 4 * lane.t;
  }

  // B fragments for `times`. In memory, row R of S's 32 x 32 blocks is 64 bytes, whose four vectors change
  // places by R / 8 ^ R / 2 % 4: neither the rows that one ldmatrix takes, two of each eight, nor those that
  // StateGradient::pack writes, eight in a row, meet a bank twice.

  /// B fragments of S: the rows of the head's slice s in tile order, by the columns 8 b and on of the warp's
  /// slice.
  __device__ __forceinline__ auto row_block(int b) const {
    return [from = flip(rows, b * 16)](auto s, uint32_t (&f)[4]) {
      load_matrix_x4_transposed<s * Layout::kSliceBytes>(f, from);
    };
  }
  /// B fragments of the transpose of S: the columns of slice s, by the rows of the warp's slice, numbers 8 b
  /// and on in tile order.
  __device__ __forceinline__ auto column_block(int b) const {
    int index = lane.index;
    keep_if<kShort>(index);
    const uint32_t columns = rows + partner() * kPartnerBytes - index / 8 * 128;
    return [from = flip(columns, b * 16) + b * 128](auto s, uint32_t (&f)[4]) {
      load_matrix_x4<s * Layout::kMatrix>(f, from);
    };
  }
  /// B fragments of m: its rows in tile order, as pack_mean laid them out.
  __device__ __forceinline__ auto mean_block() const {
    int index = lane.index, slice = this->slice;
    keep_if<kShort>(index), keep_if<kShort>(slice);
    return [from = slice_state(slice) + Layout::kMean + position(index) * 16](auto s, uint32_t (&f)[4]) {
      load_shared<s * 512>(f, from);
    };
  }
  /// For ldmatrix: row lane % 8 of the 8x8 block of tokens 8 r and on, channels 8 c and on, of a warp's tile.
  __device__ __forceinline__ uint32_t block_row(int r, int c) const {
    int row = lane.index % 8;
    keep_if<(kPartners > 2)>(row);
    return warp_tile() + r * 512 + row * 64 + (c ^ row / 2) * 16;
  }

  /// The address at which partner p has what this warp has at `address`.
  __device__ __forceinline__ uint32_t of_partner(uint32_t address, int p) const {
    return address + (p - partner()) * Layout::kTileBytes;
  }
  /// The tiles of all partners, in tile order. `address` is that of the lane's vector in this warp's tile.
  __device__ __forceinline__ auto tiles_at(uint32_t address) const {
    return hold<kPartners>([from = of_partner(address, 0)](auto s, auto r, uint32_t (&x)[4]) {
      load_shared<s * Layout::kTileBytes + r * 512>(x, from);
    });
  }
  /// The tiles of the head's w: the warp's own, or those that all partners have stored behind their inputs.
  __device__ __forceinline__ auto tiles_of_head(const TileWords<1>& own) const {
    if constexpr (kPartners > 1) {
      return tiles_at(tile + Layout::kShared);
    } else {
      return own;
    }
  }
  /// The same with channels in their own order. `row` is this warp's block_row(lane.index / 8, 0).
  __device__ __forceinline__ auto tiles_in_order(uint32_t row) const {
    int matrix = lane.index / 8;
    keep_if<kShort>(matrix);
    row = (row - matrix * 512) ^ (matrix * 16);
    return hold<kPartners>([from = of_partner(row, 0)](auto s, auto r, uint32_t (&x)[4]) {
      load_matrix_x4<s * Layout::kTileBytes + r * 512>(x, from);
    });
  }

  /// fp16 only: the factor of S and m, or of their gradients. All threads agree on it here, from the largest
  /// magnitude that each of them brings; synchronises.
  template <typename T>
  __device__ __forceinline__ float agree_on_scale(float largest) const {
    if constexpr (!kNarrow<T>) return 1.0f;
    auto* most = reinterpret_cast<unsigned*>(states - Layout::kFront);
    __syncthreads();  // the number of the call before is no longer needed
    if (threadIdx.x == 0) *most = 0;
    __syncthreads();
    largest = warp_max(largest);
    if (lane.index == 0) atomicMax(most, __float_as_uint(largest));
    __syncthreads();
    return state_scale<T>();
  }
  template <typename T>
  __device__ __forceinline__ float state_scale() const {
    if constexpr (!kNarrow<T>) return 1.0f;
    float largest[2];
    load_shared_pair<0>(largest, shared_address(states - Layout::kFront));
    return fit(largest[0]);
  }

  /// Lays out `mean` as B fragments. kSplit: that of this head, each column twice (the rounded number, and
  /// what rounding left), in the columns of the lane's own head. Otherwise that of the slice, once.
  template <typename T, bool kSplit>
  __device__ __forceinline__ void pack_mean() const {
    uint4* to = reinterpret_cast<uint4*>(states + slice * Layout::kSliceBytes + Layout::kMean) + position();
#pragma unroll
    for (int p = 0; p < (kSplit ? kPartners : 1); ++p) {
      const float* from = mean(kSplit ? slice - partner() + p : slice) + 8 * lane.t;
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

 private:
  __device__ __forceinline__ float* numbers(int slice) const {
    return reinterpret_cast<float*>(states + slice * Layout::kSliceBytes + Layout::kNumbers);
  }
};

}  // namespace flatten::cuda::tensorcore
