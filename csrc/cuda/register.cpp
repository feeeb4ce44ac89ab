// The operators on CUDA: check, allocate, enqueue on the current stream.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "../operators.h"
#include "../torch_errors.h"
#include "choose.h"

namespace flatten::cuda {
namespace {

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
    Device device;
    STD_CUDA_CHECK(current_device(&device));
    const Call call = choose(params, device);
    const Tensor workspace = empty_on_device_of(on_device, {(call.workspace_bytes + 7) / 8}, Dtype::kFloat64);
    STD_CUDA_CHECK(call.launch(workspace.mutable_data_ptr(), static_cast<cudaStream_t>(stream)));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flatten, CUDA, m) { Operators<Cuda>::register_in(m); }

}  // namespace flatten::cuda
