#define NB_ISA neon
#include "simd_neon.h"
#include "forward.h"
