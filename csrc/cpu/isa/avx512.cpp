// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl and the flags of AVX2.
#define FLATTEN_ISA avx512
#define FLATTEN_ISA_NAME "avx512"
#include "unit.h"
