#include "program.h"

#include "ops/kv_layout.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_ACCESSES = MAX_RESIDUALS + 1, TASKS_PER_THREAD = 4, MIN_TASK_COLUMNS = 512 };

// Memory that an operation touches: n_rows rows, n_bytes of each. In a tile operation that cuts columns, column c is
// the bytes from c * column_bytes on; 0 if every tile may touch all of it.
typedef struct {
    uintptr_t address;
    int64_t row_bytes, n_rows, n_bytes, column_bytes;
    bool writes;
} memory_access;

typedef struct {
    const char *name;
    op_args args;
    tile_fn run_tile;      // NULL for a task operation
    const task_fns *tasks; // NULL for a tile operation
    int rows;              // tile operations: ROWS_TOKENS or ROWS_OUTPUTS
    int width, unit;       // columns, and where they may be cut
    bool is_cheap;         // not worth a barrier to be shared by several threads
    bool in_order;         // a tile takes all rows
    bool waits_itself;     // for what the operation before it writes, task by task: that needs no barrier
    int n_accesses;
    memory_access accesses[MAX_ACCESSES];
    int next; // the next operation of its group, or -1
} operation;

// Tile operations that are run one after another on each tile, or one task operation.
typedef struct {
    int first, last, unit;
    bool in_order, starts_phase;
} group;

struct program {
    const kernel_table *kernels;
    int max_tokens, n_slots, n_threads;
    int n_operations, n_groups, phase; // phase: the first group after the last barrier
    operation *operations;
    group *groups;
    round_counter *taken;                 // [n_threads]
    uint64_t first_round;                 // of the run: each of its groups is a round
    uint64_t own_next_round, *next_round; // of the next run; one for all programs whose experts share memory
    void **blocks;                        // memory to free
    int n_blocks;

    int n_vocab, context_length, n_scratch; // n_scratch: int32 values that a thread needs
    int32_t **scratch;                      // [n_threads]
    token_run *runs;                        // [max_tokens]
    bool lacks_room;                        // some operation has none for the states that a step may keep
    uint8_t *is_used;                       // [n_slots], for the check of a step
    int n_rope_tables;
    rope_table_args *rope_tables;
    const int32_t *expert_ids; // of the first token, [n_guessed]
    int32_t *guess;            // [n_guessed]: what is guessed of them
    int n_guessed;
    int64_t hidden_bytes, hidden_quantized_bytes, n_rows_done_bytes, partial_bytes, n_done_bytes, score_bytes,
        n_scored_bytes;
    // Shared by all operations of that kind.
    uint8_t *hidden, *hidden_quantized, *n_rows_done, *partials, *n_done, *scores, *n_scored;
    team_barrier barrier;
};

static int smaller(int a, int b) { return a < b ? a : b; }
static int larger(int a, int b) { return a > b ? a : b; }

// -- memory ----------------------------------------------------------------------------------------------------------

// Zeroed memory in whole cache lines that lives as long as the program; NULL if there is none. The system gives pages
// of large blocks when they are first used: of what a full context or the longest step needs much never is.
static void *allocate(program *p, int64_t n_bytes) {
    const size_t line = 2 * CACHE_LINE, size = ((size_t)n_bytes + line - 1) / line * line;
    void **blocks = realloc(p->blocks, (size_t)(p->n_blocks + 1) * sizeof *blocks);
    if (!blocks)
        return NULL;
    p->blocks = blocks;
    void *block = calloc(1, size + line);
    if (!block)
        return NULL;
    blocks[p->n_blocks++] = block;
    return (void *)(((uintptr_t)block + line - 1) / line * line);
}

// Memory that all operations of one kind share, since they never run at the same time: made anew when it is too small.
static uint8_t *shared_memory(program *p, uint8_t **memory, int64_t *n_bytes, int64_t needed) {
    if (needed > *n_bytes) {
        uint8_t *larger = allocate(p, needed);
        if (!larger)
            return NULL;
        *memory = larger;
        *n_bytes = needed;
    }
    return *memory;
}

static int reserve_scratch(program *p, int64_t n_values) {
    if (n_values <= p->n_scratch)
        return 0;
    for (int i = 0; i < p->n_threads; i++)
        if (!(p->scratch[i] = allocate(p, n_values * (int64_t)sizeof(int32_t))))
            return -1;
    p->n_scratch = (int)n_values;
    return 0;
}

program *program_create(const kernel_table *kernels, int max_tokens, int n_slots, int n_threads) {
    program *p = aligned_alloc(_Alignof(program), sizeof *p);
    if (!p)
        return NULL;
    memset(p, 0, sizeof *p);
    p->kernels = kernels;
    p->max_tokens = max_tokens;
    p->n_slots = n_slots;
    p->n_threads = n_threads;
    p->context_length = INT32_MAX;
    p->own_next_round = 1;
    p->next_round = &p->own_next_round;
    p->barrier.n_spins = spins_before_yield();
    p->taken = allocate(p, n_threads * (int64_t)sizeof *p->taken);
    p->scratch = allocate(p, n_threads * (int64_t)sizeof *p->scratch);
    p->runs = allocate(p, max_tokens * (int64_t)sizeof *p->runs);
    p->is_used = allocate(p, n_slots);
    if (!p->taken || !p->scratch || !p->runs || !p->is_used) {
        program_free(p);
        return NULL;
    }
    return p;
}

void program_free(program *p) {
    if (!p)
        return;
    for (int i = 0; i < p->n_blocks; i++)
        free(p->blocks[i]);
    free(p->blocks);
    free(p->operations);
    free(p->groups);
    free(p->rope_tables);
    free(p);
}

void program_share_experts(program *p, const program *other) {
    p->hidden = other->hidden;
    p->hidden_bytes = other->hidden_bytes;
    p->hidden_quantized = other->hidden_quantized;
    p->hidden_quantized_bytes = other->hidden_quantized_bytes;
    p->n_rows_done = other->n_rows_done;
    p->n_rows_done_bytes = other->n_rows_done_bytes;
    p->next_round = other->next_round;
}

int program_length(const program *p) { return p->n_operations; }
int program_n_groups(const program *p) { return p->n_groups; }
int program_n_vocab(const program *p) { return p->n_vocab; }
int program_context_length(const program *p) { return p->context_length; }

void program_group_name(const program *p, int group, char *name, size_t n_bytes) {
    size_t length = 0;
    name[0] = '\0';
    for (int i = p->groups[group].first; i >= 0; i = p->operations[i].next) {
        const char *own = p->operations[i].name;
        const size_t own_length = strlen(own);
        if (length + own_length + 2 > n_bytes)
            return;
        if (length)
            name[length++] = '+';
        memcpy(name + length, own, own_length + 1);
        length += own_length;
    }
}

// -- recording: what touches what ------------------------------------------------------------------------------------

static bool may_overlap(const memory_access *a, const memory_access *b) {
    const uintptr_t a_end = a->address + (uintptr_t)((a->n_rows - 1) * a->row_bytes + a->n_bytes);
    const uintptr_t b_end = b->address + (uintptr_t)((b->n_rows - 1) * b->row_bytes + b->n_bytes);
    if (a->address >= b_end || b->address >= a_end)
        return false;
    if (a->row_bytes != b->row_bytes || a->row_bytes == 0)
        return true;
    // columns of the same rows: disjoint if b's begin after a's and end before a's next row
    int64_t from = (int64_t)(b->address - a->address) % a->row_bytes;
    from += from < 0 ? a->row_bytes : 0;
    return from < a->n_bytes || from + b->n_bytes > a->row_bytes;
}

static bool in_same_tiles(const memory_access *a, const memory_access *b) {
    return a->address == b->address && a->row_bytes == b->row_bytes && a->column_bytes == b->column_bytes &&
           a->column_bytes > 0;
}

typedef enum { INDEPENDENT, TIED_BY_TILE, TIED } tie;

static tie tie_between(const operation *a, const operation *b) {
    tie found = INDEPENDENT;
    for (int i = 0; i < a->n_accesses; i++)
        for (int j = 0; j < b->n_accesses; j++) {
            const memory_access *x = &a->accesses[i], *y = &b->accesses[j];
            if ((!x->writes && !y->writes) || !may_overlap(x, y))
                continue;
            if (!in_same_tiles(x, y))
                return TIED;
            found = TIED_BY_TILE;
        }
    return found;
}

static bool can_follow(const program *p, const group *g, const operation *op) {
    const operation *first = &p->operations[g->first];
    if (!op->run_tile || !first->run_tile || op->rows != first->rows || op->width != first->width)
        return false;
    const int unit = op->unit > g->unit ? op->unit : g->unit;
    if (unit % op->unit || unit % g->unit || (op->in_order && !g->in_order))
        return false;
    if (unit <= MIN_TASK_COLUMNS) // no fewer threads can share the two than either alone
        return true;
    if (op->unit < unit && !op->is_cheap)
        return false;
    for (int i = g->first; i >= 0; i = p->operations[i].next)
        if (p->operations[i].unit < unit && !p->operations[i].is_cheap)
            return false;
    return true;
}

static int record(program *p, operation op) {
    operation *operations = realloc(p->operations, (size_t)(p->n_operations + 1) * sizeof *operations);
    if (!operations)
        return -1;
    p->operations = operations;
    group *groups = realloc(p->groups, (size_t)(p->n_groups + 1) * sizeof *groups);
    if (!groups)
        return -1;
    p->groups = groups;

    int n_tied = 0, tied_group = -1;
    bool can_fuse = true;
    for (int g = p->phase; g < p->n_groups; g++)
        for (int i = groups[g].first; i >= 0; i = operations[i].next) {
            const tie between = tie_between(&operations[i], &op);
            if (between == INDEPENDENT || (op.waits_itself && i == p->n_operations - 1))
                continue;
            can_fuse = can_fuse && between == TIED_BY_TILE;
            n_tied += g != tied_group;
            tied_group = g;
        }
    const int index = p->n_operations++;
    op.next = -1;
    operations[index] = op;
    if (n_tied == 1 && can_fuse && can_follow(p, &groups[tied_group], &op)) {
        group *g = &groups[tied_group];
        operations[g->last].next = index;
        g->last = index;
        g->unit = op.unit > g->unit ? op.unit : g->unit;
        return 0;
    }
    groups[p->n_groups] = (group){index, index, op.unit, op.in_order, n_tied > 0};
    if (n_tied > 0)
        p->phase = p->n_groups;
    p->n_groups++;
    return 0;
}

enum { READS, WRITES };

// Adds memory of the step's rows; column_bytes as in memory_access.
static void touch_rows(const program *p, operation *op, int mode, const void *address, int64_t row_bytes,
                       int64_t n_bytes, int64_t column_bytes) {
    op->accesses[op->n_accesses++] =
        (memory_access){(uintptr_t)address, row_bytes, p->max_tokens, n_bytes, column_bytes, mode == WRITES};
}

// The same for float32 rows whose column c belongs to the operation's column c.
static void touch(const program *p, operation *op, int mode, matrix m) {
    touch_rows(p, op, mode, m.at, m.stride * (int64_t)sizeof(float), op->width * (int64_t)sizeof(float), sizeof(float));
}

// The same for float32 rows of n_cols that any tile may touch.
static void touch_whole(const program *p, operation *op, int mode, matrix m, int64_t n_cols) {
    touch_rows(p, op, mode, m.at, m.stride * (int64_t)sizeof(float), n_cols * (int64_t)sizeof(float), 0);
}

static void touch_block(operation *op, int mode, const void *address, int64_t n_bytes) {
    op->accesses[op->n_accesses++] = (memory_access){(uintptr_t)address, 0, 1, n_bytes, 0, mode == WRITES};
}

// -- recording: the operations ---------------------------------------------------------------------------------------

enum { FLOATS_OF_LINE = CACHE_LINE / 4 };

int program_embed(program *p, int ggml_type, embed_args args, int n_vocab, int n_ids) {
    operation op = {
        .name = "embed", .run_tile = p->kernels->ops->embed, .width = n_ids * args.n_cols, .unit = args.n_cols};
    args.dequantize_row = p->kernels->quant->dequantize_row[ggml_type];
    args.row_bytes =
        (int64_t)args.n_cols / engine_formats[ggml_type].block_size * engine_formats[ggml_type].block_bytes;
    op.args.embed = args;
    if (args.ids)
        touch_rows(p, &op, READS, args.ids, args.ids_stride * (int64_t)sizeof(int32_t),
                   n_ids * (int64_t)sizeof(int32_t), 0);
    else
        p->n_vocab = p->n_vocab ? smaller(p->n_vocab, n_vocab) : n_vocab;
    touch(p, &op, WRITES, args.out);
    return record(p, op);
}

int program_hash_tokens(program *p, hash_tokens_args args) {
    p->lacks_room |= !args.kept;
    operation op = {.name = "hash_tokens",
                    .args.hash_tokens = args,
                    .run_tile = p->kernels->ops->hash_tokens,
                    .width = args.n_heads,
                    .unit = args.n_heads,
                    .in_order = true};
    touch_whole(p, &op, WRITES, (matrix){(float *)args.out, args.out_stride}, args.n_heads);
    touch_block(&op, WRITES, args.state, p->n_slots * (args.n_hashed - 1) * (int64_t)sizeof(int32_t));
    return record(p, op);
}

int program_rms_norm(program *p, rms_norm_args args, int n_groups, int rows) {
    operation op = {.name = "rms_norm",
                    .args.rms_norm = args,
                    .run_tile = p->kernels->ops->rms_norm,
                    .rows = rows,
                    .width = n_groups * args.group_size,
                    .unit = args.group_size,
                    .is_cheap = true};
    touch(p, &op, READS, args.x);
    touch(p, &op, WRITES, args.out);
    return record(p, op);
}

int program_quantize(program *p, quantize_args args, int rows) {
    operation op = {.name = "quantize",
                    .run_tile = p->kernels->ops->quantize,
                    .rows = rows,
                    .width = args.n_cols,
                    .unit = args.activation == ACTIVATION_Q8_256 ? 256 : 32,
                    .is_cheap = true};
    args.quantize = p->kernels->quant->quantize[args.activation];
    args.out_row_bytes = engine_activation_bytes(args.activation, args.n_cols);
    op.args.quantize = args;
    touch(p, &op, READS, args.x);
    touch_rows(p, &op, WRITES, args.out, args.out_row_bytes, args.out_row_bytes, 0);
    return record(p, op);
}

int program_linear(program *p, linear_args args) {
    operation op = {.name = "linear", .tasks = &p->kernels->ops->linear};
    touch_rows(p, &op, READS, args.x, args.x_row_bytes, args.x_row_bytes, 0);
    for (int i = 0; i < args.n_weights; i++)
        touch_whole(p, &op, WRITES, args.weights[i].out, args.weights[i].n_rows);
    op.args.linear = args;
    return record(p, op);
}

int program_add(program *p, add_args args, int n_cols, int rows) {
    operation op = {.name = "add",
                    .args.add = args,
                    .run_tile = p->kernels->ops->add,
                    .rows = rows,
                    .width = n_cols,
                    .unit = FLOATS_OF_LINE,
                    .is_cheap = true};
    touch(p, &op, READS, args.a);
    if (args.b.stride) // one row for all is a weight, which nobody writes
        touch(p, &op, READS, args.b);
    touch(p, &op, WRITES, args.out);
    return record(p, op);
}

int program_gate(program *p, gate_args args, int rows) {
    operation op = {.name = "gate",
                    .args.gate = args,
                    .run_tile = p->kernels->ops->gate,
                    .rows = rows,
                    .width = args.n_cols,
                    .unit = FLOATS_OF_LINE};
    const int64_t n_cols = args.n_streams * (int64_t)args.n_cols;
    if (args.n_streams == 1)
        touch(p, &op, READS, args.x);
    else
        touch_whole(p, &op, READS, args.x, n_cols);
    if (args.n_streams == 1 && args.span == 1)
        touch(p, &op, READS, args.gate);
    else
        touch_whole(p, &op, READS, args.gate, n_cols / args.span);
    touch(p, &op, WRITES, args.out);
    return record(p, op);
}

int program_gate_by_agreement(program *p, gate_by_agreement_args args, int n_streams) {
    operation op = {.name = "gate_by_agreement",
                    .args.gate_by_agreement = args,
                    .run_tile = p->kernels->ops->gate_by_agreement,
                    .width = n_streams * args.n_cols,
                    .unit = args.n_cols};
    touch(p, &op, READS, args.a);
    touch(p, &op, READS, args.b);
    touch_whole(p, &op, READS, args.x, args.n_cols);
    touch(p, &op, WRITES, args.out);
    return record(p, op);
}

int program_scale(program *p, scale_args args, int n_cols, int rows) {
    operation op = {.name = "scale",
                    .args.scale = args,
                    .run_tile = p->kernels->ops->scale,
                    .rows = rows,
                    .width = n_cols,
                    .unit = FLOATS_OF_LINE,
                    .is_cheap = true};
    touch(p, &op, READS, args.x);
    if (args.by.at && args.by.stride) // one value for all rows is a weight, which nobody writes
        touch_whole(p, &op, READS, args.by, 1);
    touch(p, &op, WRITES, args.out);
    return record(p, op);
}

int program_soft_cap(program *p, soft_cap_args args, int n_cols, int rows) {
    operation op = {.name = "soft_cap",
                    .args.soft_cap = args,
                    .run_tile = p->kernels->ops->soft_cap,
                    .rows = rows,
                    .width = n_cols,
                    .unit = FLOATS_OF_LINE};
    touch(p, &op, READS, args.x);
    touch(p, &op, WRITES, args.out);
    return record(p, op);
}

int program_clamp(program *p, clamp_args args, int n_cols, int rows) {
    operation op = {.name = "clamp",
                    .args.clamp = args,
                    .run_tile = p->kernels->ops->clamp,
                    .rows = rows,
                    .width = n_cols,
                    .unit = FLOATS_OF_LINE,
                    .is_cheap = true};
    touch(p, &op, READS, args.x);
    touch(p, &op, WRITES, args.out);
    return record(p, op);
}

int program_scale_by_position(program *p, scale_by_position_args args, int n_cols) {
    operation op = {.name = "scale_by_position",
                    .args.scale_by_position = args,
                    .run_tile = p->kernels->ops->scale_by_position,
                    .width = n_cols,
                    .unit = FLOATS_OF_LINE,
                    .is_cheap = true};
    touch(p, &op, WRITES, args.x);
    return record(p, op);
}

int program_split_heads(program *p, heads_args args, int n_heads) {
    operation op = {.name = "split_heads",
                    .args.heads = args,
                    .run_tile = p->kernels->ops->split_heads,
                    .width = n_heads * args.first_dim,
                    .unit = args.first_dim,
                    .is_cheap = true};
    const bool is_even = args.first_dim == args.second_dim; // then columns of all three belong together
    const int64_t joined_bytes = n_heads * (int64_t)(args.first_dim + args.second_dim) * (int64_t)sizeof(float);
    touch_rows(p, &op, READS, args.joined.at, args.joined.stride * (int64_t)sizeof(float), joined_bytes,
               is_even ? 2 * sizeof(float) : 0);
    touch(p, &op, WRITES, args.first);
    if (is_even)
        touch(p, &op, WRITES, args.second);
    else
        touch_whole(p, &op, WRITES, args.second, n_heads * (int64_t)args.second_dim);
    return record(p, op);
}

int program_join_heads(program *p, heads_args args, int n_heads) {
    operation op = {.name = "join_heads",
                    .args.heads = args,
                    .run_tile = p->kernels->ops->join_heads,
                    .width = n_heads * (args.first_dim + args.second_dim),
                    .unit = args.first_dim + args.second_dim,
                    .is_cheap = true};
    touch_whole(p, &op, READS, args.first, n_heads * (int64_t)args.first_dim);
    touch_whole(p, &op, READS, args.second, n_heads * (int64_t)args.second_dim);
    touch(p, &op, WRITES, args.joined);
    return record(p, op);
}

// The cosines and sines of a step are computed once, however many layers rotate with them.
static const float *rope_table(program *p, int n_pairs, const float *frequencies, float magnitude, int period) {
    for (int i = 0; i < p->n_rope_tables; i++) {
        const rope_table_args *known = &p->rope_tables[i];
        if (known->n_pairs == n_pairs && known->magnitude == magnitude && known->period == period &&
            !memcmp(known->frequencies, frequencies, (size_t)n_pairs * sizeof(float)))
            return known->table;
    }
    rope_table_args *tables = realloc(p->rope_tables, (size_t)(p->n_rope_tables + 1) * sizeof *tables);
    if (!tables)
        return NULL;
    p->rope_tables = tables;
    const int64_t row_bytes = 2 * n_pairs * (int64_t)sizeof(float);
    float *table = allocate(p, p->max_tokens * row_bytes), *own = allocate(p, row_bytes / 2);
    if (!table || !own)
        return NULL;
    memcpy(own, frequencies, (size_t)n_pairs * sizeof(float));
    operation op = {.name = "rope_table",
                    .args.rope_table = {table, own, n_pairs, period, magnitude},
                    .run_tile = p->kernels->ops->rope_table,
                    .width = 1,
                    .unit = 1};
    touch_rows(p, &op, WRITES, table, row_bytes, row_bytes, 0);
    tables[p->n_rope_tables++] = op.args.rope_table;
    return record(p, op) ? NULL : table;
}

int program_rope(program *p, rope_args args, const float *frequencies, float magnitude, int period, int n_heads) {
    args.table = rope_table(p, args.n_pairs, frequencies, magnitude, period);
    if (!args.table)
        return -1;
    const int64_t table_bytes = 2 * args.n_pairs * (int64_t)sizeof(float);
    operation op = {.name = "rope",
                    .args.rope = args,
                    .run_tile = p->kernels->ops->rope,
                    .width = n_heads * args.head_dim,
                    .unit = args.head_dim,
                    .is_cheap = true};
    touch(p, &op, WRITES, args.x);
    touch_rows(p, &op, READS, args.table, table_bytes, table_bytes, 0);
    return record(p, op);
}

static int record_kv_store(program *p, kv_cache cache, matrix x, bool is_value) {
    operation op = {.name = is_value ? "store_values" : "store_keys",
                    .args.kv_store = {x, cache, is_value},
                    .run_tile = p->kernels->ops->kv_store,
                    .width = cache.n_kv_heads * (is_value ? cache.value_dim : cache.head_dim),
                    .unit = is_value ? cache.value_dim : cache.head_dim,
                    .is_cheap = true};
    touch(p, &op, READS, x);
    touch_block(&op, WRITES, is_value ? cache.values : cache.keys, 1);
    return record(p, op);
}

// A position beyond this many has no row in a cache, unless that is a ring.
static void limit_context(program *p, kv_cache cache) {
    const int64_t n_positions = (int64_t)cache.n_rows * cache.period + cache.period - 1;
    if (!cache.is_ring && n_positions < p->context_length)
        p->context_length = (int)n_positions;
}

int program_attention(program *p, attention_args args, matrix k, matrix v, matrix shared_k) {
    const kv_cache cache = args.cache, shared = args.shared;
    const int n_tiles = (args.n_heads / cache.n_kv_heads + ATTENTION_TILE - 1) / ATTENTION_TILE;
    if (record_kv_store(p, cache, k, false) || record_kv_store(p, cache, v, true))
        return -1;
    if (shared.keys && (record_kv_store(p, shared, shared_k, false) || record_kv_store(p, shared, shared_k, true)))
        return -1;
    args.partials = (float *)shared_memory(p, &p->partials, &p->partial_bytes,
                                           SPLIT_ATTENTION_TOKENS * attention_partial_bytes(&args));
    args.n_done = (padded_counter *)shared_memory(p, &p->n_done, &p->n_done_bytes,
                                                  SPLIT_ATTENTION_TOKENS * cache.n_kv_heads * n_tiles *
                                                      (int64_t)sizeof(padded_counter));
    if (!args.partials || !args.n_done)
        return -1;
    limit_context(p, cache);
    operation op = {.name = "attention", .args.attention = args, .tasks = &p->kernels->ops->attention};
    touch_whole(p, &op, READS, args.q, args.n_heads * (int64_t)cache.head_dim);
    touch_whole(p, &op, WRITES, args.out, args.n_heads * (int64_t)cache.value_dim);
    touch_block(&op, READS, cache.keys, 1);
    touch_block(&op, READS, cache.values, 1);
    if (shared.keys) {
        limit_context(p, shared);
        touch_block(&op, READS, shared.keys, 1);
        touch_block(&op, READS, shared.values, 1);
    }
    touch_block(&op, WRITES, args.partials, 1);
    if (args.selected)
        touch_whole(p, &op, READS, (matrix){(float *)args.selected, args.selected_stride},
                    args.n_lists * (int64_t)args.top_k);
    return record(p, op);
}

int program_store_keys(program *p, kv_cache cache, matrix k, matrix v) {
    limit_context(p, cache);
    return record_kv_store(p, cache, k, false) || record_kv_store(p, cache, v, true) ? -1 : 0;
}

// Memory for so many scores of each token, and for the number of chunks of it that are done.
static int reserve_scores(program *p, int64_t n_scores, float **scores, padded_counter **n_done) {
    const int64_t n_rows = larger(SPLIT_ATTENTION_TOKENS, p->n_threads);
    *scores = (float *)shared_memory(p, &p->scores, &p->score_bytes, n_rows * n_scores * (int64_t)sizeof(float));
    *n_done = (padded_counter *)shared_memory(p, &p->n_scored, &p->n_scored_bytes,
                                              SPLIT_ATTENTION_TOKENS * (int64_t)sizeof(padded_counter));
    return *scores && *n_done ? 0 : -1;
}

int program_select_positions(program *p, select_positions_args args, matrix k) {
    const kv_cache cache = args.cache;
    if (record_kv_store(p, cache, k, false) || reserve_scores(p, kv_padded(cache.n_rows), &args.scores, &args.n_done))
        return -1;
    limit_context(p, cache);
    operation op = {
        .name = "select_positions", .args.select_positions = args, .tasks = &p->kernels->ops->select_positions};
    touch_whole(p, &op, READS, args.q, args.n_heads * (int64_t)cache.head_dim);
    if (args.weights.at)
        touch_whole(p, &op, READS, args.weights, args.n_heads);
    touch_whole(p, &op, WRITES, (matrix){(float *)args.out, args.out_stride}, args.top_k + (int64_t)args.has_tail);
    touch_block(&op, READS, cache.keys, 1);
    touch_block(&op, WRITES, args.scores, 1);
    return record(p, op);
}

int program_select_blocks(program *p, select_blocks_args args, matrix k) {
    const kv_cache cache = args.cache;
    const int64_t n_blocks = (cache.n_rows + (int64_t)args.block_size - 1) / args.block_size;
    if (record_kv_store(p, cache, k, false) || reserve_scores(p, args.n_heads * n_blocks, &args.scores, &args.n_done))
        return -1;
    limit_context(p, cache);
    operation op = {.name = "select_blocks", .args.select_blocks = args, .tasks = &p->kernels->ops->select_blocks};
    touch_whole(p, &op, READS, args.q, args.n_heads * (int64_t)cache.head_dim);
    touch_whole(p, &op, WRITES, (matrix){(float *)args.out, args.out_stride}, args.n_heads * (int64_t)args.top_k);
    touch_block(&op, READS, cache.keys, 1);
    touch_block(&op, WRITES, args.scores, 1);
    return record(p, op);
}

// A copy [n_cols, n_rows] of [n_rows, n_cols] that lives as long as the program; NULL without memory.
static const float *transposed(program *p, const float *values, int n_rows, int n_cols) {
    float *copy = allocate(p, n_rows * (int64_t)n_cols * (int64_t)sizeof(float));
    for (int j = 0; copy && j < n_cols; j++)
        for (int i = 0; i < n_rows; i++)
            copy[(int64_t)j * n_rows + i] = values[(int64_t)i * n_cols + j];
    return copy;
}

// What an operation keeps for each sequence: some rows of a value for each channel.
static void touch_channel_states(program *p, operation *op, float *state, int n_rows, int n_channels) {
    const int64_t row_bytes = n_channels * (int64_t)sizeof(float);
    op->accesses[op->n_accesses++] =
        (memory_access){(uintptr_t)state, row_bytes, p->n_slots * (int64_t)n_rows, row_bytes, sizeof(float), true};
}

int program_carry_over(program *p, carry_over_args args) {
    operation op = {.name = "carry_over",
                    .args.carry_over = args,
                    .run_tile = p->kernels->ops->carry_over,
                    .width = args.n_channels,
                    .unit = FLOATS_OF_LINE,
                    .in_order = true};
    if (args.x.at)
        touch(p, &op, READS, args.x);
    if (args.out.at)
        touch(p, &op, WRITES, args.out);
    touch_channel_states(p, &op, args.state, args.n_kept, args.n_channels);
    return record(p, op);
}

int program_causal_conv(program *p, causal_conv_args args) {
    p->lacks_room |= !args.kept;
    if (!(args.weight = transposed(p, args.weight, args.n_channels, args.kernel_size)))
        return -1;
    operation op = {.name = "causal_conv",
                    .args.causal_conv = args,
                    .run_tile = p->kernels->ops->causal_conv,
                    .width = args.n_channels,
                    .unit = FLOATS_OF_LINE,
                    .in_order = true};
    touch(p, &op, READS, args.x);
    touch(p, &op, WRITES, args.out);
    touch_channel_states(p, &op, args.state, (args.kernel_size - 1) * args.dilation, args.n_channels);
    return record(p, op);
}

int program_delta_net(program *p, delta_net_args args) {
    p->lacks_room |= !args.kept;
    operation op = {.name = "delta_net",
                    .args.delta_net = args,
                    .run_tile = p->kernels->ops->delta_net,
                    .width = args.n_v_heads * args.v_dim,
                    .unit = args.v_dim,
                    .in_order = true};
    const int64_t key_size = args.n_k_heads * (int64_t)args.k_dim;
    touch_whole(p, &op, READS, (matrix){(float *)args.q, args.qkv_stride}, key_size);
    touch_whole(p, &op, READS, (matrix){(float *)args.k, args.qkv_stride}, key_size);
    touch(p, &op, READS, (matrix){(float *)args.v, args.qkv_stride});
    if (args.beta.at)
        touch_whole(p, &op, READS, args.beta, args.n_v_heads);
    if (args.alpha.at)
        touch_whole(p, &op, READS, args.alpha, args.n_v_heads * (int64_t)args.decay_dim);
    touch(p, &op, WRITES, args.out);
    const int64_t state_size = args.n_v_heads * (int64_t)args.k_dim * args.v_dim;
    touch_block(&op, WRITES, args.state, p->n_slots * state_size * (int64_t)sizeof(float));
    return record(p, op);
}

int program_selective_scan(program *p, selective_scan_args args) {
    p->lacks_room |= !args.kept;
    if (!(args.a = transposed(p, args.a, args.n_channels, args.state_size)))
        return -1;
    operation op = {.name = "selective_scan",
                    .args.selective_scan = args,
                    .run_tile = p->kernels->ops->selective_scan,
                    .width = args.n_channels,
                    .unit = FLOATS_OF_LINE,
                    .in_order = true};
    touch(p, &op, READS, args.x);
    touch(p, &op, READS, args.dt);
    touch_whole(p, &op, READS, args.b, args.state_size);
    touch_whole(p, &op, READS, args.c, args.state_size);
    touch(p, &op, WRITES, args.out);
    touch_channel_states(p, &op, args.state, args.state_size, args.n_channels);
    return record(p, op);
}

int program_compress(program *p, compress_args args) {
    p->lacks_room |= !args.kept;
    operation op = {.name = "compress",
                    .args.compress = args,
                    .run_tile = p->kernels->ops->compress,
                    .width = args.n_channels,
                    .unit = FLOATS_OF_LINE,
                    .in_order = true};
    touch_whole(p, &op, READS, args.values, args.n_parts * (int64_t)args.n_channels);
    if (args.scores.at)
        touch_whole(p, &op, READS, args.scores, args.n_parts * (int64_t)args.n_channels);
    touch(p, &op, WRITES, args.out);
    touch_channel_states(p, &op, args.state, 3 * args.n_parts, args.n_channels);
    return record(p, op);
}

int program_router(program *p, router_args args, int n_vocab) {
    if (args.table)
        p->n_vocab = p->n_vocab ? smaller(p->n_vocab, n_vocab) : n_vocab;
    operation op = {.name = "router",
                    .args.router = args,
                    .run_tile = p->kernels->ops->router,
                    .width = args.n_experts,
                    .unit = args.n_experts};
    const int64_t row_bytes = args.n_experts_used * (int64_t)sizeof(float);
    touch(p, &op, READS, args.logits);
    touch_rows(p, &op, WRITES, args.ids, row_bytes, row_bytes, 0);
    touch_rows(p, &op, WRITES, args.weights, row_bytes, row_bytes, 0);
    return record(p, op);
}

int program_group_router(program *p, group_router_args args) {
    operation op = {.name = "group_router",
                    .args.group_router = args,
                    .run_tile = p->kernels->ops->group_router,
                    .width = args.n_experts,
                    .unit = args.n_experts};
    const int64_t row_bytes = args.n_experts_used * (int64_t)sizeof(float);
    touch(p, &op, READS, args.logits);
    touch_rows(p, &op, READS, args.ids, row_bytes, row_bytes, 0);
    touch_rows(p, &op, WRITES, args.group_ids, row_bytes, row_bytes, 0);
    touch_rows(p, &op, WRITES, args.weights, row_bytes, row_bytes, 0);
    return record(p, op);
}

int program_experts(program *p, experts_args args, int down_activation) {
    const int64_t n_pairs = p->max_tokens * (int64_t)args.n_experts_used;
    const int64_t float_bytes = args.ffn_size * (int64_t)sizeof(float);
    const int64_t ids_row_bytes = args.n_experts_used * (int64_t)sizeof(int32_t);
    args.hidden = (float *)shared_memory(p, &p->hidden, &p->hidden_bytes, n_pairs * float_bytes);
    if (!args.hidden || reserve_scratch(p, 2 + 2 * (int64_t)args.n_experts + n_pairs))
        return -1;
    args.hidden_quantized = (uint8_t *)args.hidden;
    args.hidden_row_bytes = float_bytes;
    args.quantize = NULL;
    if (down_activation != ACTIVATION_F32) {
        args.hidden_row_bytes = engine_activation_bytes(down_activation, args.ffn_size);
        args.hidden_quantized =
            shared_memory(p, &p->hidden_quantized, &p->hidden_quantized_bytes, n_pairs * args.hidden_row_bytes);
        args.quantize = p->kernels->quant->quantize[down_activation];
    }
    const int64_t n_active = n_pairs < args.n_experts ? n_pairs : args.n_experts;
    args.n_done = (round_counter *)shared_memory(p, &p->n_rows_done, &p->n_rows_done_bytes,
                                                 n_active * expert_parts(args.ffn_size) * (int64_t)sizeof *args.n_done);
    if (!args.hidden_quantized || !args.n_done || !(p->guess = allocate(p, ids_row_bytes)))
        return -1;
    p->n_guessed = args.n_experts_used;
    p->expert_ids = args.ids;

    operation gate_up = {.name = "experts_gate_up", .args.experts = args, .tasks = &p->kernels->ops->experts_gate_up};
    touch_rows(p, &gate_up, READS, args.x_gate, args.x_gate_row_bytes, args.x_gate_row_bytes, 0);
    touch_rows(p, &gate_up, READS, args.x_up, args.x_up_row_bytes, args.x_up_row_bytes, 0);
    touch_rows(p, &gate_up, READS, args.ids, ids_row_bytes, ids_row_bytes, 0);
    touch_block(&gate_up, WRITES, args.hidden, n_pairs * float_bytes);
    touch_block(&gate_up, WRITES, args.hidden_quantized, n_pairs * args.hidden_row_bytes);

    operation down = {
        .name = "experts_down", .args.experts = args, .tasks = &p->kernels->ops->experts_down, .waits_itself = true};
    touch_rows(p, &down, READS, args.ids, ids_row_bytes, ids_row_bytes, 0);
    touch_block(&down, READS, args.hidden_quantized, n_pairs * args.hidden_row_bytes);
    touch_whole(p, &down, WRITES, args.out, args.n_experts_used * (int64_t)args.hidden_size);

    return record(p, gate_up) ? -1 : record(p, down);
}

int program_combine(program *p, combine_args args) {
    operation op = {.name = "combine",
                    .args.combine = args,
                    .run_tile = p->kernels->ops->combine,
                    .width = args.n_cols,
                    .unit = FLOATS_OF_LINE};
    const int64_t weights_row_bytes = args.n_experts_used * (int64_t)sizeof(float);
    touch_whole(p, &op, READS, args.expert_out, args.n_experts_used * (int64_t)args.n_cols);
    if (args.weights)
        touch_rows(p, &op, READS, args.weights, weights_row_bytes, weights_row_bytes, 0);
    if (args.shared.at)
        touch(p, &op, READS, args.shared);
    if (args.shared_gate.at)
        touch_whole(p, &op, READS, args.shared_gate, 1);
    if (args.residual.at)
        touch(p, &op, READS, args.residual);
    touch(p, &op, WRITES, args.out);
    return record(p, op);
}

int program_stream_weights(program *p, stream_weights_args args) {
    const int n = args.n_streams;
    operation op = {.name = "stream_weights",
                    .args.stream_weights = args,
                    .run_tile = p->kernels->ops->stream_weights,
                    .width = args.mixing.at  ? (2 + n) * n
                             : args.gates.at ? 2 * n
                                             : n,
                    .is_cheap = true};
    op.unit = op.width;
    touch(p, &op, READS, args.mixes);
    touch_rows(p, &op, WRITES, args.weights, n * (int64_t)sizeof(float), n * (int64_t)sizeof(float), 0);
    if (args.gates.at)
        touch_whole(p, &op, WRITES, args.gates, n);
    if (args.mixing.at)
        touch_whole(p, &op, WRITES, args.mixing, n * (int64_t)n);
    return record(p, op);
}

int program_add_to_streams(program *p, add_to_streams_args args) {
    const int n_streams = args.n_streams;
    operation op = {.name = "add_to_streams",
                    .args.add_to_streams = args,
                    .run_tile = p->kernels->ops->add_to_streams,
                    .width = n_streams * args.n_cols,
                    .unit = FLOATS_OF_LINE};
    if (args.mixing.at) {
        touch_whole(p, &op, READS, args.x, op.width);
        touch_whole(p, &op, READS, args.mixing, n_streams * (int64_t)n_streams);
    } else
        touch(p, &op, READS, args.x);
    touch_whole(p, &op, READS, args.added, args.n_cols);
    touch_whole(p, &op, READS, args.gates, n_streams);
    touch(p, &op, WRITES, args.out);
    return record(p, op);
}

int program_mix_residuals(program *p, mix_residuals_args args) {
    operation op = {.name = "mix_residuals",
                    .args.mix_residuals = args,
                    .run_tile = p->kernels->ops->mix_residuals,
                    .width = args.n_cols,
                    .unit = args.n_cols};
    for (int i = 0; i < args.n_residuals; i++)
        touch(p, &op, READS, args.residuals[i]);
    touch(p, &op, WRITES, args.out);
    return record(p, op);
}

int program_select_outputs(program *p, select_outputs_args args) {
    operation op = {.name = "select_outputs",
                    .args.select_outputs = args,
                    .run_tile = p->kernels->ops->select_outputs,
                    .rows = ROWS_OUTPUTS,
                    .width = args.n_cols,
                    .unit = args.n_cols};
    touch_whole(p, &op, READS, args.x, args.n_cols);
    touch(p, &op, WRITES, args.out);
    return record(p, op);
}

// -- running ---------------------------------------------------------------------------------------------------------

step_error program_check(const program *p, const program_step *step, int *detail) {
    if ((*detail = step->n_tokens) < 1 || step->n_tokens > p->max_tokens)
        return STEP_N_TOKENS;
    if ((*detail = step->n_outputs) < 0 || step->n_outputs > step->n_tokens)
        return STEP_N_OUTPUTS;
    if ((*detail = step->kept_row) >= (p->lacks_room ? 0 : step->n_tokens))
        return STEP_KEPT_ROW;
    memset(p->is_used, 0, (size_t)p->n_slots);
    for (int i = 0; i < step->n_tokens; i++) {
        const int slot = step->slots[i];
        *detail = i;
        if (p->n_vocab && (step->token_ids[i] < 0 || step->token_ids[i] >= p->n_vocab))
            return STEP_TOKEN_ID;
        if (step->positions[i] < 0 || step->positions[i] >= p->context_length)
            return STEP_POSITION;
        if (slot < 0 || slot >= p->n_slots)
            return STEP_SLOT;
        const bool continues = i > 0 && step->slots[i - 1] == slot;
        if (continues ? step->positions[i] != step->positions[i - 1] + 1 : p->is_used[slot])
            return STEP_SEQUENCE;
        p->is_used[slot] = 1;
    }
    for (int i = 0; i < step->n_outputs; i++) {
        *detail = i;
        if (step->output_rows[i] < (i ? step->output_rows[i - 1] + 1 : 0) || step->output_rows[i] >= step->n_tokens)
            return STEP_OUTPUT_ROW;
    }
    return STEP_FITS;
}

// How the rows and the units of columns of a group are cut into tasks.
typedef struct {
    int n_rows, n_units, n_row_tasks, n_col_tasks;
} tile_cut;

// There are some tasks for each thread, but none that is over in no time.
static tile_cut cut_tiles(const program *p, const group *g, const worker *w) {
    const operation *first = &p->operations[g->first];
    const int n_rows = first->rows == ROWS_TOKENS ? w->step->n_tokens : w->step->n_outputs;
    const int n_units = (first->width + g->unit - 1) / g->unit, most_tasks = TASKS_PER_THREAD * w->n_threads;
    int n_row_tasks = 1, n_col_tasks = 1;
    if (g->in_order)
        n_col_tasks = smaller(n_units, most_tasks);
    else if (n_rows < 2 * w->n_threads)
        n_col_tasks = smaller(smaller(n_units, w->n_threads), larger(1, first->width / MIN_TASK_COLUMNS));
    if (!g->in_order)
        n_row_tasks = smaller(n_rows, larger(1, most_tasks / n_col_tasks));
    return (tile_cut){n_rows, n_units, n_row_tasks, n_col_tasks};
}

static void run_tile_task(const program *p, const group *g, const worker *w, tile_cut cut, int task) {
    const int width = p->operations[g->first].width;
    const int64_t row_task = task / cut.n_col_tasks, col_task = task % cut.n_col_tasks;
    const tile t = {(int)(cut.n_rows * row_task / cut.n_row_tasks),
                    (int)(cut.n_rows * (row_task + 1) / cut.n_row_tasks),
                    (int)(cut.n_units * col_task / cut.n_col_tasks) * g->unit,
                    smaller((int)(cut.n_units * (col_task + 1) / cut.n_col_tasks) * g->unit, width)};
    for (int i = g->first; i >= 0; i = p->operations[i].next)
        p->operations[i].run_tile(&p->operations[i].args, w->step, t);
}

static int next_task(const program *p, int n_tasks, const worker *w) {
    return take_task(p->taken, w->round, n_tasks, w->thread, w->n_threads);
}

static void run_tiles(const program *p, const group *g, const worker *w) {
    const tile_cut cut = cut_tiles(p, g, w);
    const int n_tasks = cut.n_row_tasks * cut.n_col_tasks;
    if (n_tasks <= w->n_threads) { // no need to ask for tasks, and a thread meets again what it wrote itself
        if (w->thread < n_tasks)
            run_tile_task(p, g, w, cut, w->thread);
        return;
    }
    for (int task; (task = next_task(p, n_tasks, w)) >= 0;)
        run_tile_task(p, g, w, cut, task);
}

// Of a run that begins with operation `from`.
static void run_group(const program *p, int index, int from, worker w) {
    const group *g = &p->groups[index];
    const operation *op = &p->operations[g->first];
    w.round = p->first_round + (uint64_t)index;
    w.awaited_round = op->waits_itself && p->groups[index - 1].first >= from ? w.round - 1 : 0;
    if (op->run_tile) {
        run_tiles(p, g, &w);
        return;
    }
    const int n_tasks = op->tasks->begin(&op->args, &w);
    for (int task; (task = next_task(p, n_tasks, &w)) >= 0;)
        op->tasks->run(&op->args, &w, task);
}

static step_view view_step(program *p, const program_step *step) {
    step_view view = {step->n_tokens, step->n_outputs,   0,      step->token_ids, step->positions,
                      step->slots,    step->output_rows, p->runs};
    for (int i = 0; i < step->n_tokens; i++) {
        if (i == 0 || step->slots[i] != step->slots[i - 1] || i - 1 == step->kept_row)
            p->runs[view.n_runs++] = (token_run){i, i, step->slots[i], false};
        p->runs[view.n_runs - 1].end = i + 1;
        p->runs[view.n_runs - 1].keeps = i == step->kept_row;
    }
    return view;
}

static void begin_run(program *p) {
    p->first_round = *p->next_round;
    *p->next_round += (uint64_t)p->n_groups;
}

void program_run(program *p, const program_step *step, int first, int last, double *seconds) {
    const step_view view = view_step(p, step);
    begin_run(p);

#pragma omp parallel num_threads(p->n_threads)
    {
        const int thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
        const worker w = {&view, thread, n_threads, p->scratch[thread], false, p->barrier.n_spins, 0, 0};
        double before = seconds_now();
        for (int g = 0; g < p->n_groups; g++) {
            if (p->groups[g].first < first || p->groups[g].first >= last)
                continue;
            if (p->groups[g].starts_phase && !seconds)
                team_meet(&p->barrier, n_threads);
            run_group(p, g, first, w);
            if (seconds) {
                team_meet(&p->barrier, n_threads);
                if (thread == 0) {
                    const double now = seconds_now();
                    seconds[g] = now - before;
                    before = now;
                }
            }
        }
    }
}

// -- serving requests ------------------------------------------------------------------------------------------------

enum { POLLS_PER_CLOCK = 1024 };

// What the first thread sends the team for: to compute a layer, or to fetch what is guessed of one until another
// request than `answered` is there. Layer n_layers: nothing more will be; -1: some `result` says why not.
typedef struct {
    int layer;
    bool is_guess;
    uint32_t answered;
} errand;

// Keeps what is guessed of a layer behind `layer`, if there is something; returns of which, or -1.
static int take_guess(program *const *layers, int n_layers, const exchange *e, int layer) {
    const uint32_t guessed = __atomic_load_n(e->guessed, __ATOMIC_ACQUIRE) - e->first;
    if (guessed >= (uint32_t)n_layers || (int)guessed <= layer)
        return -1;
    const program *p = layers[guessed];
    memcpy(p->guess, e->guessed_ids, (size_t)p->n_guessed * sizeof *p->guess);
    return (int)guessed;
}

static bool is_abandoned(const exchange *e) { return __atomic_load_n(e->abandoned, __ATOMIC_ACQUIRE); }

// Waits for the next request, or for a guess, and returns what is to be done after the errand `before`.
static errand await_errand(program *const *layers, int n_layers, const exchange *e, const errand *before,
                           serve_result *result) {
    const double start = seconds_now();
    const uint32_t polls_per_clock = (uint32_t)smaller(POLLS_PER_CLOCK, layers[0]->barrier.n_spins);
    double waited = 0.0;
    const uint32_t last = before->answered;
    for (uint32_t polls = 1;; polls++) {
        const uint32_t request = __atomic_load_n(e->requested, __ATOMIC_ACQUIRE);
        if (request != last && !is_abandoned(e)) {
            const uint32_t layer = request - e->first;
            return (errand){layer < (uint32_t)n_layers ? (int)layer : n_layers, false, request};
        }
        const int guessed = e->guessed ? take_guess(layers, n_layers, e, before->layer) : -1;
        if (guessed >= 0)
            return (errand){guessed, true, last};
        if (waited > PATIENCE_S || polls % polls_per_clock == 0) {
            waited = seconds_now() - start;
            *result = is_abandoned(e) ? SERVE_ABANDONED : waited > e->timeout_s ? SERVE_TIMED_OUT : SERVE_DONE;
            if (*result != SERVE_DONE)
                return (errand){-1, false, last};
            give_core_away(waited); // whoever asks may need this core
        }
        CPU_PAUSE();
    }
}

// Brings what this thread would read of the guessed experts, the likeliest first, into its caches, until the next
// request.
static void fetch_guess(const program *p, const worker *w, awaited_word next_request) {
    for (int rank = 0; rank < p->n_guessed; rank++)
        for (int g = 0; g < p->n_groups; g++) {
            const operation *op = &p->operations[p->groups[g].first];
            if (op->tasks && op->tasks->fetch)
                op->tasks->fetch(&op->args, w, p->guess[rank], next_request);
        }
}

// Counts what is asked for of a layer that was guessed about, and what of it had been guessed.
static void count_guess(const program *p, int64_t *guesses) {
    for (int i = 0; i < p->n_guessed; i++) {
        bool is_guessed = false;
        for (int j = 0; j < p->n_guessed; j++)
            is_guessed |= p->guess[j] == p->expert_ids[i];
        guesses[0] += p->expert_ids[i] >= 0;
        guesses[1] += p->expert_ids[i] >= 0 && is_guessed;
    }
}

// Adds the seconds since `before`, and returns the time.
static double add_time(double *sum, double before) {
    const double now = seconds_now();
    *sum += now - before;
    return now;
}

serve_result program_serve(program *const *layers, int n_layers, const program_step *step, const exchange *e) {
    program *leader = layers[0];
    const step_view view = view_step(leader, step);
    const bool takes_parts = e->guessed && step->n_tokens == 1;
    serve_result result = SERVE_DONE;
    // In turn: the first thread writes one when everybody has met since the other one was written, so has read that.
    errand errands[2] = {{-1, false, e->last}, {-1, false, e->last}};

#pragma omp parallel num_threads(leader->n_threads)
    {
        const int thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
        double before = thread == 0 ? seconds_now() : 0.0;
        for (int turn = 1;; turn = !turn) {
            errand *now = &errands[turn];
            if (thread == 0) {
                const errand *previous = &errands[!turn];
                *now = await_errand(layers, n_layers, e, previous, &result);
                if (!now->is_guess && now->layer >= 0 && now->layer < n_layers) {
                    if (previous->is_guess && previous->layer == now->layer)
                        count_guess(layers[now->layer], e->guesses);
                    begin_run(layers[now->layer]);
                    before = add_time(&e->seconds[now->layer], before);
                }
            }
            team_meet(&leader->barrier, n_threads);
            if (now->layer < 0 || now->layer == n_layers)
                break;
            program *p = layers[now->layer];
            const worker w = {&view, thread, n_threads, p->scratch[thread], takes_parts, p->barrier.n_spins, 0, 0};
            if (now->is_guess) {
                fetch_guess(p, &w, (awaited_word){e->requested, now->answered});
                continue;
            }
            for (int g = 0; g < p->n_groups; g++) {
                if (p->groups[g].starts_phase)
                    team_meet(&leader->barrier, n_threads);
                run_group(p, g, 0, w);
            }
            team_meet(&leader->barrier, n_threads);
            if (thread == 0) {
                __atomic_store_n(e->answered, now->answered, __ATOMIC_RELEASE);
                before = add_time(&e->seconds[n_layers + now->layer], before);
            }
        }
    }
    return result;
}
