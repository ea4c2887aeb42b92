/* Calls on a team of threads: one by itself, or all those that a step of decoding is made of.
 *
 * A step that is called from Python call by call pays for each of them: the interpreter, an allocation, threads that are
 * woken and waited for. The same step recorded (cpu_step.py) is one array of calls, on one team.
 */

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu_calls.h"

enum { EMBEDDING, NORM, PRODUCT, ROPE, ATTENTION, GATED };
enum { SPINS = 2000 }; /* some 50 us */

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

static Team own_team(void) {
#ifdef _OPENMP
    return (Team){.me = omp_get_thread_num(), .num_threads = omp_get_num_threads()};
#else
    return (Team){.me = 0, .num_threads = 1};
#endif
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Wait until all tasks of a call are done. What is missing is at work: soon done, or on a core that others have taken, which
 * are then let pass here too. */
static void wait_for(_Atomic int64_t *num_done, int64_t num_tasks) {
    for (int64_t i = 0; atomic_load_explicit(num_done, memory_order_acquire) < num_tasks; i++) {
        if (i < SPINS) relax();
        else sched_yield();
    }
}

/* An attention with the step's inputs in place of those that it was recorded with, if there are some. */
static Attention attention_of(const Call *call, const Inputs *in) {
    Attention c = *(const Attention *)call->arguments;
    if (in != NULL) c.tables = in->tables, c.lens = in->lens, c.T = in->T, c.R = in->R, c.M = in->M;
    return c;
}

/* One call, with the step's inputs. Return the number of its tasks. */
static int64_t run_one(const Call *call, const Inputs *in, Plan *const *plans, Team *team) {
    switch (call->kind) {
    case EMBEDDING: {
        Embedding c = *(const Embedding *)call->arguments;
        if (in != NULL) c.ids = in->ids, c.T = in->T;
        return embed(&c, team);
    }
    case NORM: {
        Norm c = *(const Norm *)call->arguments;
        if (in != NULL) c.T = in->T;
        return norm(&c, team);
    }
    case PRODUCT: {
        Product c = *(const Product *)call->arguments;
        if (in != NULL) c.M = in->T;
        return multiply(&c, team);
    }
    case ROPE: {
        Rope c = *(const Rope *)call->arguments;
        if (in != NULL) c.positions = in->positions, c.slots = in->slots, c.T = in->T, c.num_stored = in->num_stored;
        return rotate_and_store(&c, team);
    }
    case ATTENTION: {
        const Attention c = attention_of(call, in);
        return attend_as_planned(plans[c.window > 0], &c, team);
    }
    case GATED: {
        Gated c = *(const Gated *)call->arguments;
        if (in != NULL) c.T = in->T;
        return activate(&c, team);
    }
    }
    return 0;
}

/* Plan attention with and without a window, once for all layers: they read the same rows. Return the items of all calls, -1
 * where there is no memory. */
static int64_t plan_all(const Call *calls, int64_t count, const Inputs *in, Plan **plans, int num_threads) {
    int64_t num_items[2] = {0}, total = 0;
    for (int64_t i = 0; i < count; i++) {
        if (calls[i].kind != ATTENTION) continue;
        const Attention c = attention_of(calls + i, in);
        const int windowed = c.window > 0;
        if (plans[windowed] == NULL) {
            if ((plans[windowed] = new_plan(c.R)) == NULL) return -1;
            num_items[windowed] = make_plan(plans[windowed], &c, num_threads);
        }
        total += num_items[windowed];
    }
    return total;
}

/* Run calls one after the other, and add the seconds of each kind. All attention among them is over the same rows, with the
 * same numbers of heads. Return the items that it has read, -1 where there is no memory. */
int64_t run_calls(const Call *calls, int64_t count, const Inputs *in, double *seconds, int num_threads) {
    Plan *plans[2] = {NULL, NULL};
    const size_t num_bytes = (size_t)(count * (num_threads + 1)) * sizeof(Share);
    Share *shares = aligned_alloc(_Alignof(Share), num_bytes); /* of each call, and a count of its tasks that are done */
    int64_t num_items = shares == NULL ? -1 : plan_all(calls, count, in, plans, num_threads);
    if (num_items >= 0) {
        memset(shares, 0, num_bytes);
#pragma omp parallel num_threads(num_threads)
        {
            double begun = now();
            for (int64_t i = 0; i < count; i++) {
                Team team = own_team();
                team.shares = shares + i * (num_threads + 1);
                const int64_t num_tasks = run_one(calls + i, in, plans, &team);
                _Atomic int64_t *num_done = &team.shares[num_threads].num_taken;
                atomic_fetch_add_explicit(num_done, team.num_done, memory_order_acq_rel);
                wait_for(num_done, num_tasks);
                if (seconds != NULL && team.me == 0) {
                    const double done = now();
                    seconds[calls[i].kind] += done - begun;
                    begun = done;
                }
            }
        }
    }
    free(plans[0]);
    free(plans[1]);
    free(shares);
    return num_items;
}
