// Which implementation takes a call. A tensor-core implementation declares `takes`, `workspace_bytes` and
// `launch` for a params struct in its own header and is asked here before the general one.
#include <algorithm>
#include <atomic>
#include <mutex>

#include "launch.h"
#include "tensorcore.h"

namespace flatten::cuda {

namespace {

cudaError_t properties_of(int index, Device* device) {
  int count = 0, major = 0, minor = 0, shared = 0;
  cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  bool tensor_cores = false;
  if constexpr (tensorcore::kBuilt) {
    if (error == cudaSuccess) error = tensorcore::find_image(&tensor_cores);
  }
  if (error != cudaSuccess) return error;
  const int capability = 10 * major + minor;
  *device = {count, tensor_cores ? capability : std::min(capability, kLeastCapability), shared};
  return cudaSuccess;
}

}  // namespace

cudaError_t current_device(Device* device) {
  struct Known {
    std::atomic<bool> ready{false};
    Device device;
  };
  static Known known[64];
  static std::mutex mutex;
  int index = 0;
  if (cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return error;
  if (index >= 64) return properties_of(index, device);
  Known& here = known[index];
  if (!here.ready.load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!here.ready.load(std::memory_order_relaxed)) {
      if (cudaError_t error = properties_of(index, &here.device); error != cudaSuccess) return error;
      here.ready.store(true, std::memory_order_release);
    }
  }
  *device = here.device;
  return cudaSuccess;
}

std::int64_t workspace_bytes(const AttentionForward& params, const Device& device) {
  if constexpr (tensorcore::kBuilt) {
    if (tensorcore::takes_windows(params, device)) return 0;
    if (tensorcore::takes(params, device)) return tensorcore::workspace_bytes(params, device);
  }
  return general::workspace_bytes(params, device);
}

cudaError_t launch(const AttentionForward& params, const Device& device, void* workspace,
                   cudaStream_t stream) {
  if constexpr (tensorcore::kBuilt) {
    if (tensorcore::takes_windows(params, device)) return tensorcore::launch_windows(params, stream);
    if (tensorcore::takes(params, device)) return tensorcore::launch(params, device, workspace, stream);
  }
  return general::launch(params, device, workspace, stream);
}

std::int64_t workspace_bytes(const AttentionBackward& params, const Device& device) {
  return general::workspace_bytes(params, device);
}

cudaError_t launch(const AttentionBackward& params, const Device& device, void* workspace,
                   cudaStream_t stream) {
  return general::launch(params, device, workspace, stream);
}

std::int64_t workspace_bytes(const ConvForward& params, const Device& device) {
  return general::workspace_bytes(params, device);
}

cudaError_t launch(const ConvForward& params, const Device& device, void* workspace, cudaStream_t stream) {
  return general::launch(params, device, workspace, stream);
}

std::int64_t workspace_bytes(const ConvBackward& params, const Device& device) {
  return general::workspace_bytes(params, device);
}

cudaError_t launch(const ConvBackward& params, const Device& device, void* workspace, cudaStream_t stream) {
  return general::launch(params, device, workspace, stream);
}

}  // namespace flatten::cuda
