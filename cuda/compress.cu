// Rows that the tokens of a period share (`graph.Compress`), channel by channel: a sum of values, weighted by the softmax of
// scores, which grows from token to token. out[t] is that of the period's tokens up to t.
//
// state [n_slots, N_PARTS, 3, n_channels]: of a sum that goes on its largest score m, the sum l of exp(score - m), and the
// sum o of exp(score - m) * value. With two parts a row is made of two periods: the first is the sum of this period's row,
// which takes the second halves of values and scores, the other that of the next one's, which begins with the first halves.
// Tokens of one sequence stand together and in order. What a state holds where a period begins does not matter, but for the
// second part.
//
// Compiled for N_PARTS. biases [period, N_PARTS * n_channels]; without scores (null) these and biases are 0.
// Grid: (ceil(n_channels / 64)); a thread takes a channel, and loads some tokens ahead.
#include "common.cuh"

constexpr int THREADS = 64;
constexpr int AT_ONCE = 8; // tokens that are loaded together

struct Sum {
    float m, l, o;

    __device__ __forceinline__ void begin(float score, float value) { m = score, l = 1.0f, o = value; }
    __device__ __forceinline__ void add(float score, float value) {
        const float largest = fmaxf(score, m), keep = exp_canonical(m - largest), take = exp_canonical(score - largest);
        m = largest, l = __fmaf_rn(l, keep, take), o = __fmaf_rn(take, value, o * keep);
    }
    __device__ __forceinline__ void load(const float *from, int n_channels) {
        m = from[0], l = from[n_channels], o = from[2 * n_channels];
    }
    __device__ __forceinline__ void store(float *to, int n_channels) const {
        to[0] = m, to[n_channels] = l, to[2 * n_channels] = o;
    }
};

KERNEL(THREADS)
compress(const float *values, int64_t values_stride, const float *scores, int64_t scores_stride, const float *biases,
         float *state, float *out, int64_t out_stride, int n_channels, int period, const int *positions, const int *slots,
         const int *n_tokens, Kept kept) {
    const int channel = blockIdx.x * THREADS + threadIdx.x, n = *n_tokens, width = N_PARTS * n_channels;
    const int kept_after = kept.after();
    const bool exists = channel < n_channels;
    Sum sums[N_PARTS] = {}; // of this period, of the next
    auto state_of = [&](int slot, int part) { return state + ((int64_t)slot * N_PARTS + part) * 3 * n_channels + channel; };
    auto load = [&](int slot) {
#pragma unroll
        for (int part = 0; part < N_PARTS; part++)
            sums[part].load(state_of(slot, part), n_channels);
    };
    if (exists)
        load(slots[0]); // older than this step
    begin_kernel();
    if (!exists)
        return;
    for (int first = 0; first < n; first += AT_ONCE) {
        float value[AT_ONCE][N_PARTS], score[AT_ONCE][N_PARTS];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int half = 0; half < N_PARTS; half++) {
                const int t = min(first + i, n - 1), at = half * n_channels + channel;
                value[i][half] = values[t * values_stride + at];
                score[i][half] = scores ? scores[t * scores_stride + at] +
                                              biases[(int64_t)(positions[t] % period) * width + at]
                                        : 0.0f;
            }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int t = first + i;
            if (t >= n)
                break;
            const int slot = slots[t], position = positions[t];
            if (t && slot != slots[t - 1])
                load(slot);
            const bool begins = position % period == 0, goes_on = N_PARTS == 2 && position > 0;
            constexpr int OWN = N_PARTS - 1; // the half that this period's row is made of
            if (begins && goes_on)
                sums[0] = sums[OWN];
            if (begins && !goes_on)
                sums[0].begin(score[i][OWN], value[i][OWN]);
            else
                sums[0].add(score[i][OWN], value[i][OWN]);
            if (N_PARTS == 2) {
                if (begins)
                    sums[OWN].begin(score[i][0], value[i][0]);
                else
                    sums[OWN].add(score[i][0], value[i][0]);
            }
            out[t * out_stride + channel] = __fdiv_rn(sums[0].o, sums[0].l);
            if (t + 1 == n || slots[t + 1] != slot)
#pragma unroll
                for (int part = 0; part < N_PARTS; part++)
                    sums[part].store(state_of(slot, part), n_channels);
            if (t == kept_after)
#pragma unroll
                for (int part = 0; part < N_PARTS; part++)
                    sums[part].store(kept.to + (int64_t)part * 3 * n_channels + channel, n_channels);
        }
    }
}
