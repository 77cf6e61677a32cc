#define LEVEL avx512_vbmi
#include "level.h"
