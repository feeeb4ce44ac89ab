// Which implementation takes a call. A tensor-core implementation declares `takes`, `workspace_bytes` and
// `launch` for a params struct in its own header and is asked here before the general one.
#include <atomic>

#include "launch.h"

namespace flatten::cuda {
namespace {

constexpr int kMaxDevices = 64;

}  // namespace

cudaError_t current_device(Device* device) {
  static Device known[kMaxDevices];
  static std::atomic<bool> filled[kMaxDevices];
  int index = 0;
  if (cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return error;
  if (index < kMaxDevices && filled[index].load(std::memory_order_acquire)) {
    *device = known[index];
    return cudaSuccess;
  }
  int count = 0, major = 0, minor = 0, shared = 0;
  cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  if (error != cudaSuccess) return error;
  *device = Device{count, 10 * major + minor, shared};
  // Two threads may both come here: they write the same values.
  if (index < kMaxDevices) {
    known[index] = *device;
    filled[index].store(true, std::memory_order_release);
  }
  return cudaSuccess;
}

std::int64_t workspace_bytes(const AttentionForward& params, const Device& device) {
  return general::workspace_bytes(params, device);
}

cudaError_t launch(const AttentionForward& params, const Device& device, void* workspace, cudaStream_t stream) {
  return general::launch(params, device, workspace, stream);
}

std::int64_t workspace_bytes(const AttentionBackward& params, const Device& device) {
  return general::workspace_bytes(params, device);
}

cudaError_t launch(const AttentionBackward& params, const Device& device, void* workspace, cudaStream_t stream) {
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
