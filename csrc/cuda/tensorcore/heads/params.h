// The parameters of the kernels that take one head to a thread block, and the table of functions that launch
// them. They do the calls whose shape the other tensor-core kernels do not take: heads of any multiple of 8
// channels up to 128, any number of heads, tokens before the map, taps of any size.
//
// A row's norms run over all heads, so they are measured first. From then on heads do not know of each other,
// but for one sum over heads in the gradient through phi. Forward:
//   measure_rows       the norms of every row of q and of k
//   accumulate         S and m
//   multiply           out = Q S / (Q . m + eps) + taps over V
// Backward, with S and m:
//   measure_rows
//   multiply           of each query and head: 1 / denominator, and grad_out . out without the taps
//   accumulate         dS and dm
//   multiply           dv = K dS + transposed taps over grad_out, and of each key and head K . dK
//   differentiate      dq, then dk
//   correlate          the gradients of the taps
#pragma once

#include "../params.h"

namespace flatten::cuda::tensorcore::heads {

// Not measured on a GPU. Two blocks of eight warps, of 128 registers a thread, share a multiprocessor, but
// for heads of 128. Three tiles of 64 tokens are 52 KiB at the most. 13 pairs are the 25 taps of 5 x 5 and
// the bias.
constexpr int kMostWarps = 8;                           // of a block of `multiply` and `differentiate`
constexpr int kTileRows = 16;                           // of a warp of these at once
constexpr int kStateTokens = 64;                        // that a block of `accumulate` takes in one step
constexpr int kMeasureThreads = 256, kMeasureRows = 2;  // of a block of `measure_rows`; rows of a thread
constexpr int kRoundPairs = 13;                         // pairs of taps that a block of `correlate` takes

/// The channels that the kernels give a head: the next of 32, 64 and 128.
constexpr int padded(std::int64_t head_dim) { return head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : 128; }

/// The norms of one row, (window, token). y is scaled before it is raised, to z = prescale * y; then
/// phi = factor * z^p. The numbers are prescale, factor, 1 / |z|^2 and 1 / |z^p|^2.
using RowNorms = float4;

/// The rows of a window: `prefix` tokens in their order, then the pixels of the window.
struct Rows {
  WindowGrid grid;
  int prefix;
  int tokens;  // of one window
};

/// q or k, and what its feature map reads.
struct Features {
  TokenArray x;
  Rows rows;
  FocusParams focus;  // key_bias: null for q
  RowNorms* norms;    // (windows, tokens)
  int heads, head_dim;
};

struct MeasureParams {
  Features sides[2];  // q, k
  std::int64_t rows[2];
};

/// `accumulate` sums two things over the tokens of a chunk: the outer products of a feature row and a row of
/// `other`, and the features themselves.
struct AccumulateParams {
  Features features;
  TokenArray other;  // v; or grad_out
  const float2*
      terms;          // null; or of each query and head 1 / denominator and grad_out . out, to get dS and dm
  int chunk, chunks;  // tokens of a chunk; chunks of a window
  float scale;        // of the sums
  float* partial;     // (windows, chunks, state of a window)
};

enum class Product {
  kOutput,         // out
  kQueryTerms,     // of each query and head 1 / denominator and grad_out . out; no tensor
  kValueGradient,  // dv, and of each key and head the scalar product of w and its gradient
};

struct MultiplyParams {
  Product product;
  Features features;
  const float* state;  // S and m, or their gradients, as in launch.h
  float eps;
  TokenArray out;     // or null
  TokenArray other;   // grad_out for kQueryTerms, v for kValueGradient
  float* terms;       // (windows, tokens, heads), two numbers for kQueryTerms, one for kValueGradient
  TokenArray pixels;  // what the taps read
  Floats weight, bias;
  bool per_channel, mirrored;
  int kernel_h, kernel_w;  // 0: no taps
  // A block takes a region: without taps `region_tokens` rows, with taps a rectangle of the window.
  int regions, regions_x, region_h, region_w, region_tokens;
};

struct DifferentiateParams {
  Features features;
  TokenArray other;    // grad_out; or v
  const float* state;  // S and m; or their gradients
  bool of_key;
  float eps;
  const float* terms;  // as `multiply` left them
  int chunk, chunks;
  TokenArray gradient;
  float* scale_partials;  // (windows, chunks, channels), or null
};

struct CorrelateParams {
  Rows rows;
  TokenArray pixels, grad_out;  // v
  int heads, head_dim;
  int kernel_h, kernel_w;
  int regions, regions_x, region_h, region_w;
  int windows;
  int blocks;  // that share the regions of a head
  bool per_channel;
  float* partials;  // (blocks, taps and bias, channels), or (blocks, heads, taps and bias, head_dim)
};

/// The kernels of one element type and padded head dimension; a unit each (units.txt).
struct Kernels {
  cudaError_t (*measure)(const MeasureParams&, cudaStream_t);
  cudaError_t (*accumulate)(const AccumulateParams&, int windows, cudaStream_t);
  int (*multiply_shared)(const MultiplyParams&);
  cudaError_t (*multiply)(const MultiplyParams&, int windows, cudaStream_t);
  cudaError_t (*differentiate)(const DifferentiateParams&, int windows, cudaStream_t);
  int (*correlate_shared)(const CorrelateParams&);
  cudaError_t (*correlate)(const CorrelateParams&, cudaStream_t);
};
template <Dtype kDtype, int kHeadDim>
const Kernels& kernels();

}  // namespace flatten::cuda::tensorcore::heads
