// What the host code of the tensor-core kernels shares, forward and backward.
#pragma once

#include <algorithm>
#include <cstdint>

#include "launch.h"
#include "tensorcore_params.h"

namespace flatten::cuda::tensorcore {

inline bool aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

constexpr std::int64_t kMany = std::int64_t{1} << 30;  // what counts in 32 bits, with room
constexpr std::int64_t kMostBlocks = 65535;            // of a grid in y and z

/// Rows of 16 bytes each, at a stride of which the kernels hold the bytes in 32 bits.
inline bool aligned(const Tokens& x) {
  return aligned(x.data) && x.batch_stride % 8 == 0 && x.token_stride % 8 == 0 && x.token_stride < kMany;
}

constexpr int ceil_div(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }

inline WindowGrid grid_of(const Geometry& g) {
  const bool raster = g.windows() == 1 && g.shift_h == 0 && g.shift_w == 0;
  return {static_cast<int>(g.map_h),    static_cast<int>(g.map_w),       static_cast<int>(g.window_h),
          static_cast<int>(g.window_w), static_cast<int>(g.windows_h()), static_cast<int>(g.windows_w()),
          static_cast<int>(g.shift_h),  static_cast<int>(g.shift_w),     raster};
}

/// Without taps one raster window need not know its map: its tokens make rows of their own.
inline WindowGrid flat_grid(std::int64_t tokens) {
  constexpr int kWidth = kMaxPatches * kPatchColumns;
  const int height = ceil_div(tokens, kWidth);
  return {height, kWidth, height, kWidth, 1, 1, 0, 0, true};
}

inline Floats floats(const Parameter& parameter) {
  return {parameter.data, parameter.dtype != Dtype::kFloat32};
}

inline TokenArray tokens(const Tokens& x) {
  return {x.data, x.batch_stride * 2, static_cast<int>(x.token_stride * 2)};
}

inline FocusParams focus_of(const AttentionInputs& p) {
  const double power = p.mapping.focusing_factor;
  int mode = kNoMapping;
  if (p.mapping.focused)
    mode = power == 1 || power == 2 || power == 3 || power == 4 ? static_cast<int>(power) : kAnyPower;
  return {
      floats(p.mapping.scale), {nullptr, false}, static_cast<float>(p.eps), mode, static_cast<float>(power)};
}

inline bool aligned(const MutableTokens& x) {
  return aligned(Tokens{x.data, x.batch_stride, x.token_stride});
}

inline TokenArray tokens(const MutableTokens& x) {
  return tokens(Tokens{x.data, x.batch_stride, x.token_stride});
}

inline int taps_of(const AttentionInputs& p) { return p.taps ? static_cast<int>(p.taps.kernel_h) : 0; }

/// Whether the shape and layout of a call's inputs suit the kernels at all.
inline bool suits(const AttentionInputs& p, const Device& device) {
  const Geometry& g = p.geometry;
  if (device.compute_capability < 80 || g.prefix != 0 || g.batch < 1 || g.queries < 1) return false;
  if (g.channels() % kSliceChannels != 0) return false;
  if (g.queries > kMany || g.keys > kMany || g.batch * g.windows() > kMany) return false;
  const int taps = taps_of(p);
  if (p.taps && (p.taps.kernel_h != p.taps.kernel_w || (taps != 3 && taps != 5 && taps != 7))) return false;
  for (const Tokens* x : {&p.query, &p.key, &p.value}) {
    if (!aligned(*x)) return false;
  }
  return aligned(p.mapping.key_bias.data);
}

/// Into how many blocks to cut each of `pieces` equal pieces of work, `steps` steps long: the fewest of those
/// that are done first, where a multiprocessor works on one block at a time.
inline int blocks_of(int steps, std::int64_t pieces, const Device& device) {
  const int most = std::min(ceil_div(device.multiprocessors, pieces), steps);
  int best = 1;
  std::int64_t least = kMany;
  for (int blocks = 1; blocks <= most; ++blocks) {
    const std::int64_t waves = ceil_div(pieces * blocks, device.multiprocessors);
    const std::int64_t time = waves * ceil_div(steps, blocks);
    if (time < least) least = time, best = blocks;
  }
  return best;
}

/// Chunks of a window's tokens for `groups` groups of warps: few, since every one costs a partial state.
struct Chunks {
  int groups, chunk, chunks;
  Chunks(int tokens, int windows, int max_groups, const Device& device) {
    groups = std::min(std::max(1, max_groups), ceil_div(tokens, kTileTokens));
    const int step = groups * kTileTokens;
    const int steps = ceil_div(tokens, step);
    chunk = ceil_div(steps, blocks_of(steps, windows, device)) * step;
    chunks = ceil_div(tokens, chunk);
  }
};

/// Strips of a window, as wide as `fits(patches)` allows, and runs of rows: few, since every one reads a
/// state and a halo.
struct Strips {
  int patches, strips, rows, runs;
  template <typename Fits>
  Strips(const WindowGrid& grid, int windows, const Device& device, Fits fits) {
    patches = grid.window_w <= kPatchColumns ? 1 : kMaxPatches;
    while (patches > 1 && !fits(patches)) --patches;
    strips = ceil_div(grid.window_w, patches * kPatchColumns);
    const int steps = ceil_div(grid.window_h, kStepRows);
    rows = ceil_div(steps, blocks_of(steps, std::int64_t{strips} * windows, device)) * kStepRows;
    runs = ceil_div(grid.window_h, rows);
  }
};

}  // namespace flatten::cuda::tensorcore
