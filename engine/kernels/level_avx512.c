#define LEVEL avx512
#include "level.h"
