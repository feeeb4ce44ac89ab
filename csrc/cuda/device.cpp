// What schedules depend on, read once per device.
#include <algorithm>
#include <atomic>
#include <mutex>

#include "choose.h"

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

}  // namespace flatten::cuda
