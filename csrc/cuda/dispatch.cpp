// Which implementation takes a call. A tensor-core implementation declares `takes`, `workspace_bytes` and
// `launch` for a params struct in its own header and is asked here before the general one.
#include <map>
#include <mutex>

#include "launch.h"
#include "tensorcore.h"

namespace flatten::cuda {

cudaError_t current_device(Device* device) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  int index = 0;
  if (cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(index); found != known.end()) {
    *device = found->second;
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
  *device = known[index] = {count, 10 * major + minor, shared};
  return cudaSuccess;
}

std::int64_t workspace_bytes(const AttentionForward& params, const Device& device) {
  if (tensorcore::takes_windows(params, device)) return 0;
  if (tensorcore::takes(params, device)) return tensorcore::workspace_bytes(params, device);
  return general::workspace_bytes(params, device);
}

cudaError_t launch(const AttentionForward& params, const Device& device, void* workspace,
                   cudaStream_t stream) {
  if (tensorcore::takes_windows(params, device)) return tensorcore::launch_windows(params, stream);
  if (tensorcore::takes(params, device)) return tensorcore::launch(params, device, workspace, stream);
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
