#include "workspace.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace flatten::cpu {
namespace {

class Buffer {
 public:
  void* at_least(std::size_t bytes) {
    if (bytes > size_) {
      const std::size_t rounded = (bytes + 4095) / 4096 * 4096;  // whole pages, so that it seldom grows
      memory_.reset();
      size_ = 0;
      memory_.reset(std::aligned_alloc(64, rounded));
      if (!memory_) throw std::bad_alloc();
      size_ = rounded;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  std::size_t size_ = 0;
};

}  // namespace

void* thread_workspace(std::size_t bytes) {
  thread_local Buffer buffer;
  return buffer.at_least(bytes);
}

void* shared_workspace(std::size_t bytes) {
  thread_local Buffer buffer;
  return buffer.at_least(bytes);
}

}  // namespace flatten::cpu
