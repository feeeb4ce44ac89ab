#define FLATTEN_ISA avx512
#define FLATTEN_ISA_NAME "avx512"
#include "unit.h"
