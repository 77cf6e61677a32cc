// One instruction-set level: every kernel, compiled with that level's instructions. Included by level_*.c only,
// which names it in LEVEL.
#include "table.h"

#include "ops_level.h"
#include "quant_level.h"

#define LEVEL_JOIN_(a, b) a##b
#define LEVEL_JOIN(a, b) LEVEL_JOIN_(a, b)
#define LEVEL_TEXT_(a) #a
#define LEVEL_TEXT(a) LEVEL_TEXT_(a)

const kernel_table LEVEL_JOIN(engine_level_, LEVEL) = {LEVEL_TEXT(LEVEL), &level_quant, &level_ops};
