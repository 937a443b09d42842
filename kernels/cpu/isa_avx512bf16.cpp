#define NB_ISA avx512bf16
#define NB_VNNI 1
#define NB_BF16 1
#include "simd_avx512.h"
#include "forward.h"
