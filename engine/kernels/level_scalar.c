#define LEVEL scalar
#include "level.h"
