// Which kernel's launch failed, for the error that the caller sees.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace flatten::cuda {

/// What noted() was last told in this host thread, or null.
inline const char*& failed_launch() {
  thread_local const char* function = nullptr;
  return function;
}

/// Passes the error of a launch on, and notes an error's place. `function` is the __PRETTY_FUNCTION__ of
/// enqueue(), which names the kernel among its template arguments, or of a function that launches one kernel.
inline cudaError_t noted(cudaError_t error, const char* function) {
  if (error != cudaSuccess) failed_launch() = function;
  return error;
}

/// "flatten::cuda::general::attend<float, 5>"; empty where no launch failed.
inline std::string failed_kernel() {
  const std::string function = failed_launch() ? failed_launch() : "";
  const std::string before = "kKernel = ";
  const std::size_t at = function.find(before);
  if (at == std::string::npos) return function;
  std::string name = function.substr(at + before.size());
  name = name.substr(0, name.find_first_of(";]"));
  return name.find_first_of("(&") == 0 ? name.substr(name.find_first_not_of("(& ")) : name;
}

}  // namespace flatten::cuda
