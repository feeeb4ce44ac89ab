// How a call divides the scratch memory that it is given.
#pragma once

#include <cstdint>

namespace flatten::cuda {

/// Hands out a workspace front to back, in parts that start on 256 bytes. Without memory it only counts, so
/// that the function that lays a workspace out also measures it.
class Workspace {
 public:
  explicit Workspace(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

  template <class T = void>
  T* take(std::int64_t bytes) {
    char* at = memory_ && bytes > 0 ? memory_ + taken_ : nullptr;
    taken_ += (bytes + 255) / 256 * 256;
    return reinterpret_cast<T*>(at);
  }

  std::int64_t taken() const { return taken_; }

 private:
  char* memory_;
  std::int64_t taken_ = 0;
};

}  // namespace flatten::cuda
