// How each weight format is stored, and nothing else: the kernels are written once, over these structs.
//
// Integer formats (`INTEGER` true). A block is taken apart 32 weights at a time:
//
//     weight i of part s = d(block) * scale[i / 16] * (q[i] - OFFSET) + min_d(block) * min[i / 16]
//
// with q as int8, four to a word; OFFSET is the format's. `min_d` and `min` mean something only where HAS_MIN. Blocks are
// read where they lie, so `ALIGNMENT` (of every block, a divisor of BYTES) says how wide a read may be. scale and min fit
// eight bits.
//
// Where HAS_CODES the weights are nibbles that stand for numbers of a table, and the products of a part with activations
// that lie nibble by nibble as the codes do (`interleave`) cost less than to put the numbers in order first.
//
// Float formats are read as float32 values, one at a time, exactly.
#pragma once

#include "common.cuh"

struct Part {
    int q[8];
    int scale[2];
    int min[2];
};

// -- reading bytes ----------------------------------------------------------------------------------------------------

// N words from a multiple of ALIGNMENT on. What is not aligned to words is put together from the aligned ones around it,
// so up to three bytes before and behind are read, too.
template <int ALIGNMENT, int N> DEVICE void load_words(const uint8_t *p, unsigned (&words)[N]) {
    if constexpr (ALIGNMENT >= 16 && N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const uint4 v = *(const uint4 *)(p + 4 * i);
            words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
        }
    } else if constexpr (ALIGNMENT >= 8 && N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const uint2 v = *(const uint2 *)(p + 4 * i);
            words[i] = v.x, words[i + 1] = v.y;
        }
    } else if constexpr (ALIGNMENT >= 4) {
#pragma unroll
        for (int i = 0; i < N; i++)
            words[i] = ((const unsigned *)p)[i];
    } else {
        const unsigned before = (unsigned)(uint64_t)p & 3, shift = 8 * before;
        const unsigned *aligned = (const unsigned *)(p - before); // of a pointer, so that shared memory stays known as such
        unsigned word = aligned[0];
#pragma unroll
        for (int i = 0; i < N; i++) {
            const unsigned next = aligned[i + 1];
            words[i] = __funnelshift_r(word, next, shift);
            word = next;
        }
    }
}

template <int ALIGNMENT> DEVICE unsigned load_word(const uint8_t *p) {
    unsigned word[1];
    load_words<ALIGNMENT>(p, word);
    return word[0];
}

DEVICE float load_half(const uint8_t *p) { return f16_to_f32(*(const uint16_t *)p); }

// -- four bytes in a word ---------------------------------------------------------------------------------------------

constexpr unsigned ONES = 0x01010101u;

// Bytes below 128, each minus k (below 128): no borrow crosses a byte once the top bits are set.
DEVICE unsigned bytes_minus(unsigned bytes, unsigned k) { return ((bytes | 0x80808080u) - k * ONES) ^ 0x80808080u; }

// The word turned so that what is at bit `from` of its bytes comes to bit TO. What other bytes leave there is to be masked.
template <int TO> DEVICE unsigned turn_to(unsigned word, int from) { return __funnelshift_r(word, word, from - TO); }

// Bit i of the lowest four to byte i, as 0 or 1.
DEVICE unsigned spread_bits(unsigned bits) { return (bits & 15) * 0x00204081u & ONES; }

// Magnitudes above 0, negative where bit i is set.
DEVICE unsigned with_signs(unsigned magnitudes, unsigned bits) {
    const unsigned negative = spread_bits(bits);
    return (magnitudes ^ negative * 255u) + negative;
}

// The eighth sign makes the number of minus signs even.
DEVICE unsigned signs_of_7_bits(unsigned index) { return index | (unsigned)(__popc(index) & 1) << 7; }

// Nibbles 0..3 and 4..7 of `codes` replaced by entries of a table of 16 bytes.
DEVICE void look_up(unsigned codes, const unsigned (&table)[4], unsigned &first, unsigned &second) {
    const unsigned index = codes & 0x77777777u, half = 0x32103210u | (codes & 0x88888888u) >> 1;
    first = permute(permute(table[0], table[1], index), permute(table[2], table[3], index), half);
    second = permute(permute(table[0], table[1], index >> 16), permute(table[2], table[3], index >> 16), half >> 16);
}

// A part's codes through the table: low nibbles are weights 0..15, high ones 16..31.
DEVICE void look_up_part(const unsigned (&codes)[4], const unsigned (&table)[4], Part &part) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
        unsigned first, second;
        look_up(codes[k], table, first, second);
        part.q[k] = (int)permute(first, second, 0x6420);
        part.q[k + 4] = (int)permute(first, second, 0x7531);
    }
}

// Four int8 values that the low nibbles of a word meet, in turn with four that the high ones meet: as its codes lie.
DEVICE uint2 interleave(unsigned low, unsigned high) {
    return make_uint2(permute(low, high, 0x5140), permute(low, high, 0x7362));
}

// The same for a part, and the words of codes it meets.
DEVICE void interleave(const uint4 &low, const uint4 &high, uint4 &first, uint4 &second) {
    const uint2 a = interleave(low.x, high.x), b = interleave(low.y, high.y), c = interleave(low.z, high.z);
    const uint2 d = interleave(low.w, high.w);
    first = make_uint4(a.x, a.y, b.x, b.y), second = make_uint4(c.x, c.y, d.x, d.y);
}

DEVICE void set_both(int (&values)[2], int value) { values[0] = values[1] = value; }

// -- blocks of 32 -----------------------------------------------------------------------------------------------------

template <int BLOCK_SIZE, int N_BYTES, int ALIGN, bool MIN, int OFF = 0> struct IntegerFormat {
    static constexpr bool INTEGER = true, HAS_MIN = MIN, HAS_CODES = false, HAS_FRAGMENTS = false;
    static constexpr int OFFSET = OFF;
    static constexpr int BLOCK = BLOCK_SIZE, BYTES = N_BYTES, ALIGNMENT = ALIGN;
    static constexpr int PER_SCALE = 32; // weights that are sure to share scale and min
    static __device__ __forceinline__ float d(const uint8_t *block) { return load_half(block); }
    static __device__ __forceinline__ float min_d(const uint8_t *) { return 0.0f; }
};

#define UNPACK static __device__ __forceinline__ void unpack(const uint8_t *b, int s, const int8_t *grid, Part &part)
#define SCALE static __device__ __forceinline__ float d(const uint8_t *b)
#define MIN_SCALE static __device__ __forceinline__ float min_d(const uint8_t *b)
// Where HAS_FRAGMENTS: the weights of a block of two rows as tensor cores take them (`m16n8k32` in `ptx.cuh`), 32 and 32.
#define FRAGMENTS static __device__ __forceinline__ void fragments(const uint8_t *const (&rows)[2], unsigned (&a)[8][4])
DEVICE int word_of_fragment(int i) { return threadIdx.x % 4 * 4 + i / 2 * 16; }

// Nibbles of 16 bytes: the low ones are weights 0..15, the high ones 16..31.
template <int ALIGNMENT> DEVICE void unpack_nibbles(const uint8_t *p, Part &part) {
    unsigned words[4];
    load_words<ALIGNMENT>(p, words);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        part.q[k] = (int)(words[k] & 0x0f0f0f0fu);
        part.q[k + 4] = (int)(words[k] >> 4 & 0x0f0f0f0fu);
    }
}

// Bit i of `high` becomes bit 4 of weight i.
DEVICE void add_fifth_bits(unsigned high, Part &part) {
#pragma unroll
    for (int k = 0; k < 8; k++)
        part.q[k] |= (int)(spread_bits(high >> 4 * k) << 4);
}

struct Q4_0 : IntegerFormat<32, 18, 2, false, 8> {
    UNPACK {
        unpack_nibbles<2>(b + 2, part);
        set_both(part.scale, 1);
    }
};

struct Q4_1 : IntegerFormat<32, 20, 4, true> {
    MIN_SCALE { return load_half(b + 2); }
    UNPACK {
        unpack_nibbles<4>(b + 4, part);
        set_both(part.scale, 1);
        set_both(part.min, 1);
    }
};

struct Q5_0 : IntegerFormat<32, 22, 2, false, 16> {
    UNPACK {
        unpack_nibbles<2>(b + 6, part);
        add_fifth_bits(load_word<2>(b + 2), part);
        set_both(part.scale, 1);
    }
};

struct Q5_1 : IntegerFormat<32, 24, 4, true> {
    MIN_SCALE { return load_half(b + 2); }
    UNPACK {
        unpack_nibbles<4>(b + 8, part);
        add_fifth_bits(load_word<4>(b + 4), part);
        set_both(part.scale, 1);
        set_both(part.min, 1);
    }
};

struct Q8_0 : IntegerFormat<32, 34, 2, false> {
    UNPACK {
        unsigned words[8];
        load_words<2>(b + 2, words);
#pragma unroll
        for (int k = 0; k < 8; k++)
            part.q[k] = (int)words[k];
        set_both(part.scale, 1);
    }
};

// Formats of codes: where a part's are, and what they stand for.
#define CODES static __device__ __forceinline__ void codes(const uint8_t *b, int s, unsigned (&words)[4])
#define CODES_SCALE static __device__ __forceinline__ int scale(const uint8_t *b, int s)
#define TABLE static __device__ __forceinline__ unsigned entries(int i)

// A constant would be copied from a uniform register for each use. n_cols is a multiple of 32: what is added is zero, but of
// that the compiler knows nothing.
template <class Format> DEVICE void load_table(unsigned (&table)[4], int n_cols) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        table[i] = Format::entries(i) + (threadIdx.x & n_cols & 31);
}

template <class Format> DEVICE void unpack_codes(const uint8_t *b, int s, Part &part) {
    unsigned words[4];
    Format::codes(b, s, words);
    const unsigned table[4] = {Format::entries(0), Format::entries(1), Format::entries(2), Format::entries(3)};
    look_up_part(words, table, part);
    set_both(part.scale, Format::scale(b, s));
}

// -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113
template <int BLOCK_SIZE, int N_BYTES, int ALIGN> struct IQ4Format : IntegerFormat<BLOCK_SIZE, N_BYTES, ALIGN, false> {
    static constexpr bool HAS_CODES = true;
    TABLE { return i == 0 ? 0xbfad9881u : i == 1 ? 0xf6eaddcfu : i == 2 ? 0x26190d01u : 0x71594535u; }

    // Of eight codes with eight interleaved activations.
    static __device__ __forceinline__ int dot(unsigned codes, const unsigned (&table)[4], int x_first, int x_second, int acc) {
        unsigned first, second;
        look_up(codes, table, first, second);
        return __dp4a((int)second, x_second, __dp4a((int)first, x_first, acc));
    }
};

struct IQ4_NL : IQ4Format<32, 18, 2> {
    CODES { load_words<2>(b + 2, words); }
    CODES_SCALE { return 1; }
    UNPACK { unpack_codes<IQ4_NL>(b, s, part); }
};

struct MXFP4 : IntegerFormat<32, 17, 1, false> {
    static constexpr bool HAS_CODES = true;
    // 2^(e - 128), which is subnormal for the two smallest codes
    SCALE { return __uint_as_float(b[0] >= 2 ? (unsigned)(b[0] - 1) << 23 : 0x200000u << b[0]); }
    // 0 1 2 3 4 6 8 12 and the same with a minus sign: twice the E2M1 numbers
    TABLE { return i == 0 ? 0x03020100u : i == 1 ? 0x0c080604u : i == 2 ? 0xfdfeff00u : 0xf4f8fafcu; }
    CODES { load_words<1>(b + 1, words); }
    CODES_SCALE { return 1; }
    UNPACK { unpack_codes<MXFP4>(b, s, part); }

    // `permute` gives zeros for codes with a minus sign, as no magnitude has its top bit set: what is above zero and what
    // is below are multiplied apart.
    static __device__ __forceinline__ int dot(unsigned codes, const unsigned (&table)[4], int x_first, int x_second, int acc) {
        const unsigned minus = codes ^ 0x88888888u;
        const int above = __dp4a((int)permute(table[0], table[1], codes >> 16), x_second,
                                 __dp4a((int)permute(table[0], table[1], codes), x_first, acc));
        return above - __dp4a((int)permute(table[0], table[1], minus >> 16), x_second,
                              __dp4a((int)permute(table[0], table[1], minus), x_first, 0));
    }
};

// -- K formats: blocks of 256 -----------------------------------------------------------------------------------------

// Two bits of 32 bytes, from `shift` on.
template <int ALIGNMENT> DEVICE void unpack_crumbs(const uint8_t *p, int shift, Part &part) {
    unsigned words[8];
    load_words<ALIGNMENT>(p, words);
#pragma unroll
    for (int k = 0; k < 8; k++)
        part.q[k] = (int)(words[k] >> shift & 0x03030303u);
}

struct Q2_K : IntegerFormat<256, 84, 4, true> {
    static constexpr int PER_SCALE = 16;
    SCALE { return load_half(b + 80); }
    MIN_SCALE { return -load_half(b + 82); }
    UNPACK {
        unpack_crumbs<4>(b + 16 + 32 * (s / 4), 2 * (s % 4), part);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const unsigned packed = load_word<4>(b + s / 2 * 4) >> 16 * (s % 2) + 8 * half;
            part.scale[half] = (int)(packed & 15);
            part.min[half] = (int)(packed >> 4 & 15);
        }
    }
};

struct Q3_K : IntegerFormat<256, 110, 2, false, 4> {
    static constexpr int PER_SCALE = 16;
    SCALE { return load_half(b + 108); }
    UNPACK {
        unpack_crumbs<2>(b + 32 + 32 * (s / 4), 2 * (s % 4), part);
        unsigned mask[8]; // says where 4 is *not* subtracted
        load_words<2>(b, mask);
#pragma unroll
        for (int k = 0; k < 8; k++)
            part.q[k] |= (int)(turn_to<2>(mask[k], s) & 0x04040404u);
        unsigned packed[3]; // scales, each plus 32: low nibbles, then two high bits
        load_words<2>(b + 96, packed);
        const unsigned low = packed[s / 2 % 2] >> (s & 4) & 0x0f0f0f0fu; // of two parts
        const unsigned high = turn_to<4>(packed[2], s & 6) & 0x30303030u;
        const unsigned scales = (low | high) >> 16 * (s % 2);
        part.scale[0] = (int)(scales & 255) - 32;
        part.scale[1] = (int)(scales >> 8 & 255) - 32;
    }
};

// Q4_K and Q5_K: six-bit scales and minimums of all parts. The block's first 16 bytes are d and min_d, then 12 bytes of both.
template <int N_BYTES> struct SixBitFormat : IntegerFormat<256, N_BYTES, 16, true> {
    static constexpr bool HAS_FRAGMENTS = true;
    static __device__ __forceinline__ float half_of_header(const uint8_t *b, int shift) {
        unsigned header[4];
        load_words<16>(b, header);
        return f16_to_f32((uint16_t)(header[0] >> shift));
    }
    SCALE { return half_of_header(b, 0); }
    MIN_SCALE { return -half_of_header(b, 16); }

    // Of the four parts that part s is one of, a byte each.
    static __device__ __forceinline__ unsigned scales(const uint8_t *b, int s) {
        unsigned header[4];
        load_words<16>(b, header);
        return s & 4 ? header[3] & 0x0f0f0f0fu | header[1] >> 2 & 0x30303030u : header[1] & 0x3f3f3f3fu;
    }
    static __device__ __forceinline__ unsigned mins(const uint8_t *b, int s) {
        unsigned header[4];
        load_words<16>(b, header);
        return s & 4 ? header[3] >> 4 & 0x0f0f0f0fu | header[2] >> 2 & 0x30303030u : header[2] & 0x3f3f3f3fu;
    }
    static __device__ __forceinline__ void all_scales(const uint8_t *b, int (&scale)[8]) {
        const unsigned four[2] = {scales(b, 0), scales(b, 4)};
#pragma unroll
        for (int s = 0; s < 8; s++)
            scale[s] = (int)(four[s / 4] >> 8 * (s % 4) & 255);
    }
    // Of sixteens 4 * i to 4 * i + 3, a byte each.
    static __device__ __forceinline__ unsigned four_mins(const uint8_t *b, int i) {
        return __byte_perm(mins(b, 2 * i), 0, i % 2 ? 0x3322 : 0x1100);
    }
    static __device__ __forceinline__ void unpack_scale_min(const uint8_t *b, int s, Part &part) {
        set_both(part.scale, (int)(scales(b, s) >> 8 * (s % 4) & 255));
        set_both(part.min, (int)(mins(b, s) >> 8 * (s % 4) & 255));
    }
};

// The 32 low or high nibbles of sub-block s; sub-blocks lie in pairs in 32 bytes.
template <int ALIGNMENT> DEVICE void unpack_nibble_pair(const uint8_t *p, int s, Part &part) {
    const int shift = 4 * (s % 2);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        unsigned words[4];
        load_words<ALIGNMENT>(p + 32 * (s / 2) + 16 * half, words);
#pragma unroll
        for (int k = 0; k < 4; k++)
            part.q[4 * half + k] = (int)(words[k] >> shift & 0x0f0f0f0fu);
    }
}

DEVICE void nibble_fragments(const uint8_t *const (&rows)[2], int first, unsigned (&a)[8][4]) {
#pragma unroll
    for (int pair = 0; pair < 4; pair++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned word = *(const unsigned *)(rows[i % 2] + first + 32 * pair + word_of_fragment(i));
            a[2 * pair][i] = word & 0x0f0f0f0fu;
            a[2 * pair + 1][i] = word >> 4 & 0x0f0f0f0fu;
        }
}

struct Q4_K : SixBitFormat<144> {
    UNPACK {
        unpack_nibble_pair<16>(b + 16, s, part);
        unpack_scale_min(b, s, part);
    }
    FRAGMENTS { nibble_fragments(rows, 16, a); }
};

struct Q5_K : SixBitFormat<176> {
    UNPACK {
        unpack_nibble_pair<16>(b + 48, s, part);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            unsigned words[4];
            load_words<16>(b + 16 + 16 * half, words);
#pragma unroll
            for (int k = 0; k < 4; k++)
                part.q[4 * half + k] |= (int)(turn_to<4>(words[k], s) & 0x10101010u);
        }
        unpack_scale_min(b, s, part);
    }
    FRAGMENTS {
        nibble_fragments(rows, 48, a);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned high = *(const unsigned *)(rows[i % 2] + 16 + word_of_fragment(i));
#pragma unroll
            for (int s = 0; s < 8; s++)
                a[s][i] |= turn_to<4>(high, s) & 0x10101010u;
        }
    }
};

struct Q6_K : IntegerFormat<256, 210, 2, false, 32> {
    static constexpr int PER_SCALE = 16;
    static constexpr bool HAS_FRAGMENTS = true;
    SCALE { return load_half(b + 208); }
    FRAGMENTS {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint8_t *from = rows[i % 2] + word_of_fragment(i);
                const unsigned high = load_word<2>(from + 128 + 32 * half);
#pragma unroll
                for (int s = 4 * half; s < 4 * half + 2; s++) {
                    const unsigned low = load_word<2>(from + 32 * (s - 2 * half));
                    const unsigned near = low & 0x0f0f0f0fu | turn_to<4>(high, 2 * (s % 4)) & 0x30303030u;
                    const unsigned far = low >> 4 & 0x0f0f0f0fu | turn_to<4>(high, 2 * (s % 4) + 4) & 0x30303030u;
                    a[s][i] = bytes_minus(near, OFFSET);
                    a[s + 2][i] = bytes_minus(far, OFFSET);
                }
            }
    }
    static __device__ __forceinline__ void all_scales(const uint8_t *b, int (&scale)[16]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned four = load_word<2>(b + 192 + 4 * i);
#pragma unroll
            for (int k = 0; k < 4; k++)
                scale[4 * i + k] = (int8_t)(four >> 8 * k);
        }
    }
    static __device__ __forceinline__ unsigned four_mins(const uint8_t *, int) { return 0; }
    UNPACK {
        const uint8_t *low = b + 64 * (s / 4) + 32 * (s % 2), *high = b + 128 + 32 * (s / 4);
        const int low_shift = s % 4 < 2 ? 0 : 4;
        unsigned low_words[8], high_words[8];
        load_words<2>(low, low_words);
        load_words<2>(high, high_words);
#pragma unroll
        for (int k = 0; k < 8; k++)
            part.q[k] = (int)(low_words[k] >> low_shift & 0x0f0f0f0fu | turn_to<4>(high_words[k], 2 * (s % 4)) & 0x30303030u);
        const unsigned scales = load_word<2>(b + 192 + s / 2 * 4) >> 16 * (s % 2);
        part.scale[0] = (int8_t)scales;
        part.scale[1] = (int8_t)(scales >> 8);
    }
};

// -- IQ formats: blocks of 256 ----------------------------------------------------------------------------------------

struct IQ4_XS : IQ4Format<256, 136, 8> {
    CODES { load_words<8>(b + 8 + 16 * s, words); }
    CODES_SCALE {
        unsigned header[2]; // d and the scales' high bits; their low ones
        load_words<8>(b, header);
        return (int)(header[1] >> 4 * s & 15 | (header[0] >> (16 + 2 * s) & 3) << 4) - 32;
    }
    UNPACK { unpack_codes<IQ4_XS>(b, s, part); }
};

// Eight magnitudes of a grid with their signs to q[2 o] and q[2 o + 1].
DEVICE void set_octet(Part &part, int o, const int8_t *grid, unsigned index, unsigned signs) {
    const uint2 magnitudes = ((const uint2 *)grid)[index];
    part.q[2 * o] = (int)with_signs(magnitudes.x, signs);
    part.q[2 * o + 1] = (int)with_signs(magnitudes.y, signs >> 4);
}

template <int N_BYTES> struct IQ2Format : IntegerFormat<256, N_BYTES, 2, false> {
    SCALE { return load_half(b) * 0.125f; }
};

// Scales of IQ2_XS and IQ2_S: a nibble for each 16 weights.
DEVICE void set_odd_scales(Part &part, int packed) {
    part.scale[0] = 2 * (packed & 15) + 1;
    part.scale[1] = 2 * (packed >> 4) + 1;
}

struct IQ2_XXS : IQ2Format<66> {
    UNPACK {
        const uint8_t *group = b + 2 + 8 * s;
        const unsigned signs = load_word<2>(group + 4);
#pragma unroll
        for (int o = 0; o < 4; o++)
            set_octet(part, o, grid, group[o], signs_of_7_bits(signs >> 7 * o & 127));
        set_both(part.scale, 2 * (int)(signs >> 28) + 1);
    }
};

struct IQ2_XS : IQ2Format<74> {
    static constexpr int PER_SCALE = 16;
    UNPACK {
        const uint16_t *codes = (const uint16_t *)(b + 2) + 4 * s;
#pragma unroll
        for (int o = 0; o < 4; o++)
            set_octet(part, o, grid, codes[o] & 511, signs_of_7_bits(codes[o] >> 9));
        set_odd_scales(part, b[66 + s]);
    }
};

struct IQ2_S : IQ2Format<82> {
    static constexpr int PER_SCALE = 16;
    UNPACK {
#pragma unroll
        for (int o = 0; o < 4; o++)
            set_octet(part, o, grid, b[2 + 4 * s + o] | (b[66 + s] >> 2 * o & 3) << 8, b[34 + 4 * s + o]);
        set_odd_scales(part, b[74 + s]);
    }
};

struct IQ3_XXS : IntegerFormat<256, 98, 2, false> {
    SCALE { return load_half(b) * 0.25f; }
    UNPACK {
        const unsigned signs = load_word<2>(b + 66 + 4 * s);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const unsigned octet_signs = signs_of_7_bits(signs >> 7 * (k / 2) & 127);
            part.q[k] = (int)with_signs(((const unsigned *)grid)[b[2 + 8 * s + k]], octet_signs >> 4 * (k % 2));
        }
        set_both(part.scale, 2 * (int)(signs >> 28) + 1);
    }
};

struct IQ3_S : IntegerFormat<256, 110, 2, false> {
    UNPACK {
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const unsigned index = b[2 + 8 * s + k] | (b[66 + s] >> k & 1) << 8;
            part.q[k] = (int)with_signs(((const unsigned *)grid)[index], b[74 + 4 * s + k / 2] >> 4 * (k % 2));
        }
        set_both(part.scale, 2 * (b[106 + s / 2] >> 4 * (s % 2) & 15) + 1);
    }
};

// Eight grid values g in {-1, 0, 1} as 8 g + 1, or 8 g - 1 if `is_minus`.
DEVICE void set_shifted(Part &part, int o, const int8_t *grid, unsigned index, bool is_minus) {
    const uint2 g = ((const uint2 *)grid)[index];
    const unsigned shift = is_minus ? 0u - ONES : ONES;
    part.q[2 * o] = (int)(((g.x << 3 & 0xf8f8f8f8u) ^ 0x80808080u) + shift ^ 0x80808080u);
    part.q[2 * o + 1] = (int)(((g.y << 3 & 0xf8f8f8f8u) ^ 0x80808080u) + shift ^ 0x80808080u);
}

struct IQ1_S : IntegerFormat<256, 50, 2, false> {
    SCALE { return load_half(b) * 0.125f; }
    UNPACK {
        const unsigned h = *(const uint16_t *)(b + 34 + 2 * s);
#pragma unroll
        for (int o = 0; o < 4; o++)
            set_shifted(part, o, grid, b[2 + 4 * s + o] | (h >> 3 * o & 7) << 8, h & 0x8000);
        set_both(part.scale, 2 * (int)(h >> 12 & 7) + 1);
    }
};

struct IQ1_M : IntegerFormat<256, 56, 4, false> {
    static constexpr int PER_SCALE = 16;
    SCALE { // the half float is spread over the top nibbles of four words
        const uint16_t *w = (const uint16_t *)(b + 48);
        return f16_to_f32((uint16_t)(w[0] >> 12 | w[1] >> 12 << 4 | w[2] >> 12 << 8 | w[3] >> 12 << 12)) * 0.125f;
    }
    UNPACK {
#pragma unroll
        for (int o = 0; o < 4; o++) {
            const unsigned h = b[32 + 2 * s + o / 2] >> 4 * (o % 2);
            set_shifted(part, o, grid, b[4 * s + o] | (h & 7) << 8, h & 8);
        }
        const unsigned scales = ((const uint16_t *)(b + 48))[s / 2] >> 6 * (s % 2);
        part.scale[0] = 2 * (int)(scales & 7) + 1;
        part.scale[1] = 2 * (int)(scales >> 3 & 7) + 1;
    }
};

#undef UNPACK
#undef CODES
#undef CODES_SCALE
#undef TABLE
#undef SCALE
#undef MIN_SCALE

// A part of any of these formats, as the weights are: without an offset.
template <class Format> DEVICE void unpack_weights(const uint8_t *block, int s, const int8_t *grid, Part &part) {
    Format::unpack(block, s, grid, part);
    if (Format::OFFSET)
#pragma unroll
        for (int i = 0; i < 8; i++)
            part.q[i] = (int)bytes_minus((unsigned)part.q[i], Format::OFFSET);
}

// -- float formats ----------------------------------------------------------------------------------------------------

template <int BLOCK_SIZE, int N_BYTES> struct FloatFormat {
    static constexpr bool INTEGER = false;
    static constexpr int BLOCK = BLOCK_SIZE, BYTES = N_BYTES;
};

// Weight i of a block.
#define VALUE static __device__ __forceinline__ float value(const uint8_t *b, int i)

struct F32 : FloatFormat<1, 4> {
    VALUE { return *(const float *)b; }
};

struct F16 : FloatFormat<1, 2> {
    VALUE { return load_half(b); }
};

struct BF16 : FloatFormat<1, 2> {
    VALUE { return bf16_to_f32(*(const uint16_t *)b); }
};

// Base-3 digits: byte * 3^k, modulo 256, times 3 / 256 is digit k; minus one.
struct TQ1_0 : FloatFormat<256, 54> {
    VALUE {
        const int powers[5] = {1, 3, 9, 27, 81};
        int byte, digit;
        if (i < 160)
            byte = b[i % 32], digit = i / 32;
        else if (i < 240)
            byte = b[32 + i % 16], digit = (i - 160) / 16;
        else
            byte = b[48 + i % 4], digit = (i - 240) / 4;
        return load_half(b + 52) * (float)(((byte * powers[digit] & 255) * 3 >> 8) - 1);
    }
};

struct TQ2_0 : FloatFormat<256, 66> {
    VALUE { return load_half(b + 64) * (float)((b[i / 128 * 32 + i % 32] >> 2 * (i % 128 / 32) & 3) - 1); }
};

struct Q1_0 : FloatFormat<128, 18> {
    VALUE {
        const float d = load_half(b);
        return b[2 + i / 8] >> i % 8 & 1 ? d : -d;
    }
};

struct Q2_0 : FloatFormat<64, 18> {
    VALUE { return load_half(b) * (float)((b[2 + i / 4] >> 2 * (i % 4) & 3) - 1); }
};

struct NVFP4 : FloatFormat<64, 36> {
    VALUE {
        const int codes[8] = {0, 1, 2, 3, 4, 6, 8, 12};
        const int code = b[i / 16], exponent = code >> 3 & 15, mantissa = code & 7;
        // half an unsigned E4M3 number
        const float scale = code == 0x7f ? 0.0f
                            : exponent   ? __uint_as_float((unsigned)(exponent - 8 + 127) << 23 | (unsigned)mantissa << 20)
                                         : (float)mantissa * 0x1p-10f;
        const int nibble = b[4 + i / 16 * 8 + i % 8] >> (i % 16 < 8 ? 0 : 4) & 15;
        return scale * (float)(nibble & 8 ? -codes[nibble & 7] : codes[nibble & 7]);
    }
};

#undef VALUE

// One weight of a row as a float32 value, whatever the format.
template <class Format> DEVICE float weight_value(const uint8_t *row, int col, const int8_t *grid) {
    const uint8_t *block = row + (int64_t)(col / Format::BLOCK) * Format::BYTES;
    const int i = col % Format::BLOCK;
    if constexpr (Format::INTEGER) {
        Part part;
        unpack_weights<Format>(block, i / 32, grid, part);
        const int k = i % 32;
        const int q = (int8_t)((unsigned)part.q[k / 4] >> 8 * (k % 4));
        const float value = Format::d(block) * (float)(part.scale[k / 16] * q);
        return Format::HAS_MIN ? value + Format::min_d(block) * (float)part.min[k / 16] : value;
    } else {
        return Format::value(block, i);
    }
}
