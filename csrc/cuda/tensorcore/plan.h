// What the host code of the tensor-core kernels shares, forward and backward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../choose.h"
#include "../workspace.h"
#include "params.h"

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
  if (p.mapping.map == FeatureMap::kFocused)
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

/// f with the element type as a constant, for those that the kernels take; R() for others.
template <class R, class F>
R with_half(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return f(std::integral_constant<Dtype, Dtype::kBFloat16>());
    case Dtype::kFloat16:
      return f(std::integral_constant<Dtype, Dtype::kFloat16>());
    case Dtype::kFloat32:
    case Dtype::kFloat64:
      break;
  }
  return R();
}

/// f with the head dimension as a constant, for those that there are kernels of; R() for others.
template <class R, class F>
R with_head_dim(std::int64_t head_dim, F&& f) {
  if (head_dim == 16) return f(std::integral_constant<int, 16>());
  if (head_dim == 32) return f(std::integral_constant<int, 32>());
  if (head_dim == 64) return f(std::integral_constant<int, 64>());
  return R();
}

/// What keeps a call from the kernels, in the log's words.
constexpr const char* kUnaligned = "rows of a token tensor are not aligned to 16 bytes";
constexpr const char* kTooWide =
    "more channels than a block has threads for: 384, 256 from head dimension 64 on";
constexpr const char* kTooManyWindows = "more than 65535 windows";
constexpr const char* kTooOld = "a GPU before compute capability 8.0, or no kernels built for it";
constexpr const char* kNotHalf = "neither bfloat16 nor float16";
constexpr const char* kTooMuchShared = "more shared memory than this GPU gives a block";

/// What of a call goes beyond focused and mapped features with their plain sums; null: nothing.
inline const char* more_general(const AttentionInputs& p) {
  if (p.mapping.map != FeatureMap::kFocused && p.mapping.map != FeatureMap::kNone) {
    return "a feature map other than the focused one";
  }
  if (!p.general.is_plain() || p.taps.per_image || p.geometry.value_dim != p.geometry.head_dim) {
    return "the general form of linear attention";
  }
  return nullptr;
}

/// What of a call's shape and layout the kernels do not take at all; null: nothing.
inline const char* unsuited(const AttentionInputs& p, const Device& device) {
  const Geometry& g = p.geometry;
  if (device.compute_capability < 80) return kTooOld;
  if (p.dtype != Dtype::kBFloat16 && p.dtype != Dtype::kFloat16) return kNotHalf;
  if (const char* why = more_general(p)) return why;
  if (!with_head_dim<bool>(g.head_dim, [](auto) { return true; })) {
    return "a head dimension other than 16, 32 and 64";
  }
  if (g.prefix != 0) return "tokens before the map";
  if (g.batch < 1 || g.queries < 1) return "nothing to compute";
  if (g.channels() % kSliceChannels != 0) return "channels that are no multiple of 32";
  if (g.channels() > max_threads(static_cast<int>(g.head_dim))) return kTooWide;
  if (g.queries > kMany || g.keys > kMany) return "more than 2^30 tokens";
  if (g.batch * g.windows() > kMany) return "more than 2^30 windows";
  const int taps = taps_of(p);
  if (p.taps && (p.taps.kernel_h != p.taps.kernel_w || (taps != 3 && taps != 5 && taps != 7))) {
    return "taps other than 3 x 3, 5 x 5 and 7 x 7";
  }
  for (const Tokens* x : {&p.query, &p.key, &p.value}) {
    if (!aligned(*x)) return kUnaligned;
  }
  if (!aligned(p.mapping.key_bias.data)) return "key_bias is not aligned to 16 bytes";
  return nullptr;
}

inline Call refuse(const char* why) { return {nullptr, why, 0, {}}; }

/// The kernels whose blocks take all heads of their tokens: the models' usual calls, at the least cost.
Call choose_all_heads(const AttentionForward& p, const Device& device);
Call choose_all_heads(const AttentionBackward& p, const Device& device);

/// The kernels whose blocks take one head: every other call that tensor cores can do.
namespace heads {
Call choose(const AttentionForward& p, const Device& device);
Call choose(const AttentionBackward& p, const Device& device);
}  // namespace heads

/// Small windows are a block's each: up to so many tokens, since their V stays in shared memory and their
/// products in registers. Of more than kFewTokens, which take a block many steps, there have to be many.
constexpr std::int64_t kMostTokens = 256, kFewTokens = 64, kManyWindows = 32;

inline bool are_small_windows(std::int64_t tokens, std::int64_t windows) {
  return tokens <= kMostTokens && (tokens <= kFewTokens || windows >= kManyWindows);
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

/// The state kernel's parameters, but for where its sums go.
StateParams state_params_of(const AttentionInputs& params, const WindowGrid& keys, const Chunks& chunks);

/// S and m of every window alone, one block each, for a backward pass that was not given them: where windows
/// are small.
cudaError_t launch_state(const AttentionInputs& params, float* state, const Device& device,
                         cudaStream_t stream);

}  // namespace flatten::cuda::tensorcore
