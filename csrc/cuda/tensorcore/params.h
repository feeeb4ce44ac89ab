// The parameters of the tensor-core kernels, and the tables of functions that launch them: plain structs, for
// the host code and for the kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../params.h"

namespace flatten::cuda::tensorcore {

constexpr int kTileTokens = 32;     // tokens that a warp takes in one step
constexpr int kSliceChannels = 32;  // channels that it takes
constexpr int kStepRows = 4;        // the same tokens as pixels of the map: rows,
constexpr int kPatchColumns = 8;    // columns
constexpr int kMaxPatches = 2;      // and patches side by side in a block

/// The most threads a block may have before its registers run out.
constexpr int max_threads(int head_dim, int taps = 0) { return head_dim <= 32 && taps <= 5 ? 384 : 256; }

constexpr int kBackwardThreads = 256;
/// Whether the backward kernels sum the gradients of the taps too: the 50 sums of 7 x 7 taps and bias would
/// not fit in a lane's registers.
constexpr bool sums_taps(int taps) { return taps == 3 || taps == 5; }
/// The threads of the one-launch backward for calls with more channels than max_threads allows, in heads
/// of 32.
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

/// How FocusParams::mode names the power p: 1 .. 4 are raised by multiplication, kAnyPower as 2^(p log2 y);
/// kNoMapping stands for features that are mapped already.
constexpr int kAnyPower = 0;
constexpr int kNoMapping = -1;
/// As a template argument: the kernel reads the mode from FocusParams::mode at run time.
constexpr int kRuntimeMode = -2;
/// The template argument of forward calls with the paper's p = 3. bf16 computes it in a way of its own
/// (features.cuh), so it has kernels for p = 3 alone; the other types use those with a run-time mode.
template <Dtype kDtype>
constexpr int kCubicMode = kDtype == Dtype::kBFloat16 ? 3 : kRuntimeMode;

struct FocusParams {
  Floats scale, key_bias;
  float eps;
  int mode;     // 1 .. 4, kAnyPower or kNoMapping
  float power;  // p, whatever the mode
};

/// A tensor (image, token, channel) whose channels are adjacent; the strides are in bytes.
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
  int groups;      // groups of warps in a block, each with tokens of its own
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
  float eps;    // added to the denominator
  int patches;  // patches side by side in a strip
  int rows;     // pixel rows that a block takes, a multiple of kStepRows
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
  int tokens, window_keys;  // keys of an image; keys of a window
  int patches;              // patches side by side in a strip
  int rows;                 // pixel rows that a block takes, a multiple of kStepRows
  float* scale_partials;    // (windows, runs, strips, channels), or null
  float* tap_partials;      // (windows, runs, strips, taps and bias, channels or head_dim), or null
};

/// One block makes both passes. It does not read the `chunk`, `groups`, `partial` and `scale_partials` of the
/// query pass.
struct WindowGradientParams {
  QueryGradientParams query;
  KeyGradientParams key;
};

/// One block makes all of a small window.
struct WindowParams {
  WindowGrid grid;
  FocusParams focus;
  TokenArray query, key, value, out;
  float* state;  // where to store S and m, laid out as launch.h says, or null
  Floats weight, bias;
  bool per_channel;
  int channels;
  float eps;  // added to the denominator
};

/// The forward kernels of one element type, head dimension and mode (3, the paper's, or kRuntimeMode); one
/// unit each (units.txt).
struct ForwardKernels {
  int (*state_shared)(int channels, int groups, bool biased);
  cudaError_t (*state)(const StateParams& params, int chunks, int windows, cudaStream_t stream);
  int (*output_shared)(int taps, int channels, int patches, bool per_channel);
  cudaError_t (*output)(const OutputParams& params, int taps, dim3 grid, cudaStream_t stream);
};
template <Dtype kDtype, int kHeadDim, int kMode>
const ForwardKernels& forward_kernels();

/// The kernels of one element type, head dimension and mode (3, the paper's, or kRuntimeMode), for no taps, 3
/// x 3 and 5 x 5; one unit each (units.txt).
struct WindowKernels {
  int (*shared_bytes)(int taps, int channels, int keys, bool per_channel);
  cudaError_t (*launch)(const WindowParams& params, int taps, int windows, cudaStream_t stream);
};
template <Dtype kDtype, int kHeadDim, int kMode>
const WindowKernels& window_kernels();

/// The backward kernels of one element type and head dimension, of all powers; units as forward.
struct BackwardKernels {
  int (*query_shared)(int channels, int groups);
  cudaError_t (*query)(const QueryGradientParams& params, int chunks, int windows, cudaStream_t stream);
  int (*key_shared)(int taps, int channels, int patches, bool per_channel);
  cudaError_t (*key)(const KeyGradientParams& params, int taps, dim3 grid, cudaStream_t stream);
};
template <Dtype kDtype, int kHeadDim>
const BackwardKernels& backward_kernels();

/// The backward pass of small windows in one launch; units as forward.
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
