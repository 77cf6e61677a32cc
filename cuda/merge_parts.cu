// Merges the parts of attention over few tokens (`attention.cu`), and gates what comes of them.
//
// Compiled for VALUE_DIM (of a head), TOP_K, BLOCK, TAIL, PERIOD and WINDOW (`attention.cu`), GATE (0 none, 1 sigmoid, 2 SiLU),
// PER_HEAD (`gate.cuh`) and FORMS (`quantize.cuh`).
#include "attention_parts.cuh"
#include "gate.cuh"
#include "quantize.cuh"

// Merges the parts of 256 columns, then gates them: out = x * f(gate), in all forms that are wanted. gate: float32 rows,
// VALUE_DIM values for each head or, with PER_HEAD, one, `gate_step` values from head to head. sinks: a score for each head
// that has no value, or null. Grid: (ceil(n_heads * VALUE_DIM / 256), tokens). Dynamic shared memory: 16 bytes for each part
// (32, 64, ... of them) of the heads that 256 columns can touch.
KERNEL(256)
merge_parts(const float *values, const Part *parts, int n_heads, int n_parts, const float *sinks, const int *positions,
            const float *gate, int64_t gate_stride, int gate_step, float *out, int64_t out_stride, Forms forms,
            const int *n_tokens) {
    constexpr int AT_ONCE = WARP; // values that are on the way together
    extern __shared__ __align__(16) uint8_t dynamic[];
    __shared__ __align__(16) float results[256];
    Merged *merged = (Merged *)dynamic; // [heads of the block][stride]; `sum` is that of the part
    const int stride = (n_parts + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
    const int token = blockIdx.y, thread = threadIdx.x, lane = thread % WARP, n_cols = n_heads * VALUE_DIM;
    const bool exists = token < *n_tokens; // as the caller gave them: old, as are the positions
    const int n = exists ? min(n_parts, last_position(positions[token]) / TILE + 1) : 0; // parts that `attend` has filled
    begin_kernel();
    if (!exists)
        return;
    const int column = blockIdx.x * 256 + thread, first_head = blockIdx.x * 256 / VALUE_DIM;
    const int end_head = (min(blockIdx.x * 256 + 256, n_cols) + VALUE_DIM - 1) / VALUE_DIM;
    const int64_t before_token = (int64_t)token * n_heads * n_parts;
    const int own_head = min(column, n_cols - 1) / VALUE_DIM, at = blockIdx.x * 256 + thread * 8; // `at`: for the first warp
    const float *own = values + (before_token + own_head * n_parts) * VALUE_DIM + column % VALUE_DIM;
    float of_parts[AT_ONCE], g = 0.0f;
    auto load_parts = [&](int base) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            of_parts[i] = base + i < n && column < n_cols ? own[(base + i) * VALUE_DIM] : 0.0f;
    };
    load_parts(0);
    if constexpr (GATE)
        if (column < n_cols)
            g = *gate_at<PER_HEAD>(gate + token * gate_stride, column, VALUE_DIM, gate_step);
    for (int head = first_head + thread / WARP; head < end_head; head += 256 / WARP) {
        // a warp takes the running maximum of 32 parts at a time
        float largest = before_parts(sinks, head).largest;
        for (int base = 0; base < n; base += WARP) {
            const Part part = base + lane < n ? parts[before_token + head * n_parts + base + lane] : Part{NEVER, 0.0f};
            float up_to = part.largest;
            for (int step = 1; step < WARP; step *= 2) {
                const float other = __shfl_up_sync(ALL_LANES, up_to, step);
                up_to = lane >= step ? fmaxf(up_to, other) : up_to;
            }
            up_to = fmaxf(up_to, largest);
            const float before = __shfl_up_sync(ALL_LANES, up_to, 1);
            const Merged added = with_part({lane ? before : largest, 0.0f, 0.0f, 0.0f}, part);
            merged[(head - first_head) * stride + base + lane] = {added.largest, part.sum, added.keep, added.take};
            largest = __shfl_sync(ALL_LANES, up_to, WARP - 1);
        }
    }
    __syncthreads();
    if (column < n_cols) {
        float acc = 0.0f, sum = before_parts(sinks, own_head).sum;
        for (int base = 0; base < n; base += AT_ONCE) {
            if (base)
                load_parts(base);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) { // there may be none of the last ones, which so change nothing
                if (i % 8 == 0 && base + i >= n)
                    break;
                const Merged part = merged[(own_head - first_head) * stride + base + i];
                sum = __fmaf_rn(part.sum, part.take, sum * part.keep);
                const float added = merged_value(part.keep, part.take, acc, of_parts[i]);
                acc = part.sum == 0.0f ? acc : added; // nothing in sight
            }
        }
        const float value = __fdiv_rn(acc, sum);
        if constexpr (GATE)
            results[thread] = gated<GATE - 1>(value, g);
        else
            results[thread] = value;
    }
    __syncthreads();
    if (thread >= WARP)
        return;
    float x[8] = {};
    if (at < n_cols) {
        load_floats(&results[thread * 8], x);
        store_floats(out + token * out_stride + at, x);
    }
    forms.store<FORMS>(x, token, at, n_cols);
}
