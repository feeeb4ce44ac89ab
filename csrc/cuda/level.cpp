#include "level.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace flatten::cuda {
namespace {

constexpr const char* kNames[] = {"reference", "general", "tensorcore"};

/// As FLATTEN_CUDA says, or -1.
int level_of_environment() {
  const char* asked = std::getenv("FLATTEN_CUDA");
  if (!asked || !*asked) return static_cast<int>(Level::kTensorCore);
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(asked, kNames[i]) == 0) return i;
  }
  return -1;
}

std::atomic<int>& current() {
  static std::atomic<int> level{level_of_environment()};
  return level;
}

}  // namespace

Level level() {
  const int now = current().load(std::memory_order_relaxed);
  if (now < 0) {
    throw std::runtime_error(std::string("FLATTEN_CUDA is \"") + std::getenv("FLATTEN_CUDA") +
                             "\", expected tensorcore, general or reference");
  }
  return static_cast<Level>(now);
}

const char* variable_against(const char* kernels) {
  return std::strncmp(kernels, "tensorcore", 10) == 0 ? "FLATTEN_CUDA=general" : "FLATTEN_CUDA=reference";
}

}  // namespace flatten::cuda

int flatten_cuda_level(int level) {
  auto& current = flatten::cuda::current();
  return level < 0 || level > 2 ? current.load() : current.exchange(level);
}
