/* Calls on a team of threads: one by itself, or all those that a step of decoding is made of.
 *
 * A step that is called from Python call by call pays for each of them: the interpreter, an allocation, threads that are
 * woken and waited for. The same step recorded (cpu_step.py) is one array of calls, on one team.
 */

#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu_calls.h"

enum { EMBEDDING, NORM, PRODUCT, ROPE, ATTENTION, GATED, NUM_KINDS };

typedef struct {
    int64_t kind;
    const void *arguments;
} Call;

/* What differs from step to step. */
typedef struct {
    const int64_t *ids, *positions, *slots, *tables, *lens;
    int64_t T, R, num_stored, M;
} Inputs;

int has_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

static double now(void) {
#ifdef _OPENMP
    return omp_get_wtime();
#else
    return 0.0;
#endif
}

static Team own_team(Share *shares) {
#ifdef _OPENMP
    return (Team){shares, omp_get_thread_num(), omp_get_num_threads()};
#else
    return (Team){shares, 0, 1};
#endif
}

/* One call with the step's inputs in place of those that it was recorded with, if there are some. */
static void run_one(const Call *call, const Inputs *in, Plan *plan, int64_t *num_items, const Team *team) {
    switch (call->kind) {
    case EMBEDDING: {
        Embedding c = *(const Embedding *)call->arguments;
        if (in != NULL) c.ids = in->ids, c.T = in->T;
        embed(&c, team);
        return;
    }
    case NORM: {
        Norm c = *(const Norm *)call->arguments;
        if (in != NULL) c.T = in->T;
        norm(&c, team);
        return;
    }
    case PRODUCT: {
        Product c = *(const Product *)call->arguments;
        if (in != NULL) c.M = in->T;
        multiply(&c, team);
        return;
    }
    case ROPE: {
        Rope c = *(const Rope *)call->arguments;
        if (in != NULL) c.positions = in->positions, c.slots = in->slots, c.T = in->T, c.num_stored = in->num_stored;
        rotate_and_store(&c, team);
        return;
    }
    case ATTENTION: {
        Attention c = *(const Attention *)call->arguments;
        if (in != NULL) c.tables = in->tables, c.lens = in->lens, c.T = in->T, c.R = in->R, c.M = in->M;
#pragma omp single
        *num_items += make_plan(plan, &c, team->num_threads);
        attend_as_planned(plan, &c, team);
        return;
    }
    case GATED: {
        Gated c = *(const Gated *)call->arguments;
        if (in != NULL) c.T = in->T;
        activate(&c, team);
        return;
    }
    }
}

/* Run calls one after the other, and add the seconds of each kind. `num_rows` are those of an attention among them, at
 * most. Return the items that attention has read, -1 where there is no memory to plan it. */
int64_t run_calls(const Call *calls, int64_t count, const Inputs *in, int64_t num_rows, double *seconds, int num_threads) {
    Plan *plan = num_rows > 0 ? new_plan(num_rows) : NULL;
    Share *shares = aligned_alloc(_Alignof(Share), 2 * (size_t)num_threads * sizeof(Share));
    int64_t num_items = 0;
    if (shares == NULL || (num_rows > 0 && plan == NULL)) {
        free(shares);
        free(plan);
        return -1;
    }
    for (int i = 0; i < 2 * num_threads; i++) atomic_init(&shares[i].num_taken, 0);
#pragma omp parallel num_threads(num_threads)
    {
        double begun = now();
        for (int64_t i = 0; i < count; i++) {
            const Team team = own_team(shares + i % 2 * num_threads);
            run_one(calls + i, in, plan, &num_items, &team);
#pragma omp barrier
            /* Nobody takes of these shares any more, until the call after the next one. */
            atomic_store_explicit(&team.shares[team.me].num_taken, 0, memory_order_relaxed);
            if (seconds != NULL && team.me == 0) {
                const double done = now();
                seconds[calls[i].kind] += done - begun;
                begun = done;
            }
        }
    }
    free(shares);
    free(plan);
    return num_items;
}
