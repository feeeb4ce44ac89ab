// The general kernels' calls, planned by general.cu and launched by one unit per dtype.
#pragma once

#include "general.h"

namespace flatten::cuda::general {

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
  const void* taps_partials = nullptr;  // (taps_chunks, taps and then the bias, taps_channels)
  int taps = 0, taps_chunks = 0, taps_channels = 0;
  bool per_channel = false;
};

template <class T>
cudaError_t launch_forward(const ForwardCall& call, cudaStream_t stream);
template <class T>
cudaError_t launch_small(const ForwardCall& call, cudaStream_t stream);
template <class T>
cudaError_t launch_backward(const BackwardCall& call, cudaStream_t stream);
template <class T>
cudaError_t launch_key_gradient(const BackwardCall& call, cudaStream_t stream);
template <class T>
cudaError_t launch_conv(const ConvCall& call, cudaStream_t stream);
template <class T>
cudaError_t launch_taps(const TapsCall& call, cudaStream_t stream);
template <class T>
cudaError_t launch_parameters(const ParameterCall& call, cudaStream_t stream);

}  // namespace flatten::cuda::general
