// What the tensor-core kernels are told, and what their host code (forward.cpp) knows of them: plain structs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../params.h"

namespace flatten::cuda::tensorcore {

constexpr int kTileTokens = 32;     // a warp's tokens of one step
constexpr int kSliceChannels = 32;  // and channels
constexpr int kStepRows = 4;        // the same as pixels: rows,
constexpr int kPatchColumns = 8;    // columns
constexpr int kMaxPatches = 2;      // and patches side by side in a block

/// Threads of a block that its registers allow for.
constexpr int max_threads(int head_dim, int taps = 0) { return head_dim <= 32 && taps <= 5 ? 384 : 256; }

constexpr int kBackwardThreads = 256;
/// Whether they sum the gradients of the taps too: the 50 sums of 7 x 7 would not fit in a lane's registers.
constexpr bool sums_taps(int taps) { return taps == 3 || taps == 5; }
/// Of the one launch with more channels than that, in heads of 32.
constexpr int kWideThreads = 384;

/// Where the tokens of a window lie in memory (params.h, Geometry).
struct WindowGrid {
  int map_h, map_w;        // the map
  int window_h, window_w;  // one window; the map's own size where there is one window
  int windows_h, windows_w;
  int shift_h, shift_w;
  bool raster;  // one window, not shifted: its tokens are adjacent in memory
};

/// A parameter in fp32 or, where `half`, in the tensors' own type.
struct Floats {
  const void* data;
  bool half;
};

/// A power of 1 .. 4 is raised by multiplication, kAnyPower as 2^(p log2 y); kNoMapping: features that are
/// mapped already.
constexpr int kAnyPower = 0;
constexpr int kNoMapping = -1;
/// As a template argument: any of these, as FocusParams::mode says.
constexpr int kRuntimeMode = -2;
/// That of forward calls of the paper's p = 3: bf16, which has a way of its own there (features.cuh), has
/// kernels of it.
template <Dtype kDtype>
constexpr int kCubicMode = kDtype == Dtype::kBFloat16 ? 3 : kRuntimeMode;

struct FocusParams {
  Floats scale, key_bias;
  float eps;
  int mode;     // 1 .. 4, kAnyPower or kNoMapping
  float power;  // p, whatever the mode
};

/// (image, token, channel) with the strides in bytes.
struct TokenArray {
  const void* data;
  std::int64_t image;
  int token;
};

struct StateParams {
  WindowGrid grid;
  FocusParams focus;
  TokenArray key, value;
  int channels;
  int keys;        // of one window
  int chunk;       // tokens of one block
  int groups;      // of warps, each with tokens of its own
  float* partial;  // (windows, chunks, state of a window), as in launch.h
};

struct OutputParams {
  WindowGrid grid;
  FocusParams focus;
  TokenArray query, value, out;
  const float* state;  // (windows, S and m), as in launch.h
  Floats weight, bias;
  bool per_channel;
  int channels;
  int tokens;   // queries of an image
  float eps;    // of the denominator
  int patches;  // side by side in a strip
  int rows;     // of a block, a multiple of kStepRows
};

struct QueryGradientParams {
  WindowGrid grid;
  FocusParams focus;
  TokenArray query, grad_out, grad_query;
  const float* state;  // (windows, S and m), as in launch.h
  int channels;
  int queries;  // of one window
  int chunk, groups;
  float eps, inverse_keys;
  float* partial;         // (windows, chunks, gradient of a window's state, over M)
  float* scale_partials;  // (windows, chunks, channels), or null
};

struct KeyGradientParams {
  WindowGrid grid;
  FocusParams focus;
  TokenArray key, value, grad_out, grad_key, grad_value;
  const float* state_gradient;  // (windows, gradients of S and m over M), as in launch.h
  Floats weight;
  bool per_channel;
  int channels;
  int tokens, window_keys;  // keys of an image, of a window
  int patches;              // side by side in a strip
  int rows;                 // of a block, a multiple of kStepRows
  float* scale_partials;    // (windows, runs, strips, channels), or null
  float* tap_partials;      // (windows, runs, strips, taps and bias, channels or head_dim), or null
};

/// Both passes by one block. Of the query's, `chunk`, `groups`, `partial` and `scale_partials` are not read.
struct WindowGradientParams {
  QueryGradientParams query;
  KeyGradientParams key;
};

/// The forward kernels of one element type, head dimension and mode (3, the paper's, or kRuntimeMode); one
/// instantiation unit each (forward_*.cu).
struct ForwardKernels {
  int (*state_shared)(int channels, int groups);
  cudaError_t (*state)(const StateParams& params, int chunks, int windows, cudaStream_t stream);
  int (*output_shared)(int taps, int channels, int patches, bool per_channel);
  cudaError_t (*output)(const OutputParams& params, int taps, dim3 grid, cudaStream_t stream);
};
template <Dtype kDtype, int kHeadDim, int kMode>
const ForwardKernels& forward_kernels();

/// The backward kernels of one element type and head dimension, of all powers; units as forward.
struct BackwardKernels {
  int (*query_shared)(int channels, int groups);
  cudaError_t (*query)(const QueryGradientParams& params, int chunks, int windows, cudaStream_t stream);
  int (*key_shared)(int taps, int channels, int patches, bool per_channel);
  cudaError_t (*key)(const KeyGradientParams& params, int taps, dim3 grid, cudaStream_t stream);
};
template <Dtype kDtype, int kHeadDim>
const BackwardKernels& backward_kernels();

/// The backward pass of small windows in one launch (backward_window_*.cu).
struct WindowGradientKernels {
  int (*shared_bytes)(int taps, int channels, int groups, bool per_channel, int keys);
  cudaError_t (*launch)(const WindowGradientParams& params, int taps, int windows, cudaStream_t stream);
};
template <Dtype kDtype, int kHeadDim, int kThreads = kBackwardThreads>
const WindowGradientKernels& window_gradient_kernels();

/// `state` (windows, size) = the sum of `partial` (windows, chunks, size) over chunks, in their order.
cudaError_t reduce_state(const float* partial, float* state, int windows, int chunks, std::int64_t size,
                         cudaStream_t stream);

}  // namespace flatten::cuda::tensorcore
