#define LEVEL avx2
#include "level.h"
