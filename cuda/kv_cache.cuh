// The cache of keys and values of a layer: how it is laid out, and how eight values are read and a head is written.
//
// Compiled for KV_TYPE (0 float32, 1 float16, 2 int8 with a float16 scale for each 32 values), KEY_DIM and VALUE_DIM (of
// a head) and SHARED (1: there are no values of their own, a head's value is the first VALUE_DIM values of its key). A cache
// holds K and then V, each [n_slots, n_rows, n_kv_heads, KEY_DIM or VALUE_DIM] of its type, and for int8 then the
// scales of K and of V, [n_slots, n_rows, n_kv_heads, ceil(dim / 32)].
#pragma once

#include "common.cuh"

constexpr int VECTOR = 8;                    // values that a lane reads at once
constexpr int PLANES = KV_TYPE == 0 ? 2 : 1; // float16 numbers whose sum is a value

// Two float32 values as float16 numbers, and what these miss of them as two more: 22 bits together.
DEVICE void split_halves(float x, float y, unsigned &near, unsigned &rest) {
    near = f32_to_f16x2(x, y);
    rest = f32_to_f16x2(x - f16_to_f32((uint16_t)near), y - f16_to_f32((uint16_t)(near >> 16)));
}

// c += a * b for two float16 numbers of a and, where there are two, of b: those of queries or weights, and of keys or values.
DEVICE void add_products(float (&c)[4], const unsigned (&a)[2][4], const unsigned (&b)[PLANES][4], int half) {
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) {
        const unsigned of_b[2] = {b[plane][2 * half], b[plane][2 * half + 1]};
        mma_m16n8k16_f16(c, a[0], of_b);
        if (plane == 0)
            mma_m16n8k16_f16(c, a[1], of_b);
    }
}

// VECTOR values as they are stored. All zero bits are zeros.
struct Piece {
#if KV_TYPE == 0
    float4 low, high;
#elif KV_TYPE == 1
    uint4 halves;
#else
    uint2 bytes;
    uint16_t scale;
#endif

    // As float16 numbers to shared memory, 16-byte aligned; what these miss of float32 `plane_size` numbers behind.
    __device__ __forceinline__ void put(uint16_t *to, int plane_size) const {
#if KV_TYPE == 0
        const float x[VECTOR] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        unsigned near[4], rest[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            split_halves(x[2 * i], x[2 * i + 1], near[i], rest[i]);
        *(uint4 *)to = make_uint4(near[0], near[1], near[2], near[3]);
        *(uint4 *)(to + plane_size) = make_uint4(rest[0], rest[1], rest[2], rest[3]);
#elif KV_TYPE == 1
        *(uint4 *)to = halves;
#else
        // 0x64 above a byte b + 128 is the float16 number 1152 + b: minus 1152, exactly, and times the scale, rounded.
        const unsigned words[2] = {bytes.x ^ 0x80808080u, bytes.y ^ 0x80808080u}, d = scale * 0x10001u;
        unsigned out[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned pair = __byte_perm(words[i / 2], 0x64646464u, i % 2 ? 0x4342 : 0x4140);
            out[i] = mul_f16x2(add_f16x2(pair, 0xe480e480u), d);
        }
        *(uint4 *)to = make_uint4(out[0], out[1], out[2], out[3]);
#endif
    }
};

// Keys or values, of DIM values each, of all positions of one sequence and one head.
template <int DIM> struct Side {
    static constexpr int N_SCALES = (DIM + 31) / 32;
    uint8_t *values;  // of row 0
    uint16_t *scales; // likewise
    int n_kv_heads, n_rows;

    __device__ __forceinline__ int row_of(int position) const { return position < n_rows ? position : position % n_rows; }

    // Values i to i + VECTOR - 1 of a row; i is a multiple of VECTOR.
    __device__ __forceinline__ Piece load(int row, int i) const {
        const int64_t head = (int64_t)row * n_kv_heads;
#if KV_TYPE == 0
        const float4 *from = (const float4 *)((const float *)values + head * DIM + i);
        return {from[0], from[1]};
#elif KV_TYPE == 1
        return {*(const uint4 *)((const uint16_t *)values + head * DIM + i)};
#else
        return {*(const uint2 *)(values + head * DIM + i), scales[head * N_SCALES + i / 32]};
#endif
    }

    // Writes what is in shared memory to a row, by a warp.
    __device__ __forceinline__ void store(int row, const float *x) const {
        const int64_t head = (int64_t)row * n_kv_heads;
        for (int first = 0; first < DIM; first += WARP) {
            const int i = first + threadIdx.x % WARP;
            const float value = i < DIM ? x[i] : 0.0f; // those beyond the head help with the scales
#if KV_TYPE == 0
            if (i < DIM)
                ((float *)values)[head * DIM + i] = value;
#elif KV_TYPE == 1
            if (i < DIM)
                ((uint16_t *)values)[head * DIM + i] = f32_to_f16(value);
#else
            const uint16_t stored = f32_to_f16(__fdiv_rn(warp_max(fabsf(value)), 127.0f));
            const float d = f16_to_f32(stored), q = d > 0.0f ? rintf(__fdiv_rn(value, d)) : 0.0f;
            if (i < DIM) { // a NaN becomes -127
                ((int8_t *)values)[head * DIM + i] = (int8_t)__float2int_rn(fminf(fmaxf(q, -127.0f), 127.0f));
                if (i % 32 == 0)
                    scales[head * N_SCALES + i / 32] = stored;
            }
#endif
        }
    }
};

// The cache of one layer: rows for positions, or with a `period` above 1 rows that so many tokens share, which the last of
// them brings. Where nobody sees more than a window of them, positions that are n_rows apart may share one.
struct Cache {
    uint8_t *address;
    int n_slots, n_rows, n_kv_heads, period;

    // Rows that there are for a token at a position.
    __device__ __forceinline__ int rows_up_to(int position) const { return (position + 1) / period; }
};

// `before` and `scales_before`: values and scales of one head that lie before this side of the cache, for each head.
template <int DIM> DEVICE Side<DIM> side_of(const Cache &c, int before, int scales_before, int slot, int head) {
    constexpr int BYTES = KV_TYPE == 0 ? 4 : KV_TYPE == 1 ? 2 : 1;
    const int64_t n = (int64_t)c.n_slots * c.n_rows * c.n_kv_heads; // heads
    const int64_t first = (int64_t)slot * c.n_rows * c.n_kv_heads + head;
    uint16_t *scales = (uint16_t *)(c.address + n * (KEY_DIM + (SHARED ? 0 : VALUE_DIM)) * BYTES);
    return {c.address + (n * before + first * DIM) * BYTES,
            scales + n * scales_before + first * Side<DIM>::N_SCALES, c.n_kv_heads, c.n_rows};
}
DEVICE Side<KEY_DIM> keys_of(const Cache &cache, int slot, int head) {
    return side_of<KEY_DIM>(cache, 0, 0, slot, head);
}
DEVICE Side<VALUE_DIM> values_of(const Cache &cache, int slot, int head) { // if there are any
    return side_of<VALUE_DIM>(cache, KEY_DIM, Side<KEY_DIM>::N_SCALES, slot, head);
}
