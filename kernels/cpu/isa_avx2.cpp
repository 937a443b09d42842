#define NB_ISA avx2
#define NB_VNNI 0
#define NB_BF16 0
#include "simd_avx2.h"
#include "forward.h"
