#define NB_ISA avx512vnni
#define NB_VNNI 1
#define NB_BF16 0
#include "simd_avx512.h"
#include "forward.h"
