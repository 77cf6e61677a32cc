#define LEVEL avx512_vbmi
#define OPS_OF avx512
#include "level.h"
