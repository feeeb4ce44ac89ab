// The tensor-core kernels for fp16 and bf16 on sm_80 and later: what they take, and how they are launched.
// Everything else is the general implementation's (launch.h).
#pragma once

#include "launch.h"

namespace flatten::cuda::tensorcore {

/// Whether this library has them: a build for no architecture from 8.0 on leaves them out.
#ifdef FLATTEN_WITHOUT_TENSOR_CORES
constexpr bool kBuilt = false;
#else
constexpr bool kBuilt = true;
#endif

/// Whether they can run on the current device. A library for "7.5+PTX;8.6" runs on 8.0 too, but without them:
/// there is machine code of theirs for 8.6 alone.
cudaError_t find_image(bool* found);

/// Head dimensions 16, 32, 64 and 128 in channels that are a multiple of 32, up to 384 (256 from head
/// dimension 64 on); no prefix tokens; taps absent or square of 3, 5 or 7; rows aligned to 16 bytes.
bool takes(const AttentionForward& params, const Device& device);
std::int64_t workspace_bytes(const AttentionForward& params, const Device& device);
cudaError_t launch(const AttentionForward& params, const Device& device, void* workspace,
                   cudaStream_t stream);

/// S and m of every window alone, one block each, for a backward pass that was not given them: where windows
/// are small. The call is one that `takes` (backward).
cudaError_t launch_state(const AttentionInputs& params, float* state, const Device& device,
                         cudaStream_t stream);

/// Focused attention, where the gradients of q, k and v are all asked for; otherwise as forward, but up to
/// 256 channels only (384 in heads of 32 where windows are small), what shared memory holds of heads of 128,
/// and no 7 x 7 taps from head dimension 64 on. The gradients of 7 x 7 taps and the sums of the partial
/// gradients of parameters are the general implementation's.
bool takes(const AttentionBackward& params, const Device& device);

/// Rows of partial results.
struct BackwardRows {
  int chunks;           // of each window's queries: gradients of its state
  bool state_gradient;  // is kept in memory
  std::int64_t scale;
  std::int64_t taps;  // 0: the kernels do not sum the gradients of the call's taps
};
BackwardRows backward_rows(const AttentionBackward& params, const Device& device);

struct BackwardBuffers {
  const float* state;
  float* state_gradient;           // (windows, state), over M
  float* state_gradient_partials;  // (windows, chunks of queries, state); unused for one chunk
  float* scale_partials;           // (rows, channel), or null
  float* tap_partials;             // (rows, taps and then the bias, channel or head_dim), or null
};
cudaError_t launch(const AttentionBackward& params, const Device& device, const BackwardBuffers& buffers,
                   cudaStream_t stream);

/// Small windows in one launch (forward_window.cpp): head dimensions 16, 32 and 64; up to 256 tokens; no
/// taps, 3 x 3 or 5 x 5.
bool takes_windows(const AttentionForward& params, const Device& device);
cudaError_t launch_windows(const AttentionForward& params, cudaStream_t stream);

}  // namespace flatten::cuda::tensorcore
