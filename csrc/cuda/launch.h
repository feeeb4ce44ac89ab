// What any host asks of the CUDA kernels: torch-free, so that kernels and their callers meet at plain
// structs. Each of these functions chooses kernels and plans the call (choose.h). A host that wants both, as
// register.cpp does, calls `choose` itself and has it done once.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../params.h"

namespace flatten::cuda {

constexpr int kLeastCapability = 75;  // what the general kernels are compiled for at the least

/// The device a call runs on: what schedules depend on.
struct Device {
  int multiprocessors = 1;
  int compute_capability =
      kLeastCapability;                   // 10 * major + minor; no more than what the library was built for
  std::int64_t shared_bytes = 48 * 1024;  // a block's limit after opt-in
};

/// Properties of the current device, read once per device and process; safe during stream capture.
cudaError_t current_device(Device* device);

// `state` on CUDA, in the accumulate dtype, per (image, window), window major inside the image:
//   S[c][j] = sum over keys of K[c] * V[head(c) * D + j] / M     C x D, row c = head * D + i
//   m[c]    = mean over keys of K[c]                             C
// K is phi(k + key_bias). Every implementation writes and reads this layout.

/// Scratch bytes one call needs; the host allocates them (256-byte aligned, uninitialised) and passes
/// them to `launch` as `workspace`, which may be null when the answer is 0.
std::int64_t workspace_bytes(const AttentionForward& params, const Device& device);
std::int64_t workspace_bytes(const AttentionBackward& params, const Device& device);
std::int64_t workspace_bytes(const ConvForward& params, const Device& device);
std::int64_t workspace_bytes(const ConvBackward& params, const Device& device);

/// Enqueues the whole call on `stream`. Never synchronises, never allocates: safe in a CUDA graph. Every
/// requested output is written completely. Returns the first error of a launch.
cudaError_t launch(const AttentionForward& params, const Device& device, void* workspace,
                   cudaStream_t stream);
cudaError_t launch(const AttentionBackward& params, const Device& device, void* workspace,
                   cudaStream_t stream);
cudaError_t launch(const ConvForward& params, const Device& device, void* workspace, cudaStream_t stream);
cudaError_t launch(const ConvBackward& params, const Device& device, void* workspace, cudaStream_t stream);

}  // namespace flatten::cuda
