// The plan of a call on the kernels that give a warp to each head: float32, p = 3, heads of up to 32
// channels.
//
// A block has one warp for each head and walks over tiles of 32 tokens. What all channels decide, the length
// of phi's row, the warps exchange through shared memory once a tile; everything else a warp does for its
// head.
#pragma once

#include "plan.h"

namespace flatten::cuda::general {

inline constexpr int kHeadSlots = 32;                  // tokens of a tile
inline constexpr int kHeadColumns = 8, kHeadRows = 4;  // the same on the map
inline constexpr int kMostHeads = 12;                  // 168 registers for each thread are left then

/// Tiles over the local tokens of a window: first `linear` tokens in runs of 32, then, for the taps, the
/// window's map in rectangles of 8 columns and 4 rows.
struct HeadTiling {
  int linear = 0, linear_tiles = 0, tiles_x = 1, tiles = 0, window_h = 0, window_w = 0;

  __device__ bool on_map(int tile) const { return tile >= linear_tiles; }
  __device__ int y(int tile) const { return (tile - linear_tiles) / tiles_x * kHeadRows; }
  __device__ int x(int tile) const { return (tile - linear_tiles) % tiles_x * kHeadColumns; }

  /// The local index of a slot, or -1.
  __device__ int local(int tile, int slot) const {
    if (!on_map(tile)) {
      const int index = tile * kHeadSlots + slot;
      return index < linear ? index : -1;
    }
    const int row = y(tile) + slot / kHeadColumns, column = x(tile) + slot % kHeadColumns;
    return row < window_h && column < window_w ? linear + row * window_w + column : -1;
  }
};

/// The tiles of the queries or keys of every window, in chunks of one block each.
struct HeadSide {
  HeadTiling tiling;
  int chunks = 1, chunk_tiles = 1;

  __device__ int first_tile(int chunk) const { return chunk * chunk_tiles; }
  __device__ int last_tile(int chunk) const {
    const int last = first_tile(chunk) + chunk_tiles;
    return last < tiling.tiles ? last : tiling.tiles;
  }
};

struct HeadForward {
  AttentionForward params;
  Plan plan;
  HeadSide queries, keys;
  float* state = nullptr;     // S and m of every window
  float* partials = nullptr;  // one state for each chunk of keys, if there are several
};

struct HeadBackward {
  AttentionBackward params;
  Plan plan;
  HeadSide queries, keys;
  bool attention = false;  // any gradient but those of the taps is wanted
  const float* state = nullptr;
  float* grad_state = nullptr;      // gradients of S and m, divided by M
  float* grad_partials = nullptr;   // one for each chunk of queries, if there are several
  float4* row_norms = nullptr;      // (window, query): pre, gain, 1 / |z|^2, 1 / |z^3|^2 (by_head.cuh)
  float2* row_terms = nullptr;      // (window, query, head): 1 / denominator; its gradient's share
  float* scale_partials = nullptr;  // (chunks of queries, then of keys; channel), if grad_scale is wanted
  float* taps_partials = nullptr;   // (chunk of keys, taps and then the bias, channel), if wanted
};

/// What a block's shared memory holds: each warp's part, in floats, and what the warps exchange.
constexpr std::int64_t head_shared_bytes(int each, std::int64_t heads) {
  return static_cast<std::int64_t>(sizeof(float)) * heads * (each + 3 * 2 * kHeadSlots);
}
inline constexpr int kHeadTile = kHeadSlots * kRow;  // rows side by side begin in different banks
inline constexpr int kStateShared = 3 * kHeadTile + kHeadSlots;
/// A tile's pixels with those around them for the taps; afterwards two tiles.
constexpr int halo_shared(int taps) {
  return taps > 0 && (kHeadRows + taps - 1) * 12 > 2 * kRow ? (kHeadRows + taps - 1) * 12 * kWidth
                                                            : 2 * kHeadTile;
}
constexpr int output_shared(int taps) { return halo_shared(taps) + kMatrixElements + 2 * kHeadSlots; }
inline constexpr int kGradStateShared = 2 * kHeadTile + kMatrixElements + 2 * kHeadSlots;
inline constexpr int kGradQueryShared = 2 * kHeadTile + kMatrixElements + 7 * kHeadSlots;
constexpr int grad_key_shared(int taps) {
  return halo_shared(taps) + kHeadTile + kMatrixElements + 7 * kHeadSlots;
}

/// The same in bytes, and the taps' weights of one head, or of all heads where each has its own.
inline std::int64_t grad_key_shared_bytes(const AttentionInputs& in) {
  const std::int64_t taps = in.taps ? in.taps.kernel_h : 0, heads = in.geometry.heads;
  return head_shared_bytes(grad_key_shared(static_cast<int>(taps)), heads) +
         std::int64_t{sizeof(float)} * taps * taps * 32 * (in.taps.per_channel ? heads : 1);
}

template <int K>
inline constexpr int kHaloShared = halo_shared(K);
template <int K>
inline constexpr int kOutputShared = output_shared(K);
template <int K>
inline constexpr int kGradKeyShared = grad_key_shared(K);

/// The launches, in units of their own (units.txt). T is float.
template <class T>
cudaError_t launch_head_state(const HeadForward& call, cudaStream_t stream);
template <class T>
cudaError_t launch_head_output(const HeadForward& call, cudaStream_t stream);
template <class T>
cudaError_t launch_head_backward(const HeadBackward& call, cudaStream_t stream);
template <class T>
cudaError_t launch_head_key_gradient(const HeadBackward& call, cudaStream_t stream);

}  // namespace flatten::cuda::general
