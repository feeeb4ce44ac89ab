// Memory the kernels work in, kept from call to call: a kernel that ran once on a thread allocates no more.
#pragma once

#include <cstddef>

namespace flatten::cpu {

/// At least `bytes` bytes of the calling thread, 64-byte aligned, valid until it asks again.
void* thread_workspace(std::size_t bytes);

/// The same for what the threads of one call share: asked for by the thread that calls the kernel.
void* shared_workspace(std::size_t bytes);

}  // namespace flatten::cpu
