// The tensor-core kernels for fp16 and bf16 on sm_80 and later: what they take, and how they are launched.
// Everything else is the general implementation's (launch.h).
#pragma once

#include "launch.h"

namespace flatten::cuda::tensorcore {

/// Head dimensions 16, 32, 64 and 128 in channels that are a multiple of 32, up to 384 (256 from head
/// dimension 64 on); no prefix tokens; taps absent or square of 3, 5 or 7; rows aligned to 16 bytes.
bool takes(const AttentionForward& params, const Device& device);
std::int64_t workspace_bytes(const AttentionForward& params, const Device& device);
cudaError_t launch(const AttentionForward& params, const Device& device, void* workspace,
                   cudaStream_t stream);

}  // namespace flatten::cuda::tensorcore
