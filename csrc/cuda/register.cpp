// The operators on CUDA: check, allocate, enqueue on the current stream.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../operators.h"
#include "../torch_errors.h"
#include "choose.h"
#include "launch_error.h"
#include "level.h"

namespace flatten::cuda {
namespace {

/// CUDA's own words for an error.
std::string message_of(cudaError_t error) {
  char* message = nullptr;
  torch_c10_cuda_check_msg(static_cast<std::int32_t>(error), __FILE__, __func__, __LINE__, true, &message);
  std::string text = message ? message : cudaGetErrorString(error);
  if (message) torch_c10_cuda_free_error_msg(message);
  return text;
}

/// Compute capabilities (10 * major + minor) on whose GPUs all tests passed. Elsewhere the kernels ran under
/// an emulator alone.
constexpr std::initializer_list<int> kSeenOnHardware = {};

/// Says so once, of the current device, when it is first used.
void warn_of_unseen_hardware(std::int32_t index) {
  static std::atomic<std::uint64_t> told{0};
  const std::uint64_t bit = std::uint64_t{1} << (index & 63);
  if ((told.load(std::memory_order_relaxed) & bit) || (told.fetch_or(bit) & bit)) return;
  int major = 0, minor = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  if (std::count(kSeenOnHardware.begin(), kSeenOnHardware.end(), 10 * major + minor)) return;
  const std::string text =
      "flatten_ext's CUDA kernels were validated by emulation only, never on a GPU of compute capability " +
      std::to_string(major) + "." + std::to_string(minor) +
      " such as this. `flatten-ext check --device cuda` tells whether they are right here, and what to set "
      "where "
      "they are not.";
  aoti_torch_warn(__func__, __FILE__, __LINE__, text.c_str());
}

struct Cuda {
  static constexpr bool kHasStates = false;

  static void check_values(const char*, const AttentionInputs&) {}  // reading them would wait for the device

  template <class Inputs>
  static bool takes(const Inputs& in) {
    return cuda::takes(in);
  }

  /// Makes the tensors' device current and enqueues the call on its current stream. The workspace goes back
  /// to torch's allocator at once, which hands it out again only to later work of the same stream.
  template <class Params>
  static void run(const Params& params, const Tensor& on_device) {
    const std::int32_t index = on_device.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(index);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    warn_of_unseen_hardware(index);
    Device device;
    STD_CUDA_CHECK(current_device(&device));
    const Call call = choose(params, device);
    const Tensor workspace = empty_on_device_of(on_device, {(call.workspace_bytes + 7) / 8}, Dtype::kFloat64);
    failed_launch() = nullptr;
    const cudaError_t error = call.launch(workspace.mutable_data_ptr(), static_cast<cudaStream_t>(stream));
    if (error == cudaSuccess) return;
    const std::string kernel = failed_kernel();
    throw std::runtime_error(describe(params) + ": the launch of " +
                             (kernel.empty() ? call.kernels : kernel) + " failed. " +
                             variable_against(call.kernels) + " goes on without these kernels; " +
                             "`flatten-ext check --device cuda` tries them all.\n" + message_of(error));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flatten, CUDA, m) { Operators<Cuda>::register_in(m); }

}  // namespace flatten::cuda
