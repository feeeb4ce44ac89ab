// Which kernels do a call: decided and planned here, once, for both directions.
#pragma once

#include <functional>
#include <string>

#include "launch.h"

namespace flatten::cuda {

/// One call, planned.
struct Call {
  const char* kernels = nullptr;      // what does it; null: an implementation that does not take it
  const char* why_general = nullptr;  // what kept the call from the tensor-core kernels; null: nothing did
  std::int64_t workspace_bytes = 0;
  /// As `launch` (launch.h), with a workspace of so many bytes.
  std::function<cudaError_t(void* workspace, cudaStream_t stream)> launch;

  explicit operator bool() const { return kernels != nullptr; }
};

/// Whether there are kernels for a call, in both directions; another runs in plain torch. The answer holds on
/// every device: heads that fit the shared memory of some GPUs alone are wider than any published model's,
/// and would only make results differ from GPU to GPU.
bool takes(const AttentionInputs& inputs);
bool takes(const ConvInputs& inputs);

Call choose(const AttentionForward& params, const Device& device);
Call choose(const AttentionBackward& params, const Device& device);
Call choose(const ConvForward& params, const Device& device);
Call choose(const ConvBackward& params, const Device& device);

/// A call in words: "flatten.attention: bfloat16 (2, 3136, 96), 3 heads, 64 windows".
std::string describe(const AttentionForward& params);
std::string describe(const AttentionBackward& params);
std::string describe(const ConvForward& params);
std::string describe(const ConvBackward& params);

/// Right for every call on every supported device, up to heads as wide as this.
namespace general {

/// Blocks keep m of a head in shared memory, beside 61,568 bytes in float64 (`BackwardShared::sums`) and
/// 58,320 in float with 7 x 7 taps (`BackwardShared::key`): this many channels, in blocks of 32, still fit
/// the 64 KiB of compute capability 7.5.
constexpr std::int64_t most_head_dim(Dtype dtype) { return dtype == Dtype::kFloat64 ? 480 : 1792; }

Call choose(const AttentionForward& params, const Device& device);
Call choose(const AttentionBackward& params, const Device& device);
Call choose(const ConvForward& params, const Device& device);
Call choose(const ConvBackward& params, const Device& device);
}  // namespace general

/// The tensor-core kernels for fp16 and bf16 on sm_80 and later.
namespace tensorcore {

/// Whether this library has them: a build for no architecture from 8.0 on leaves them out.
#ifdef FLATTEN_WITHOUT_TENSOR_CORES
constexpr bool kBuilt = false;
#else
constexpr bool kBuilt = true;
#endif

/// Whether they can run on the current device. A library for "7.5+PTX;8.6" runs on 8.0 too, but without them:
/// there is machine code of theirs for 8.6 alone.
cudaError_t find_image(bool* found);

/// A call that they do not take comes back without kernels, but with the reason.
Call choose(const AttentionForward& params, const Device& device);
Call choose(const AttentionBackward& params, const Device& device);

}  // namespace tensorcore
}  // namespace flatten::cuda
