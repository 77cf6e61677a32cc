// One instruction-set level: every kernel, compiled with that level's instructions. Included by level_*.c only,
// which names it in LEVEL, and in OPS_OF the level whose operations it takes over, if its own would be no different.
#include "table.h"

#define LEVEL_JOIN_(a, b) a##b
#define LEVEL_JOIN(a, b) LEVEL_JOIN_(a, b)
#define LEVEL_TEXT_(a) #a
#define LEVEL_TEXT(a) LEVEL_TEXT_(a)

#include "quant_level.h"
#ifdef OPS_OF
#define LEVEL_OPS LEVEL_JOIN(engine_ops_, OPS_OF)
extern const struct ops_table LEVEL_OPS;
#else
#define LEVEL_OPS LEVEL_JOIN(engine_ops_, LEVEL)
#include "ops_level.h"
#endif

const kernel_table LEVEL_JOIN(engine_level_, LEVEL) = {LEVEL_TEXT(LEVEL), &level_quant, &LEVEL_OPS};
