// The plan of one call on the general kernels: how the host cut the work, handed to every kernel by value.
#pragma once

#include "launch.h"
#include "tiles.cuh"

namespace flatten::cuda::general {

/// Chunks of up to kChunkTiles tiles over one side of the attention (queries or keys) of every window.
struct Side {
  Tiling tiling;
  int chunks = 1;
  int chunk_tiles = 1;
  int groups = 1;  // the heads are split over this many thread blocks
  int heads_per_group = 1;

  __device__ int first_tile(int chunk) const { return chunk * chunk_tiles; }
  __device__ int tiles_of(int chunk) const { return min(chunk_tiles, tiling.tiles - chunk * chunk_tiles); }
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

/// Which (image, window), head group and chunk a thread block has: chunks fastest.
struct Place {
  int chunk, window, first_head, last_head;
  std::int64_t pair;   // image * windows + window
  std::int64_t batch;  // image

  __device__ Place(const Plan& plan, const Side& side, std::int64_t block) {
    chunk = static_cast<int>(block % side.chunks);
    block /= side.chunks;
    first_head = static_cast<int>(block % side.groups) * side.heads_per_group;
    last_head = min(plan.heads, first_head + side.heads_per_group);
    pair = block / side.groups;
    window = static_cast<int>(pair % plan.windows);
    batch = pair / plan.windows;
  }
};

/// Dynamic shared memory handed out front to back, in elements of the accumulate type.
template <class A>
struct Arena {
  A* next;

  __device__ A* take(int elements) {
    A* at = next;
    next += (elements + 3) / 4 * 4;  // keeps every part on 16 bytes
    return at;
  }
};

}  // namespace flatten::cuda::general
