#define FLATTEN_ISA avx2
#define FLATTEN_ISA_NAME "avx2"
#include "unit.h"
