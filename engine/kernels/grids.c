#include "grids.h"

#include <string.h>

_Alignas(64) int8_t engine_grid_iq2_xxs[256][8];
_Alignas(64) int8_t engine_grid_iq2_xs[512][8];
_Alignas(64) int8_t engine_grid_iq2_s[1024][8];
_Alignas(64) int8_t engine_grid_iq3_xxs[256][4];
_Alignas(64) int8_t engine_grid_iq3_s[512][4];
_Alignas(64) int8_t engine_grid_iq1[2048][8];

int engine_set_grid(const char *format, const int8_t *values, size_t n_bytes) {
    const struct {
        const char *format;
        void *grid;
        size_t n_bytes;
    } grids[] = {
        {"IQ2_XXS", engine_grid_iq2_xxs, sizeof engine_grid_iq2_xxs},
        {"IQ2_XS", engine_grid_iq2_xs, sizeof engine_grid_iq2_xs},
        {"IQ2_S", engine_grid_iq2_s, sizeof engine_grid_iq2_s},
        {"IQ3_XXS", engine_grid_iq3_xxs, sizeof engine_grid_iq3_xxs},
        {"IQ3_S", engine_grid_iq3_s, sizeof engine_grid_iq3_s},
        {"IQ1_S", engine_grid_iq1, sizeof engine_grid_iq1},
        {"IQ1_M", engine_grid_iq1, sizeof engine_grid_iq1},
    };
    for (size_t i = 0; i < sizeof grids / sizeof *grids; i++)
        if (!strcmp(format, grids[i].format) && n_bytes == grids[i].n_bytes) {
            memcpy(grids[i].grid, values, n_bytes);
            return 0;
        }
    return -1;
}
