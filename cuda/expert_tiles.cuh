// What the kernels share that compute experts for many tokens: the choices of a step, sorted by expert and cut into tiles.
//
// A choice is a place in the router's ids: token * n_used + rank. `places` says for each expert where its matrices are:
// slot 0 and up; -2 and down: the (-2 - place)-th of the experts that pass through the staging buffers, `at_once` of them
// at a time; -1: not here, somebody else computes it. Group 0 are the experts in slots, group 1 + i the i-th batch of those
// that pass through. The tiles of a group follow one another.
#pragma once

#include "experts.cuh"
#include "tile_sizes.cuh"

struct ExpertTile {
    int expert;
    int place;    // slot, or position in the staging buffer
    int first, n; // choices, of the sorted ones
};

DEVICE int group_of(int place, int at_once) { return place >= 0 ? 0 : place == -1 ? -1 : 1 + (-2 - place) / at_once; }

// Puts the addresses of a tile's activation rows into shared memory; row(choice) gives them. Whole block.
template <class Row> DEVICE void set_rows(const uint8_t **rows, const ExpertTile &tile, const int *choices, Row row) {
    if (threadIdx.x < TILE_TOKENS)
        rows[threadIdx.x] = row(choices[tile.first + min((int)threadIdx.x, tile.n - 1)]);
}
