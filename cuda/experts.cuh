// What both halves of the experts' feed-forward network share: where the matrices of the resident experts lie.
#pragma once

#include "rows.cuh"

// One matrix of every slot.
struct ExpertMatrix {
    const uint8_t *slots; // the matrix in slot 0
    int64_t slot_bytes;   // from one slot to the next
    int64_t row_bytes;
    const float *scale; // [n_experts] or null
    const float *bias;  // [n_experts, rows] or null
};

// One of two, value by value: a reference to either would make copies of both in slow memory.
DEVICE ExpertMatrix one_of(bool is_first, const ExpertMatrix &a, const ExpertMatrix &b) {
    return {is_first ? a.slots : b.slots, is_first ? a.slot_bytes : b.slot_bytes, is_first ? a.row_bytes : b.row_bytes,
            is_first ? a.scale : b.scale, is_first ? a.bias : b.bias};
}

// A row's product as the projection gives it: times the expert's scale, plus the row's bias.
DEVICE float projected(float value, const ExpertMatrix &matrix, int expert, int n_rows, int row) {
    if (matrix.scale)
        value *= matrix.scale[expert];
    if (matrix.bias)
        value += matrix.bias[(int64_t)expert * n_rows + row];
    return value;
}

// Which expert of which token a block works at. A shared expert comes after the last rank; its matrices are in slot 0 of
// their own.
struct Choice {
    int token, rank, place; // place: in the ids of all tokens
    bool is_shared;

    __device__ __forceinline__ Choice(int n_used, bool has_shared)
        : token(blockIdx.y / (n_used + has_shared)), rank(blockIdx.y % (n_used + has_shared)),
          place(token * n_used + rank), is_shared(rank == n_used) {}

    __device__ __forceinline__ int expert(const int *ids) const { return is_shared ? 0 : ids[place]; }

    // Of the expert; -1: no slot, or an id below 0.
    __device__ __forceinline__ int slot(int expert, const int *slots) const {
        return is_shared ? 0 : expert < 0 ? -1 : slots[expert];
    }
};

// How the two projections are joined: 0 silu(g) * u, with a `limit` above 0 clamped, see `graph.Experts`; 1 the clamped
// swish of gpt-oss; 2 max(g, 0) * u; 3 silu(g) * u with g up to the limit and u within it of 0; 4 gelu(g) * u; 5 SiTU, in
// which u has a limit of its own.
DEVICE float activated(int kind, float limit, float up_limit, float gate, float up) {
    if (kind == 0 && limit > 0.0f) {
        const float factor = silu(gate);
        return (factor < limit ? factor : limit) * within(up, limit);
    }
    if (kind == 0)
        return silu(gate) * up;
    if (kind == 3)
        return silu(gate < limit ? gate : limit) * within(up, limit);
    if (kind == 2)
        return (gate > 0.0f ? gate : 0.0f) * up;
    if (kind == 4)
        return gelu(gate) * up;
    if (kind == 5)
        return situ(gate, up, limit, up_limit);
    return clamped_swish(gate, up);
}
