#define NB_ISA avxvnni
#define NB_VNNI 1
#define NB_BF16 0
#include "simd_avx2.h"
#include "forward.h"
