/* The calls that a step on a CPU is made of, and what each is given; cpu_kernels.py has the same structures.
 *
 * A call computes on all threads of the team that it is called from, and returns to each of them when all are done; called
 * from no team, it computes on one. `run_calls` of cpu_step.c makes a team for one call or for all calls of a step.
 *
 * Letters as in ops.py: T tokens, R rows that decode, H query heads, K kv heads, D head dim, B block size, M blocks of a
 * row, E hidden size, V vocabulary. In a product M rows, N outputs, K inputs.
 */

#ifndef CPU_CALLS_H
#define CPU_CALLS_H

#include <stdint.h>

typedef struct {
    const int64_t *ids;
    const float *table;
    float *out;
    int64_t T, V, E;
    float scale;
} Embedding;

typedef struct {
    const float *x, *residual, *weight;
    float *out, *sum;
    int64_t x_row, T, E;
    float eps, offset;
} Norm;

typedef struct {
    const float *x, *packed, *bias;
    float *y;
    int64_t x_row, y_row, M, N, K, adds;
    float scale;
} Product; /* y = scale x W^T + b, or if it adds, y += that */

typedef struct {
    const float *q, *k, *v, *q_norm, *k_norm, *cos, *sin;
    const int64_t *positions, *slots;
    float *out, *k_cache, *v_cache;
    int64_t q_row, k_row, v_row, table_row, k_block, k_place, k_head, v_block, v_place, v_head;
    int64_t T, num_stored, H, K, D, B, turned;
    float eps, offset;
} Rope;

typedef struct {
    const float *q, *k, *v;
    float *out;
    const int64_t *tables, *lens;
    int64_t q_row, q_head, k_block, k_place, k_head, v_block, v_place, v_head, out_row, out_head;
    int64_t T, R, H, K, D, B, M, window;
    int64_t item_rows; /* rows that read a prefix together, at most; 0: as many as leave each thread some items */
    float scale, softcap;
} Attention;

typedef struct {
    const float *gate_up;
    float *out;
    int64_t row, T, F, is_silu;
} Gated;

typedef struct Plan Plan; /* which rows of an attention read what together */

void embed(const Embedding *call);
void norm(const Norm *call);
void multiply(const Product *call, int num_threads);
void rotate_and_store(const Rope *call);
void activate(const Gated *call);

Plan *new_plan(int64_t num_rows); /* NULL where there is no memory */
int64_t make_plan(Plan *plan, const Attention *call, int num_threads); /* the number of items; by one thread */
void attend_as_planned(const Plan *plan, const Attention *call);

#endif
