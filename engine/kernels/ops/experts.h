// The feed-forward networks of the chosen experts, in two parts: gate and up rows with the gating, down rows. Whoever
// completes some columns of an expert's hidden values puts them into the form that down takes, and says so. There is no
// barrier between the parts: whoever begins with down waits for its expert alone.
//
// Pairs (a token and a rank) are grouped by expert, so that each weight row is read once for all its tokens. Every
// thread groups for itself: that is some microseconds even for a long prompt, and spares a barrier.
#ifndef ENGINE_OPS_EXPERTS_H
#define ENGINE_OPS_EXPERTS_H

#include "../ops.h"
#include "../vmath.h"
#include "linear.h"

typedef struct {
    int n_active;
    int32_t *experts; // [n_active], rising
    int32_t *starts;  // [n_active + 1]: where an expert's pairs begin
    int32_t *pairs;   // grouped by expert, in order
} expert_groups;

static inline expert_groups groups_in(const worker *w, int n_experts) {
    int32_t *experts = w->scratch + 1, *starts = experts + n_experts;
    return (expert_groups){w->scratch[0], experts, starts, starts + n_experts + 1};
}

// Pairs with any other id are computed elsewhere.
static inline bool is_ours(const experts_args *a, int pair) { return a->ids[pair] >= 0 && a->ids[pair] < a->n_experts; }

// Puts our pairs in the order of their experts, by insertion; returns how many there are. For a few.
static inline int sort_pairs(const experts_args *a, int n_pairs, int32_t *pairs) {
    int n = 0;
    for (int pair = 0; pair < n_pairs; pair++) {
        if (!is_ours(a, pair))
            continue;
        int at = n++;
        for (; at > 0 && a->ids[pairs[at - 1]] > a->ids[pair]; at--)
            pairs[at] = pairs[at - 1];
        pairs[at] = pair;
    }
    return n;
}

// The same by counting; `ends` is for n_experts + 1 values.
static inline int count_pairs(const experts_args *a, int n_pairs, int32_t *pairs, int32_t *ends) {
    memset(ends, 0, (size_t)(a->n_experts + 1) * sizeof(int32_t));
    for (int pair = 0; pair < n_pairs; pair++)
        if (is_ours(a, pair))
            ends[a->ids[pair] + 1]++;
    for (int e = 0; e < a->n_experts; e++)
        ends[e + 1] += ends[e];
    const int n = ends[a->n_experts];
    for (int pair = 0; pair < n_pairs; pair++)
        if (is_ours(a, pair))
            pairs[ends[a->ids[pair]]++] = pair;
    return n;
}

static void group_pairs(const experts_args *a, const worker *w) {
    enum { FEW_PAIRS = 32 };
    expert_groups g = groups_in(w, a->n_experts);
    const int n_pairs = w->step->n_tokens * a->n_experts_used;
    const int n = n_pairs <= FEW_PAIRS ? sort_pairs(a, n_pairs, g.pairs) : count_pairs(a, n_pairs, g.pairs, g.starts);
    g.n_active = 0;
    for (int i = 0; i < n; i++)
        if (i == 0 || a->ids[g.pairs[i]] != a->ids[g.pairs[i - 1]]) {
            g.experts[g.n_active] = a->ids[g.pairs[i]];
            g.starts[g.n_active++] = i;
        }
    g.starts[g.n_active] = n;
    w->scratch[0] = g.n_active;
}

typedef struct {
    bool goes_on;                            // with the next task, if nobody helps
    int index, expert, row, n_rows, n_pairs; // index: of the active experts; n_rows: perhaps none
    const int32_t *pairs;
} experts_task;

static inline int expert_rows_per_task(const worker *w, int n_active, int n_rows) {
    return rows_of_task((int64_t)n_active * n_rows, w->step->n_tokens, w->n_threads, ROWS_PER_TASK);
}

// A thread that takes parts has the same part of each expert's rows, whichever experts there are: so what it has
// fetched of an expert that was guessed is what it reads, if the guess was right, and the caches of its core have it.
enum { PART_UNIT = 4 }; // rows

static inline int tasks_of_part(const worker *w, int n_active, int n_rows) {
    return tasks_of(n_rows, w->n_threads * expert_rows_per_task(w, n_active, n_rows));
}

// Where part i of n begins of so many rows.
static inline int part_begin(int n_rows, int64_t i, int n) {
    const int row = (int)(tasks_of(n_rows, PART_UNIT) * i / n) * PART_UNIT;
    return row < n_rows ? row : n_rows;
}

static inline int experts_begin(const experts_args *a, const worker *w, int n_rows) {
    group_pairs(a, w);
    const int n_active = w->scratch[0];
    if (w->takes_parts)
        return n_active * w->n_threads * tasks_of_part(w, n_active, n_rows);
    return n_active * tasks_of(n_rows, expert_rows_per_task(w, n_active, n_rows));
}

static inline experts_task experts_task_of(const experts_args *a, const worker *w, int n_rows, int task) {
    const expert_groups g = groups_in(w, a->n_experts);
    int i, row, end;
    bool goes_on = false;
    if (w->takes_parts) {
        const int of_part = tasks_of_part(w, g.n_active, n_rows), of_thread = of_part * g.n_active;
        const int at = task / of_thread * of_part + task % of_part, n = of_part * w->n_threads;
        i = task % of_thread / of_part;
        row = part_begin(n_rows, at, n);
        end = part_begin(n_rows, at + 1, n);
        goes_on = (task + 1) % of_thread != 0;
    } else {
        const int rows_per_task = expert_rows_per_task(w, g.n_active, n_rows);
        const int tasks_per_expert = tasks_of(n_rows, rows_per_task);
        i = task / tasks_per_expert, row = task % tasks_per_expert * rows_per_task;
        end = n_rows - row < rows_per_task ? n_rows : row + rows_per_task;
    }
    const int32_t *pairs = g.pairs + g.starts[i];
    return (experts_task){goes_on, i, g.experts[i], row, end - row, g.starts[i + 1] - g.starts[i], pairs};
}

static inline const uint8_t *expert_rows(const expert_matrix *m, int expert, int row) {
    return (const uint8_t *)(uintptr_t)m->table[expert] + row * m->row_bytes;
}

static inline weight_rows rows_of(const expert_matrix *m, const experts_task *t) {
    return (weight_rows){expert_rows(m, t->expert, t->row), m->row_bytes, t->n_rows};
}

// y * scale + bias, each if there is one.
static inline v16 scaled_and_biased(v16 y, const expert_matrix *m, int expert, int n_rows, int row, int n) {
    if (m->scale)
        y = v16_mul(y, v16_set(m->scale[expert]));
    if (m->bias)
        y = v16_add(y, v16_load_first(m->bias + (int64_t)expert * n_rows + row, n));
    return y;
}

static inline v16 activated(const experts_args *a, v16 gate, v16 up) {
    if (a->activation == ACTIVATE_SILU && a->limit > 0.0f)
        return v16_mul(v16_min(v16_silu(gate), v16_set(a->limit)), v16_within(up, a->limit));
    if (a->activation == ACTIVATE_SILU)
        return v16_mul(v16_silu(gate), up);
    if (a->activation == ACTIVATE_CLAMPED_SILU)
        return v16_mul(v16_silu(v16_min(gate, v16_set(a->limit))), v16_within(up, a->limit));
    if (a->activation == ACTIVATE_RELU)
        return v16_mul(v16_relu(gate), up);
    if (a->activation == ACTIVATE_GELU)
        return v16_mul(v16_gelu(gate), up);
    if (a->activation == ACTIVATE_SITU)
        return v16_situ(gate, up, a->limit, a->up_limit);
    return v16_clamped_swish(gate, up);
}

// Counts a task's rows as done, and puts the hidden values that are complete with them into the form that down takes.
static inline void complete_hidden(const experts_args *a, const worker *w, const experts_task *t) {
    const int end = t->row + t->n_rows;
    for (int first = t->row / QUANTIZED_TOGETHER * QUANTIZED_TOGETHER; first < end; first += QUANTIZED_TOGETHER) {
        const int last = a->ffn_size - first < QUANTIZED_TOGETHER ? a->ffn_size : first + QUANTIZED_TOGETHER;
        const int n_own = (end < last ? end : last) - (t->row > first ? t->row : first);
        round_counter *n_done = &a->n_done[t->index * expert_parts(a->ffn_size) + first / QUANTIZED_TOGETHER];
        if (add_in_round(n_done, w->round, n_own) != last - first)
            continue;
        for (int i = 0; a->quantize && i < t->n_pairs; i++)
            a->quantize(a->hidden + (int64_t)t->pairs[i] * a->ffn_size,
                        a->hidden_quantized + t->pairs[i] * a->hidden_row_bytes, a->ffn_size, first, last);
        atomic_store_explicit(&n_done->value, count_in_round(w->round, LARGEST_COUNT), memory_order_release);
    }
}

// Waits until all hidden values of an active expert are in the form that down takes. Somebody is at work on them: no
// thread comes to down before every task of gate and up is taken.
static inline void await_hidden(const experts_args *a, const worker *w, int index) {
    const int n_parts = expert_parts(a->ffn_size);
    const uint64_t complete = count_in_round(w->awaited_round, LARGEST_COUNT);
    for (int part = 0; w->awaited_round && part < n_parts; part++) {
        round_counter *n_done = &a->n_done[index * n_parts + part];
        waiting now = {w->n_spins, 0, 0.0};
        while (atomic_load_explicit(&n_done->value, memory_order_acquire) != complete)
            wait_a_moment(&now);
    }
}

// Brings the rows of an expert that fall to this thread, when it comes to that, into the caches of its core, until the
// word changes: soon after that somebody waits. Where a page has to be looked up a CPU may drop a prefetch, but not a
// load.
static void fetch_share(const expert_matrix *m, const worker *w, int expert, int n_rows, awaited_word until) {
    enum { FETCHED_AT_ONCE = 1 << 10 };
    const uint8_t *rows = expert_rows(m, expert, part_begin(n_rows, w->thread, w->n_threads));
    const int64_t n_bytes = expert_rows(m, expert, part_begin(n_rows, w->thread + 1, w->n_threads)) - rows;
    for (int64_t at = 0; at < n_bytes && __atomic_load_n(until.word, __ATOMIC_RELAXED) == until.value;
         at += FETCHED_AT_ONCE) {
        const int n = n_bytes - at < FETCHED_AT_ONCE ? (int)(n_bytes - at) : FETCHED_AT_ONCE;
        (void)*(volatile const uint8_t *)(rows + at + n - 1);
        fetch(rows + at, n);
    }
}

// What a thread that takes parts reads after one of gate and up.
static inline weight_rows rows_after_gate_up(const experts_args *a, const worker *w, const experts_task *t, int task) {
    const int n_active = w->scratch[0];
    if (t->goes_on || !w->takes_parts) {
        const experts_task next = t->goes_on ? experts_task_of(a, w, a->ffn_size, task + 1) : *t;
        return rows_of(&a->gate, &next);
    }
    const int first_down = w->thread * n_active * tasks_of_part(w, n_active, a->hidden_size);
    const experts_task next = experts_task_of(a, w, a->hidden_size, first_down);
    return rows_of(&a->down, &next);
}

static int experts_gate_up_begin(const op_args *args, const worker *w) {
    return experts_begin(&args->experts, w, args->experts.ffn_size);
}

static void experts_gate_up_run(const op_args *args, const worker *w, int task) {
    const experts_args *a = &args->experts;
    const experts_task t = experts_task_of(a, w, a->ffn_size, task);
    if (t.n_rows == 0)
        return;
    const bool is_one = a->up.table == a->gate.table; // projection for both
    const weight_rows own_up = rows_of(&a->up, &t), following = rows_after_gate_up(a, w, &t, task);
    float gate[TOKENS_PER_CALL][ROWS_PER_TASK], up[TOKENS_PER_CALL][ROWS_PER_TASK];
    for (int first = 0; first < t.n_pairs; first += TOKENS_PER_CALL) {
        const int n = t.n_pairs - first < TOKENS_PER_CALL ? t.n_pairs - first : TOKENS_PER_CALL;
        const void *x_gate[TOKENS_PER_CALL], *x_up[TOKENS_PER_CALL];
        float *gates[TOKENS_PER_CALL], *ups[TOKENS_PER_CALL];
        for (int i = 0; i < n; i++) {
            const int token = t.pairs[first + i] / a->n_experts_used;
            x_gate[i] = a->x_gate + token * a->x_gate_row_bytes;
            x_up[i] = a->x_up + token * a->x_up_row_bytes;
            gates[i] = gate[i];
            ups[i] = up[i];
        }
        a->gate.matmul(expert_rows(&a->gate, t.expert, t.row), a->gate.row_bytes, t.n_rows, a->hidden_size, x_gate, n,
                       gates, w->takes_parts ? is_one ? &following : &own_up : NULL);
        if (!is_one)
            a->up.matmul(own_up.first, own_up.row_bytes, t.n_rows, a->hidden_size, x_up, n, ups,
                         w->takes_parts ? &following : NULL);
        for (int i = 0; i < n; i++) {
            float *hidden = a->hidden + (int64_t)t.pairs[first + i] * a->ffn_size + t.row;
            for (int r = 0; r < t.n_rows; r += 16) {
                const int n_left = t.n_rows - r < 16 ? t.n_rows - r : 16;
                const v16 g = scaled_and_biased(v16_load_first(gate[i] + r, n_left), &a->gate, t.expert, a->ffn_size,
                                                t.row + r, n_left);
                const v16 u = scaled_and_biased(v16_load_first((is_one ? gate : up)[i] + r, n_left), &a->up, t.expert,
                                                a->ffn_size, t.row + r, n_left);
                v16_store_first(hidden + r, activated(a, g, u), n_left);
            }
        }
    }
    complete_hidden(a, w, &t);
}

static void experts_gate_up_fetch(const op_args *args, const worker *w, int expert, awaited_word until) {
    const experts_args *a = &args->experts;
    if (expert < 0 || expert >= a->n_experts)
        return;
    fetch_share(&a->gate, w, expert, a->ffn_size, until);
    if (a->up.table != a->gate.table)
        fetch_share(&a->up, w, expert, a->ffn_size, until);
}

static int experts_down_begin(const op_args *args, const worker *w) {
    return experts_begin(&args->experts, w, args->experts.hidden_size);
}

static void experts_down_run(const op_args *args, const worker *w, int task) {
    const experts_args *a = &args->experts;
    const experts_task t = experts_task_of(a, w, a->hidden_size, task);
    if (t.n_rows == 0)
        return;
    const experts_task following = t.goes_on ? experts_task_of(a, w, a->hidden_size, task + 1) : t;
    const weight_rows next = rows_of(&a->down, &following);
    await_hidden(a, w, t.index);
    for (int first = 0; first < t.n_pairs; first += TOKENS_PER_CALL) {
        const int n = t.n_pairs - first < TOKENS_PER_CALL ? t.n_pairs - first : TOKENS_PER_CALL;
        const void *x[TOKENS_PER_CALL];
        float *y[TOKENS_PER_CALL];
        for (int i = 0; i < n; i++) {
            const int pair = t.pairs[first + i];
            const int token = pair / a->n_experts_used, rank = pair % a->n_experts_used;
            x[i] = a->hidden_quantized + pair * a->hidden_row_bytes;
            y[i] = a->out.at + token * a->out.stride + (int64_t)rank * a->hidden_size + t.row;
        }
        a->down.matmul(expert_rows(&a->down, t.expert, t.row), a->down.row_bytes, t.n_rows, a->ffn_size, x, n, y,
                       w->takes_parts ? &next : NULL);
        if (a->down.scale || a->down.bias)
            for (int i = 0; i < n; i++)
                for (int r = 0; r < t.n_rows; r += 16) {
                    const int n_left = t.n_rows - r < 16 ? t.n_rows - r : 16;
                    const v16 value = v16_load_first(y[i] + r, n_left);
                    v16_store_first(y[i] + r,
                                    scaled_and_biased(value, &a->down, t.expert, a->hidden_size, t.row + r, n_left),
                                    n_left);
                }
    }
}

static void experts_down_fetch(const op_args *args, const worker *w, int expert, awaited_word until) {
    const experts_args *a = &args->experts;
    if (expert >= 0 && expert < a->n_experts)
        fetch_share(&a->down, w, expert, a->hidden_size, until);
}

#endif
