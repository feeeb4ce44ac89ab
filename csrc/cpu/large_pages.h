// Large pages for the results of a call on the CPU.
#pragma once

#include <cstdint>

namespace flatten::cpu {

/// Asks for large pages for a new block of memory. A hint: where the system has none, nothing changes.
void prefer_large_pages(void* data, std::int64_t bytes);

}  // namespace flatten::cpu
