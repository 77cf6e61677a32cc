// Products with few tokens on vector levels: four weight rows at a time against one activation row. Four rows share the
// activation loads, and give the horizontal sums and the chain of fused multiply-adds four lanes to work on.
#ifndef ENGINE_DECODE_H
#define ENGINE_DECODE_H

#include "decode256.h"
#include "decode512.h"

#endif
