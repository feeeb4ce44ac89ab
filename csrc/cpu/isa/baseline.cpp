// What every processor of the architecture runs: SSE2 on x86-64, NEON on aarch64.
#define FLATTEN_ISA baseline
#if defined(__aarch64__)
#define FLATTEN_ISA_NAME "neon"
#else
#define FLATTEN_ISA_NAME "baseline"
#endif
#include "unit.h"
