/* Attention over paged keys and values on a CPU, in fp32, for rows that decode and for chunks of a prompt. G = H / K. */

#include <math.h>
#include <stdlib.h>

#include "cpu_calls.h"
#include "cpu_vectors.h"

enum { TILE = 64, MAX_QUERIES = 128 };
enum { ITEMS = 4 }; /* for each thread, at least */

typedef struct {
    float query[MAX_QUERIES * MAX_D]; /* scaled, one after the other */
    float total[MAX_QUERIES * MAX_D]; /* weighed values so far */
    float norm[MAX_QUERIES * W], top[MAX_QUERIES]; /* sums of weights, lane by lane; the highest scores */
    float keys[MAX_D * TILE]; /* transposed */
    float scores[MAX_QUERIES * TILE];
    const float *value[TILE];
    const float *next_key[TILE], *next_value[TILE]; /* of the tile after this one */
} __attribute__((aligned(64))) Scratch;

/* Scores of `count` queries over `width` vectors of a tile's keys, from key `at` on. */
INLINED void score(
    const Scratch *s, int64_t D, const float *query, float *scores, int at, const int count, const int width) {
    vf sum[ROWS][VECTORS] = {{{0}}};
    for (int64_t d = 0; d < D; d++) {
        vf keys[VECTORS];
        UNROLLED for (int v = 0; v < width; v++) keys[v] = load(s->keys + d * TILE + at + v * W);
        UNROLLED for (int i = 0; i < count; i++) {
            const vf x = all(query[i * D + d]);
            UNROLLED for (int v = 0; v < width; v++) sum[i][v] += x * keys[v];
        }
    }
    UNROLLED for (int i = 0; i < count; i++)
        UNROLLED for (int v = 0; v < width; v++) store(scores + i * TILE + at + v * W, sum[i][v]);
}

static void score_few(Scratch *s, int64_t D, int64_t first, int count, int num_keys) {
    const float *query = s->query + first * D;
    float *scores = s->scores + first * TILE;
    int at = 0;
    switch (count) {
#define CALL(n)                                                                                     \
    for (; at + PANEL - W < num_keys; at += PANEL) score(s, D, query, scores, at, n, VECTORS);      \
    for (; at < num_keys; at += W) score(s, D, query, scores, at, n, 1);                            \
    return;
        FOR_EACH_COUNT(CALL)
#undef CALL
    }
}

/* Add `num_keys` weighed values to `count` queries' sums, `width` vectors from dimension `at` on; on the way ask for the
 * values at `next`, if given: one by one, memory has them ready in time; all at once, they would be waited for. */
INLINED void weigh(
    const Scratch *s, int64_t D, const float *weights, float *totals, int64_t at, int num_keys, const float *const *next,
    const int count, const int width) {
    vf sum[ROWS][VECTORS];
    UNROLLED for (int i = 0; i < count; i++)
        UNROLLED for (int v = 0; v < width; v++) sum[i][v] = load(totals + i * D + at + v * W);
    for (int j = 0; j < num_keys; j++) {
        vf value[VECTORS];
        UNROLLED for (int v = 0; v < width; v++) value[v] = load(s->value[j] + at + v * W);
        UNROLLED for (int i = 0; i < count; i++) {
            const vf p = all(weights[i * TILE + j]);
            UNROLLED for (int v = 0; v < width; v++) sum[i][v] += p * value[v];
        }
        if (next != NULL)
            UNROLLED for (int v = 0; v < width; v += LINE / W) __builtin_prefetch(next[j] + at + v * W, 0, 2);
    }
    UNROLLED for (int i = 0; i < count; i++)
        UNROLLED for (int v = 0; v < width; v++) store(totals + i * D + at + v * W, sum[i][v]);
}

static void weigh_few(Scratch *s, int64_t D, int64_t first, int count, int num_keys, int asks) {
    const float *weights = s->scores + first * TILE, *const *next = asks ? s->next_value : NULL;
    float *totals = s->total + first * D;
    int64_t at = 0;
    switch (count) {
#define CALL(n)                                                                                                  \
    for (; at + PANEL <= D; at += PANEL) weigh(s, D, weights, totals, at, num_keys, next, n, VECTORS);           \
    for (; at < D; at += W) weigh(s, D, weights, totals, at, num_keys, next, n, 1);                              \
    return;
        FOR_EACH_COUNT(CALL)
#undef CALL
    }
}

/* The online softmax (Milakov and Gimelshein 2018) of one query over a tile. */
static inline void soften(const Attention *a, Scratch *s, int64_t query, int skipped, int num_keys) {
    float *scores = s->scores + query * TILE;
    if (a->softcap > 0.0f)
        for (int j = 0; j < TILE; j += W)
            store(scores + j, all(a->softcap) * tanh_of(load(scores + j) / all(a->softcap)));
    for (int j = 0; j < skipped; j++) scores[j] = -INFINITY;
    for (int j = num_keys; j < TILE; j++) scores[j] = -INFINITY;
    vf highest = load(scores);
    for (int j = W; j < TILE; j += W) highest = larger(highest, load(scores + j));
    const float old = s->top[query], tile = max_of(highest);
    const float top = tile > old ? tile : old, shift = top == -INFINITY ? 0.0f : top;
    float *norm = s->norm + query * W;
    vf sum = load(norm);
    if (top > old) {
        const float rescale = expf(old - shift);
        sum *= all(rescale);
        for (int64_t d = 0; d < a->D; d += W) {
            float *total = s->total + query * a->D + d;
            store(total, load(total) * all(rescale));
        }
        s->top[query] = top;
    }
    for (int j = 0; j < TILE; j += W) {
        const vf weight = exp_of_less(load(scores + j) - all(shift));
        store(scores + j, weight);
        sum += weight;
    }
    store(norm, sum);
    /* Not the 1e-38 that -inf became: a row's bits are those of the row alone, where other keys of the tile are none. */
    for (int j = 0; j < skipped; j++) scores[j] = 0.0f;
    for (int j = num_keys; j < TILE; j++) scores[j] = 0.0f;
}

/* Where a tile's keys and values lie; returns how many there are. Beyond the end the last one stands in. */
static inline int tokens_at(
    const Attention *a, const int64_t *table, int64_t kv_head, int64_t at, int64_t end, const float **key,
    const float **value) {
    const int num_keys = (int)(end - at < TILE ? end - at : TILE);
    int64_t block = at / a->B, place = at % a->B;
    for (int j = 0; j < num_keys;) { /* whole runs of a block: to divide for each token would cost more than to score it */
        const float *k = a->k + table[block] * a->k_block + place * a->k_place + kv_head * a->k_head;
        const float *v = a->v + table[block] * a->v_block + place * a->v_place + kv_head * a->v_head;
        for (; place < a->B && j < num_keys; place++, j++, k += a->k_place, v += a->v_place) {
            key[j] = k;
            value[j] = v;
        }
        block++;
        place = 0;
    }
    for (int j = num_keys; j < TILE; j++) {
        key[j] = key[num_keys - 1];
        value[j] = value[num_keys - 1];
    }
    return num_keys;
}

typedef struct {
    const int64_t *table;
    int64_t begin, end;
} Tokens;

typedef struct {
    int64_t first_block, row;
} Place;

static inline int within(int64_t x, int most) { return (int)(x < 0 ? 0 : x > most ? most : x); }

/* Attend queries `first` to `last` to tokens, each to those that its row has and that no window hides from it. `after` is
 * what comes next. */
static void attend(
    const Attention *a, Scratch *s, const Place *rows, int64_t kv_head, int64_t first, int64_t last, Tokens tokens,
    Tokens after) {
    const int64_t D = a->D, G = a->H / a->K, end = tokens.end;
    for (int64_t at = tokens.begin; at < end; at += TILE) {
        while (a->lens[rows[first / G].row] <= at) first++;
        const float *key[TILE];
        const int num_keys = tokens_at(a, tokens.table, kv_head, at, end, key, s->value);
        const Tokens next = at + TILE < end ? (Tokens){tokens.table, at + TILE, end} : after;
        if (next.begin < next.end)
            tokens_at(a, next.table, kv_head, next.begin, next.end, s->next_key, s->next_value);
        for (int64_t d = 0; d < D; d += W)
            for (int j = 0; j < num_keys; j += W) {
                transpose(key + j, d, s->keys + d * TILE + j, TILE, 0);
                if (d % LINE == 0)
                    for (int i = 0; i < W; i++) __builtin_prefetch(s->next_key[j + i] + d, 0, 2);
            }
        for (int64_t query = first; query < last; query += ROWS) score_few(s, D, query, within(last - query, ROWS), num_keys);
        for (int64_t query = first; query < last; query++) {
            const int64_t length = a->lens[rows[query / G].row];
            const int seen = within(length - at, num_keys);
            const int skipped = a->window > 0 ? within(length - a->window - at, num_keys) : 0;
            if (skipped < seen)
                soften(a, s, query, skipped, seen);
            else
                memset(s->scores + query * TILE, 0, TILE * sizeof(float));
        }
        for (int64_t query = first; query < last; query += ROWS)
            weigh_few(s, D, query, within(last - query, ROWS), num_keys, query == first);
    }
}

/* The tile where a row of `length` tokens begins to see some. */
static inline int64_t from_window(const Attention *a, int64_t length) {
    return a->window > 0 && length > a->window ? (length - a->window) / TILE * TILE : 0;
}

/* The rows of `count` places, which have their first `shared` tokens in the same blocks, over one kv head. */
static void attend_rows(const Attention *a, Scratch *s, const Place *at, int64_t count, int64_t shared, int64_t kv_head) {
    const int64_t G = a->H / a->K, D = a->D, num_queries = count * G;
    for (int64_t i = 0; i < num_queries; i++) {
        const float *q = a->q + at[i / G].row * a->q_row + (kv_head * G + i % G) * a->q_head;
        for (int64_t d = 0; d < D; d += W) store(s->query + i * D + d, load(q + d) * all(a->scale));
        memset(s->total + i * D, 0, (size_t)D * sizeof(float));
        s->top[i] = -INFINITY;
        store(s->norm + i * W, all(0.0f));
    }
    Tokens own = {a->tables + at->row * a->M, shared, a->lens[at->row]};
    if (a->M == 0) { /* tokens of a chunk: the last one sees what any of them sees */
        own = (Tokens){a->tables, from_window(a, own.end), a->lens[at[count - 1].row]};
        attend(a, s, at, kv_head, 0, num_queries, own, (Tokens){0});
        count = 0;
    } else if (shared) {
        attend(a, s, at, kv_head, 0, num_queries, (Tokens){own.table, 0, shared}, own);
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t next = at[i + 1 < count ? i + 1 : i].row;
        if (!shared) own.begin = from_window(a, own.end);
        const Tokens after = {a->tables + next * a->M, shared, i + 1 < count ? a->lens[next] : 0};
        attend(a, s, at, kv_head, i * G, i * G + G, own, after);
        own = after;
    }
    for (int64_t i = 0; i < num_queries; i++) {
        float *out = a->out + at[i / G].row * a->out_row + (kv_head * G + i % G) * a->out_head;
        const float norm = sum_of(load(s->norm + i * W));
        const float inverse = norm > 0.0f ? 1.0f / norm : 0.0f; /* a row of length 0 gives zeros */
        for (int64_t d = 0; d < D; d += W) store(out + d, load(s->total + i * D + d) * all(inverse));
    }
}

/* How many of `places`, at most `most`, begin with the same blocks, and how many tokens lie in these. All that is shared
 * is whole blocks before a row's last: what is written to is a row's own. And whole tiles, so that a row meets the tiles
 * that it meets alone: its bits do not depend on who shares. A row with a window reads by itself. */
static int64_t alike(const Attention *a, const Place *at, int64_t places, int64_t most, int64_t *shared) {
    const int64_t first = at->row, *ours = a->tables + first * a->M;
    int64_t count = 1, blocks = a->lens[first] > 0 ? (a->lens[first] - 1) / a->B : 0, tokens = 0;
    if (a->window > 0) most = 1;
    while (count < most && count < places) {
        const int64_t row = at[count].row, *theirs = a->tables + row * a->M;
        const int64_t whole = a->lens[row] > 0 ? (a->lens[row] - 1) / a->B : 0;
        int64_t same = 0;
        while (same < blocks && same < whole && ours[same] == theirs[same]) same++;
        const int64_t whole_tiles = same * a->B / TILE * TILE;
        if (whole_tiles == 0 || (2 * whole_tiles < tokens && count > 1)) break; /* a stranger would split the others' */
        blocks = same;
        tokens = whole_tiles;
        count++;
    }
    *shared = tokens;
    return count;
}

static int by_first_block(const void *a, const void *b) {
    const Place *x = a, *y = b;
    if (x->first_block != y->first_block) return x->first_block < y->first_block ? -1 : 1;
    return x->row < y->row ? -1 : x->row > y->row;
}

typedef struct {
    int64_t place, count, shared;
} Item;

struct Plan {
    Place *at;
    Item *items;
    int64_t num_items;
};

Plan *new_plan(int64_t num_rows) {
    const size_t rows = (size_t)num_rows + 1;
    Plan *plan = malloc(sizeof(Plan) + rows * (sizeof(Place) + sizeof(Item)));
    if (plan == NULL) return NULL;
    plan->at = (Place *)(plan + 1);
    plan->items = (Item *)(plan->at + rows);
    return plan;
}

/* Rows of one table (M = 0) are tokens of a chunk, in rising order of their lengths. */
int64_t make_plan(Plan *plan, const Attention *a, int num_threads) {
    const int64_t G = a->H / a->K;
    int64_t most = a->item_rows > 0 ? a->item_rows : a->R * a->K / (ITEMS * num_threads);
    if (most < 1) most = 1;
    if (most * G > MAX_QUERIES) most = MAX_QUERIES / G;
    for (int64_t row = 0; row < a->R; row++) plan->at[row] = (Place){a->tables[row * a->M], row};
    qsort(plan->at, (size_t)a->R, sizeof(Place), by_first_block);
    plan->num_items = 0;
    for (int64_t place = 0; place < a->R;) {
        Item *item = plan->items + plan->num_items++;
        *item = (Item){place, a->R - place < most ? a->R - place : most, 0};
        if (a->M) item->count = alike(a, plan->at + place, a->R - place, most, &item->shared);
        place += item->count;
    }
    return plan->num_items;
}

static _Thread_local Scratch scratch; /* kept: fresh memory for each call would be mapped and cleared for each call */

/* What lies behind the rows that decode is padding: zeros, by whoever does the first task. */
int64_t attend_as_planned(const Plan *plan, const Attention *a, Team *team) {
    const int64_t num_tasks = plan->num_items * a->K;
    Scratch *s = &scratch;
    __asm__("" : "+r"(s)); /* else every use of it, in the innermost loops too, asks anew where this thread's lies */
    for (int64_t task; (task = take(team, num_tasks)) >= 0;) {
        /* The last item of a chunk sees most: nobody shall wait for it. */
        const Item *item = plan->items + plan->num_items - 1 - task / a->K;
        attend_rows(a, s, plan->at + item->place, item->count, item->shared, task % a->K);
        for (int64_t row = a->R; task == 0 && row < a->T; row++)
            for (int64_t head = 0; head < a->H; head++)
                memset(a->out + row * a->out_row + head * a->out_head, 0, (size_t)a->D * sizeof(float));
    }
    return num_tasks;
}
