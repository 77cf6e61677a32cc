#include "grids.h"

#include <string.h>

_Alignas(64) int8_t engine_grid_iq2_xxs[256][8];
_Alignas(64) int8_t engine_grid_iq2_xs[512][8];
_Alignas(64) int8_t engine_grid_iq2_s[1024][8];
_Alignas(64) int8_t engine_grid_iq1[2048][8];
_Alignas(64) struct engine_grid_of_4 engine_grid_iq3_xxs, engine_grid_iq3_s;
packed_grid engine_packed_iq2_xxs, engine_packed_iq2_xs, engine_packed_iq2_s, engine_packed_iq3_xxs,
    engine_packed_iq3_s, engine_packed_iq1;

// The unsigned weight that a value and a minus stand for.
typedef int weight_fn(int value, int is_minus);
static int signed_weight(int value, int is_minus) { return 128 + (is_minus ? -value : value); }
static int shifted_weight(int value, int is_minus) { return 9 + 8 * value + (is_minus ? -1 : 1); } // iq1.h

static int pack(const int8_t *values, size_t n_bytes, int n_values, weight_fn *weight, packed_grid *out) {
    const int code_bits = n_values == 8 ? 2 : 3;
    int code_of[256] = {0}, n_codes = 0;
    uint8_t is_used[256] = {0};
    for (size_t i = 0; i < n_bytes; i++)
        is_used[values[i] + 128] = 1;
    for (int v = 0; v < 256; v++)
        if (is_used[v])
            code_of[v] = n_codes++;
    if (n_codes > 1 << code_bits)
        return -1;
    for (int v = 0; v < 256; v++)
        for (int shift = 0; is_used[v] && shift <= 3; shift += 3)
            for (int i = 0; i < 64; i++)
                if ((i >> shift & ((1 << code_bits) - 1)) == code_of[v])
                    out->weights[shift / 3][i] = (uint8_t)weight(v - 128, i >> shift >> code_bits & 1);
    for (size_t p = 0; p < n_bytes / (size_t)n_values; p++) {
        int codes = 0;
        for (int i = 0; i < n_values; i++) {
            const int code = code_of[values[p * (size_t)n_values + (size_t)i] + 128];
            codes |= n_values == 8 ? (code & 1) << i | code >> 1 << (8 + i) : code << 3 * i;
        }
        out->bytes[0][p] = (uint8_t)codes;
        out->bytes[1][p] = (uint8_t)(codes >> 8);
    }
    return 0;
}

int engine_set_grid(const char *format, const int8_t *values, size_t n_bytes) {
    const struct {
        const char *format;
        void *grid;
        size_t n_bytes;
        int n_values;
        weight_fn *weight;
        packed_grid *packed;
    } grids[] = {
        {"IQ2_XXS", engine_grid_iq2_xxs, sizeof engine_grid_iq2_xxs, 8, signed_weight, &engine_packed_iq2_xxs},
        {"IQ2_XS", engine_grid_iq2_xs, sizeof engine_grid_iq2_xs, 8, signed_weight, &engine_packed_iq2_xs},
        {"IQ2_S", engine_grid_iq2_s, sizeof engine_grid_iq2_s, 8, signed_weight, &engine_packed_iq2_s},
        {"IQ3_XXS", engine_grid_iq3_xxs.points, 256 * 4, 4, signed_weight, &engine_packed_iq3_xxs},
        {"IQ3_S", engine_grid_iq3_s.points, 512 * 4, 4, signed_weight, &engine_packed_iq3_s},
        {"IQ1_S", engine_grid_iq1, sizeof engine_grid_iq1, 8, shifted_weight, &engine_packed_iq1},
        {"IQ1_M", engine_grid_iq1, sizeof engine_grid_iq1, 8, shifted_weight, &engine_packed_iq1},
    };
    for (size_t i = 0; i < sizeof grids / sizeof *grids; i++)
        if (!strcmp(format, grids[i].format) && n_bytes == grids[i].n_bytes) {
            if (pack(values, n_bytes, grids[i].n_values, grids[i].weight, grids[i].packed))
                return -1;
            memcpy(grids[i].grid, values, n_bytes);
            if (grids[i].weight == shifted_weight)
                for (size_t j = 0; j < n_bytes; j++)
                    ((int8_t *)grids[i].grid)[j] = (int8_t)(8 * values[j] + 9);
            return 0;
        }
    return -1;
}
