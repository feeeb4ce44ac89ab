// What the host code of the tensor-core kernels shares, forward and backward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../choose.h"
#include "../workspace.h"
#include "costs.h"
#include "params.h"
#include "schedule.h"

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

/// The most parts worth trying: several blocks for each that the device holds.
inline std::int64_t most_parts(std::int64_t pieces, const Device& device) {
  constexpr std::int64_t kResident = 32;
  return std::max<std::int64_t>(1, kResident * device.multiprocessors / pieces);
}

/// How a window's tokens are cut into chunks, a block's each: `groups` groups of its warps take 32 tokens a
/// step each.
struct Chunks {
  int groups = 1, chunk = 0, chunks = 0;

  /// Of `windows` windows of `tokens` tokens, each of which leaves a state. shared(groups): of a block, in
  /// bytes.
  template <class Shared>
  Chunks(int tokens, std::int64_t windows, int channels, std::int64_t state_elements, int most_threads,
         const KernelCost& cost, const Device& device, Shared shared) {
    // What more chunks and groups cost beside: a launch that adds the chunks' sums, the traffic of these, and
    // at a block's end one exchange for each further group.
    constexpr double kSum = 4000, kSumOfPart = 100, kExchange = 500;
    constexpr double kBytesPerCycle = 14;  // of one multiprocessor
    const auto sums = [&](int parts) {
      const double bytes = 2.0 * windows * parts * state_elements * sizeof(float);
      return parts > 1 ? kSum + parts * kSumOfPart + bytes / device.multiprocessors / kBytesPerCycle : 0.0;
    };
    double least = INFINITY;
    for (int count = std::max(1, most_threads / channels); count > 0; --count) {
      if (count > ceil_div(tokens, kTileTokens)) continue;
      const int steps = ceil_div(tokens, count * kTileTokens);
      for_each_cut(steps, most_parts(windows, device), [&](int parts, int each) {
        const LaunchShape shape{channels * count, shared(count), windows * parts, each,
                                static_cast<double>(ceil_div(tokens, kTileTokens)) / (parts * each * count)};
        const double time = cycles(cost, shape, device) + sums(parts) + (count - 1) * kExchange;
        if (time < least) least = time, groups = count, chunk = each * count * kTileTokens, chunks = parts;
      });
    }
    if (chunks == 0) groups = 1, chunk = tokens, chunks = 1;  // nothing fits: the caller refuses it
  }
};

/// How a window is cut into strips of columns, `patches` patches wide, and these into runs of rows: a block's
/// each.
struct Strips {
  int patches = 1, strips = 0, rows = 0, runs = 0;

  /// Of `windows` windows. threads(patches), shared(patches): of a block; shapes with more threads than
  /// `most_threads` are left out.
  template <class Threads, class Shared>
  Strips(const WindowGrid& grid, std::int64_t windows, int most_threads, const KernelCost& cost,
         const Device& device, Threads threads, Shared shared) {
    const int steps = ceil_div(grid.window_h, kStepRows), columns = ceil_div(grid.window_w, kPatchColumns);
    double least = INFINITY;
    for (int count = std::min(kMaxPatches, columns); count > 0; --count) {
      if (threads(count) > most_threads) continue;
      const int across = ceil_div(columns, count);
      for_each_cut(steps, most_parts(across * windows, device), [&](int parts, int each) {
        const LaunchShape shape{threads(count), shared(count), across * windows * parts, each,
                                static_cast<double>(columns * steps) / (across * count * parts * each)};
        const double time = cycles(cost, shape, device);
        if (time < least)
          least = time, patches = count, strips = across, rows = each * kStepRows, runs = parts;
      });
    }
    if (runs == 0) strips = columns, rows = steps * kStepRows, runs = 1;  // nothing fits, as above
  }
};

/// The kernels of a call's element type, head dimension and power.
const ForwardKernels* forward_kernels_of(const AttentionInputs& inputs);

/// S and m of all windows, by parts that a second launch adds up.
class StateLaunch {
 public:
  StateLaunch(const AttentionInputs& inputs, const Device& device);
  /// Where S and m go; takes memory for the parts.
  void place(float* state, Workspace& workspace);
  cudaError_t launch(cudaStream_t stream) const;
  int shared_bytes() const { return shared_bytes_; }

 private:
  const ForwardKernels* kernels_;
  Chunks chunks_;
  StateParams params_;
  std::int64_t images_, windows_, size_;  // windows of an image; elements of a state
  int shared_bytes_;
  float* state_ = nullptr;
};

}  // namespace flatten::cuda::tensorcore
