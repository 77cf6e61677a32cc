// Facts about weight formats and activation rows that do not depend on the instruction set.
#include "activations.h"
#include "blocks.h"
#include "table.h"

#define FACTS(NAME, TYPE, SIZE, BYTES, ACTIVATION) [TYPE] = {SIZE, BYTES, ACTIVATION_##ACTIVATION},
const format_facts engine_formats[N_GGML_TYPES] = {EACH_FORMAT(FACTS)};

int64_t engine_activation_bytes(int activation, int n_cols) {
    if (activation == ACTIVATION_F32)
        return round_up_64((int64_t)n_cols * (int64_t)sizeof(float));
    return activation_sums_offset(activation, n_cols) + round_up_64(n_cols / 16 * (int64_t)sizeof(int16_t));
}
