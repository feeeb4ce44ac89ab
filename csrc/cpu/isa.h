// Which instruction sets the CPU kernels exist in, for `info`; implemented in dispatch.cpp.
#pragma once

#include <string>
#include <vector>

#include "../export.h"

namespace flatten::cpu {

/// "baseline", "avx2", "avx512" or "neon". Throws what kernels() would for a bad FLATTEN_CPU_ISA.
FLATTEN_API std::string isa_in_use();

/// The sets this CPU can run, least first.
FLATTEN_API std::vector<std::string> runnable_isas();

}  // namespace flatten::cpu
