// The plan of one call on the general kernels: how the host cuts the work, which every kernel is handed by
// value.
//
// A block of 128 threads walks over tiles of 64 tokens ("slots") and blocks of up to 32 channels of one head
// ("columns"), staged in shared memory in the accumulate type.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../choose.h"

namespace flatten::cuda::general {

inline constexpr int kThreads = 128;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kSlots = 64;
inline constexpr int kWidth = 32;
// Rows of a staged tile are padded by 16 bytes (float): rows read side by side then hit different banks.
inline constexpr int kRow = kWidth + 4;
inline constexpr int kTileElements = kSlots * kRow;
inline constexpr int kMatrixElements = kWidth * kRow;
// A chunk is what one block handles: up to this many tiles.
inline constexpr int kChunkTiles = 4;
inline constexpr int kChunkSlots = kChunkTiles * kSlots;

/// Where the tokens of a window lie in the image (params.h, Geometry).
struct TokenMap {
  int prefix, map_h, map_w, window_h, window_w, windows_w, shift_h, shift_w;
  bool identity;  // one window without shift: local index = token

  __device__ int at(int window, int y, int x) const {
    int row = window / windows_w * window_h + y + shift_h;
    int column = window % windows_w * window_w + x + shift_w;
    if (row >= map_h) row -= map_h;
    if (column >= map_w) column -= map_w;
    return prefix + row * map_w + column;
  }

  __device__ int at(int window, int local) const {
    if (identity || local < prefix) return local;
    local -= prefix;
    return at(window, local / window_w, local % window_w);
  }
};

/// Tiles over the local tokens of a window: first `linear` tokens in runs of 64, then, for the taps, the
/// window's map in rectangles of 64 positions, 2^log_width wide.
struct Tiling {
  int linear, linear_tiles, tiles_x, tiles, log_width, window_h, window_w;

  __device__ int tile_height() const { return kSlots >> log_width; }
  __device__ int tile_width() const { return 1 << log_width; }

  __device__ bool on_map(int tile) const { return tile >= linear_tiles; }
  __device__ int tile_y(int tile) const { return (tile - linear_tiles) / tiles_x * tile_height(); }
  __device__ int tile_x(int tile) const { return (tile - linear_tiles) % tiles_x * tile_width(); }

  /// The local index of a slot, or -1.
  __device__ int local(int tile, int slot) const {
    if (!on_map(tile)) {
      const int index = tile * kSlots + slot;
      return index < linear ? index : -1;
    }
    const int y = tile_y(tile) + (slot >> log_width), x = tile_x(tile) + (slot & (tile_width() - 1));
    return y < window_h && x < window_w ? linear + y * window_w + x : -1;
  }
};

/// Chunks of up to kChunkTiles tiles over one side of the attention (queries or keys) of every window.
struct Side {
  Tiling tiling;
  int chunks = 1;
  int chunk_tiles = 1;
  int groups = 1;  // the heads are split over this many thread blocks
  int heads_per_group = 1;

  __device__ int first_tile(int chunk) const { return chunk * chunk_tiles; }
  __device__ int tiles_of(int chunk) const {
    const int left = tiling.tiles - first_tile(chunk);
    return chunk_tiles < left ? chunk_tiles : left;
  }
};

/// What every kernel of an attention call is told beside its params struct.
struct Plan {
  TokenMap map;
  int windows = 1;  // per image
  int heads = 1, head_dim = 1, channels = 1;
  int staged_scale = 0;      // channels whose 1 / scale is kept in shared memory; divided in place beyond
  int blocks = 1;            // column blocks of a head
  double inverse_keys = 1;   // 1 / M
  bool resident = false;     // shared memory holds all of a head's matrix blocks
  int matrix_blocks = 1;     // matrix blocks in shared memory: blocks^2 if resident, else 1
  bool vector = false;       // 16-byte accesses to every token tensor of the call
  bool bias_vector = false;  // and to key_bias

  /// (head_dim + 1) * channels: the elements of one window's S and m, or their gradients.
  __host__ __device__ std::int64_t state() const {
    return static_cast<std::int64_t>(head_dim + 1) * channels;
  }
};

struct ForwardCall {
  AttentionForward params;
  Plan plan;
  Side queries, keys;
  bool small = false;        // attend_small does it all
  bool state_only = false;   // the backward pass wants S and m, not the output
  void* state = nullptr;     // S and m of every window; null only if `small` and nobody keeps them
  void* partials = nullptr;  // one state for each chunk of keys, if there are several
};

struct BackwardCall {
  AttentionBackward params;
  Plan plan;
  Side queries, keys;
  const void* state = nullptr;
  void* grad_state = nullptr;      // gradients of S and m, divided by M
  void* grad_partials = nullptr;   // one for each chunk of queries, if there are several
  void* row_terms = nullptr;       // (window, query, head, 2): 1 / denominator; its gradient's share
  void* scale_partials = nullptr;  // (chunks of queries, then of keys; channel), if grad_scale is wanted
  bool attention = false;          // any gradient but those of the taps is wanted
};

/// The depthwise convolution of the token tensor `in`, or with the kernel mirrored and no bias, the gradient
/// of its input.
struct ConvCall {
  Taps taps;
  Plan plan;
  Tiling tiling;
  std::int64_t batch = 0;
  Tokens in;
  MutableTokens out;
  bool mirrored = false;
};

/// Gradients of taps and bias: each block sums a run of tiles, counted over all windows of all images.
struct TapsCall {
  Taps taps;
  Plan plan;
  Tiling tiling;
  std::int64_t tiles = 0;
  int chunk_tiles = 1, chunks = 1;
  Tokens in, grad_out;
  void* partials = nullptr;  // (chunk, tap, channel), the bias as the last tap
};

/// The last launch of a backward pass: ordered sums of partial results into parameter gradients.
struct ParameterCall {
  Plan plan;
  std::int64_t pairs = 0;  // images * windows
  MutableParameter grad_scale, grad_key_bias, grad_weight, grad_bias;
  const void* scale_partials = nullptr;  // (scale_rows, channel)
  std::int64_t scale_rows = 0;
  Tokens grad_key;
  int keys = 0;
  int key_bias_stripes = 0;  // so many threads share the sums over pairs of four channels; 0: of one channel
  const void* taps_partials = nullptr;  // (taps_chunks, taps and then the bias, taps_channels)
  int taps = 0, taps_chunks = 0, taps_channels = 0;
  bool per_channel = false;
};

}  // namespace flatten::cuda::general
