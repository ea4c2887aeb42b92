/* The calls that a step on a CPU is made of, and what each is given; cpu_calls.py has the same structures.
 *
 * All threads of a team make a call, and share its tasks. `run_calls` of cpu_step.c makes a team for one call or for all
 * calls of a step.
 *
 * Letters as in ops.py: T tokens, R rows that decode, H query heads, K kv heads, D head dim, B block size, M blocks of a
 * row, E hidden size, V vocabulary. In a product M rows, N outputs, K inputs.
 */

#ifndef CPU_CALLS_H
#define CPU_CALLS_H

#include <stdatomic.h>
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

/* A call's tasks, in an order in which neighbours read and write what lies together. Each thread has a share of its own, one
 * task after the next, so that it comes back to what it wrote in the call before, which its own cache holds; when it is done
 * it helps the others. A call is over when all tasks are done, whoever did them: a thread whose core others have taken is
 * not waited for, unless it has begun one. */
typedef struct {
    _Alignas(64) _Atomic int64_t num_taken;
} Share;

typedef struct {
    Share *shares; /* of this call, one for each thread; all are 0 before it */
    int me, num_threads;
    int num_helped;   /* shares that are done, from this thread's own on */
    int64_t num_done; /* tasks that this thread has done */
} Team;

/* Return the thread's next task of `num_tasks`, or -1; the one before is done then. */
static inline int64_t take(Team *team, int64_t num_tasks) {
    for (; team->num_helped < team->num_threads; team->num_helped++) {
        const int whose = (team->me + team->num_helped) % team->num_threads;
        const int64_t begin = num_tasks * whose / team->num_threads, end = num_tasks * (whose + 1) / team->num_threads;
        const int64_t task = begin + atomic_fetch_add_explicit(&team->shares[whose].num_taken, 1, memory_order_relaxed);
        if (task < end) {
            team->num_done++;
            return task;
        }
    }
    return -1;
}

typedef struct Plan Plan; /* which rows of an attention read what together */

/* All return the number of their tasks. */
int64_t embed(const Embedding *call, Team *team);
int64_t norm(const Norm *call, Team *team);
int64_t multiply(const Product *call, Team *team);
int64_t rotate_and_store(const Rope *call, Team *team);
int64_t activate(const Gated *call, Team *team);
int64_t attend_as_planned(const Plan *plan, const Attention *call, Team *team);

Plan *new_plan(int64_t num_rows); /* NULL where there is no memory */
int64_t make_plan(Plan *plan, const Attention *call, int num_threads); /* the number of items */

#endif
