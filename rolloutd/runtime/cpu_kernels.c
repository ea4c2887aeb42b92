/* What stands between the matrix products of a decoding step, on a CPU, in fp32: compiled at first use by
 * cpu_kernels.py, which checks all arguments.
 *
 * Letters as in ops.py: R rows, H query heads, K kv heads, G = H / K, D head dim, B block size, M blocks of a row.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Vectors of GCC and Clang, 16 floats wide: one register with AVX-512, two with AVX2, four with NEON. */
typedef float vf __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(64), aligned(4), may_alias));
enum { W = 16 };

static inline vf load(const float *p) { return *(const vf *)p; }
static inline void store(float *p, vf v) { *(vf *)p = v; }
static inline vf all(float x) { return (vf){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
static inline vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
static inline vf larger(vf a, vf b) { return choose(a > b, a, b); }

/* e^x for x within +-87.3, within 2 ulp. Cephes' expf: x = n ln 2 + r, a polynomial for e^r, n into the exponent. */
static inline vf exp_within(vf x) {
    const vf shifted = x * all(1.44269504088896341f) + all(12582912.0f); /* rounds to an integer in the low bits */
    const vf n = shifted - all(12582912.0f);
    const vf r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
    vf p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * r * r + r + all(1.0f);
    /* shifted is 1.5 * 2^23 + n: its low bits are n, and p is within 0.7 and 1.5 */
    return (vf)((vi)p + ((vi)shifted << 23));
}

static inline vf exp_of(vf x) {
    const vi under = x < all(-87.3f);
    x = choose(x > all(88.3f), all(88.3f), choose(under, all(-87.3f), x));
    return choose(under, all(0.0f), exp_within(x));
}

/* e^x for x <= 0 in a sum that holds e^0: what is below -87.3, -inf too, adds 1e-38 or nothing. */
static inline vf exp_of_less(vf x) { return exp_within(larger(x, all(-87.3f))); }

static inline vf tanh_of(vf x) {
    const vf e = exp_of(all(2.0f) * choose(x < all(0.0f), x, -x)); /* of -2 |x|: no overflow */
    const vf positive = (all(1.0f) - e) / (all(1.0f) + e);
    return choose(x < all(0.0f), -positive, positive);
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
#define LOW_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LOW_4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW_2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW_1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31

static inline float sum_of(vf v) {
    float total = 0.0f;
    for (int i = 0; i < W; i++) total += v[i];
    return total;
}

static inline float max_of(vf v) {
    v = larger(v, SHUFFLE(v, v, HIGH_8));
    v = larger(v, SHUFFLE(v, v, HIGH_4));
    v = larger(v, SHUFFLE(v, v, HIGH_2));
    return v[0] > v[1] ? v[0] : v[1];
}

/* ---------------------------------------------------------------------------------------------- attention */

enum { TILE = 64, MAX_QUERIES = 128, MAX_D = 256 };

typedef struct {
    const float *q, *k, *v;
    float *out;
    const int64_t *tables, *lens;
    int64_t q_row, q_head, k_block, k_place, k_head, v_block, v_place, v_head, out_row, out_head;
    int64_t R, H, K, D, B, M, window;
    float scale, softcap;
} Attention;

typedef struct {
    float query[MAX_QUERIES * MAX_D]; /* scaled, one after the other */
    float total[MAX_QUERIES * MAX_D]; /* weighed values so far */
    float norm[MAX_QUERIES * W], top[MAX_QUERIES]; /* sums of weights, lane by lane; the highest scores */
    float keys[MAX_D * TILE]; /* transposed */
    float scores[MAX_QUERIES * TILE];
    const float *value[TILE];
    const float *next_key[TILE], *next_value[TILE]; /* of the tile after this one */
} __attribute__((aligned(64))) Scratch;

/* Transpose W keys of W dimensions: in four rounds pairs of rows exchange halves, quarters, eighths, single elements. */
static inline void transpose(const float *const *rows, int64_t at, float *out) {
    vf a[W], b[W];
    for (int i = 0; i < W; i++) a[i] = load(rows[i] + at);
#define ROUND(from, to, step)                                                  \
    for (int i = 0; i < W; i++)                                                \
        if (!(i & step)) {                                                     \
            to[i] = SHUFFLE(from[i], from[i + step], LOW_##step);              \
            to[i + step] = SHUFFLE(from[i], from[i + step], HIGH_##step);      \
        }
    ROUND(a, b, 8)
    ROUND(b, a, 4)
    ROUND(a, b, 2)
    ROUND(b, a, 1)
#undef ROUND
    for (int i = 0; i < W; i++) store(out + i * TILE, a[i]);
}

/* Scores of `count` queries (at most 4) over a tile's keys. */
static inline void score(const Attention *a, Scratch *s, int64_t first, int count) {
    const int64_t D = a->D;
    const float *q = s->query + first * D;
    vf sum[4][TILE / W] = {{{0}}};
    for (int64_t d = 0; d < D; d++) {
        vf keys[TILE / W];
        for (int w = 0; w < TILE / W; w++) keys[w] = load(s->keys + d * TILE + w * W);
        for (int i = 0; i < count; i++) {
            const vf x = all(q[i * D + d]);
            for (int w = 0; w < TILE / W; w++) sum[i][w] += x * keys[w];
        }
    }
    for (int i = 0; i < count; i++)
        for (int w = 0; w < TILE / W; w++) store(s->scores + (first + i) * TILE + w * W, sum[i][w]);
}

/* Add `num_keys` weighed values to `count` queries' sums, `width` vectors from dimension `at` on. The first queries ask
 * for the next tile's values on the way: one by one, memory has them ready in time; all at once, they would be waited for.
 */
static inline void weigh(Scratch *s, int64_t D, int64_t first, int count, int64_t at, int width, int num_keys) {
    vf sum[4][4];
    for (int i = 0; i < count; i++)
        for (int w = 0; w < width; w++) sum[i][w] = load(s->total + (first + i) * D + at + w * W);
    for (int j = 0; j < num_keys; j++) {
        vf value[4];
        for (int w = 0; w < width; w++) value[w] = load(s->value[j] + at + w * W);
        if (first < 4)
            for (int w = 0; w < width; w++) __builtin_prefetch(s->next_value[j] + at + w * W);
        for (int i = 0; i < count; i++) {
            const vf p = all(s->scores[(first + i) * TILE + j]);
            for (int w = 0; w < width; w++) sum[i][w] += p * value[w];
        }
    }
    for (int i = 0; i < count; i++)
        for (int w = 0; w < width; w++) store(s->total + (first + i) * D + at + w * W, sum[i][w]);
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
            for (int j = 0; j < TILE; j += W) {
                transpose(key + j, d, s->keys + d * TILE + j);
                for (int i = 0; i < W; i++) __builtin_prefetch(s->next_key[j + i] + d);
            }
        int64_t query = first;
        for (; query + 4 <= last; query += 4) score(a, s, query, 4);
        for (; query < last; query++) score(a, s, query, 1);
        for (query = first; query < last; query++) {
            const int64_t length = a->lens[rows[query / G].row];
            const int seen = within(length - at, num_keys);
            const int skipped = a->window > 0 ? within(length - a->window - at, num_keys) : 0;
            if (skipped < seen)
                soften(a, s, query, skipped, seen);
            else
                memset(s->scores + query * TILE, 0, TILE * sizeof(float));
        }
        for (query = first; query + 4 <= last; query += 4) {
            int64_t d = 0;
            for (; d + 4 * W <= D; d += 4 * W) weigh(s, D, query, 4, d, 4, num_keys);
            for (; d < D; d += W) weigh(s, D, query, 4, d, 1, num_keys);
        }
        for (; query < last; query++) {
            int64_t d = 0;
            for (; d + 4 * W <= D; d += 4 * W) weigh(s, D, query, 1, d, 4, num_keys);
            for (; d < D; d += W) weigh(s, D, query, 1, d, 1, num_keys);
        }
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

static _Thread_local Scratch scratch; /* kept: fresh memory for each call would be mapped and cleared for each call */

/* Return the number of items, or -1 where there is no memory. `most` rows share a prefix; 1 reads each row by itself.
 * Rows of one table (M = 0) are tokens of a chunk, in rising order of their lengths. */
int64_t decode_attention(const Attention *a, int64_t most, int num_threads) {
    const int64_t G = a->H / a->K;
    Place *at = malloc((size_t)(a->R + 1) * sizeof(Place));
    Item *items = malloc((size_t)(a->R + 1) * sizeof(Item));
    if (at == NULL || items == NULL) {
        free(at);
        free(items);
        return -1;
    }
    for (int64_t row = 0; row < a->R; row++) at[row] = (Place){a->tables[row * a->M], row};
    qsort(at, (size_t)a->R, sizeof(Place), by_first_block);
    int64_t num_items = 0;
    if (most * G > MAX_QUERIES) most = MAX_QUERIES / G;
    for (int64_t place = 0; place < a->R;) {
        Item *item = items + num_items++;
        item->place = place;
        item->shared = 0;
        if (a->M == 0)
            item->count = a->R - place < most ? a->R - place : most;
        else
            item->count = alike(a, at + place, a->R - place, most, &item->shared);
        place += item->count;
    }
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(num_threads)
    for (int64_t i = num_items - 1; i >= 0; i--) /* the last of a chunk sees most: nobody shall wait for it */
        for (int64_t kv_head = 0; kv_head < a->K; kv_head++)
            attend_rows(a, &scratch, at + items[i].place, items[i].count, items[i].shared, kv_head);
    free(at);
    free(items);
    return num_items;
}

/* ---------------------------------------------------------------------------------------------- the draw */

/* 53 bits of Philox4x32-10 (Salmon et al. 2011), as kernels/draw.py. */
static double uniform(uint64_t seed, uint64_t index, uint64_t position) {
    uint32_t c0 = (uint32_t)position, c1 = (uint32_t)(position >> 32), c2 = (uint32_t)index, c3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < 10; i++) {
        const uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
        const uint32_t b0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, b2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = b0;
        c2 = b2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (double)(((uint64_t)c0 << 21) ^ (c1 >> 11)) * 0x1p-53;
}

enum { SPAN = 1024, MAX_SPANS = 1024 };

/* Token, and log p of it, of one row of V logits: two passes, of which the second reads one span of 1024. */
static void draw_row(
    const float *logits, int64_t V, float temperature, uint64_t seed, uint64_t index, uint64_t position,
    int64_t *token, float *logprob, float *sampling) {
    *token = 0;
    *logprob = *sampling = 0.0f;
    if (temperature < 0.0f) return; /* padding */
    const float inverse_t = temperature > 0.0f ? 1.0f / temperature : 1.0f;
    const int64_t num_spans = (V + SPAN - 1) / SPAN;
    float top[MAX_SPANS], sum[MAX_SPANS], highest = -INFINITY;
    int sound = 1;
    for (int64_t i = 0; i < num_spans; i++) {
        const float *z = logits + i * SPAN;
        const int64_t size = V - i * SPAN < SPAN ? V - i * SPAN : SPAN, whole = size / W * W;
        vf most = all(-INFINITY);
        vi bad = {0};
        for (int64_t j = 0; j < whole; j += W) {
            const vf x = load(z + j);
            most = larger(x, most);
            bad |= (x != x) | (x == all(INFINITY));
        }
        float m = max_of(most);
        for (int j = 0; j < W; j++) sound &= !bad[j];
        for (int64_t j = whole; j < size; j++) {
            m = z[j] > m ? z[j] : m;
            sound &= z[j] < INFINITY; /* false for NaN */
        }
        const float base = m == -INFINITY ? 0.0f : m;
        vf total = all(0.0f);
        for (int64_t j = 0; j < whole; j += W) {
            __builtin_prefetch(z + SPAN + j); /* memory brings the next span meanwhile */
            total += exp_of_less((load(z + j) - all(base)) * all(inverse_t));
        }
        float rest = 0.0f;
        for (int64_t j = whole; j < size; j++) rest += expf((z[j] - base) * inverse_t);
        top[i] = m;
        sum[i] = sum_of(total) + rest;
        highest = m > highest ? m : highest;
    }
    if (!sound || highest == -INFINITY) {
        *logprob = *sampling = NAN;
        return;
    }
    double whole = 0.0;
    for (int64_t i = 0; i < num_spans; i++) whole += (double)(sum[i] * expf((top[i] - highest) * inverse_t));
    const double log_sum = log(whole);
    if (temperature == 0.0f) {
        int64_t i = 0, j = 0;
        while (top[i] != highest) i++;
        while (logits[i * SPAN + j] != highest) j++;
        *token = i * SPAN + j;
        *logprob = (float)-log_sum;
        return;
    }
    const double target = uniform(seed, index, position) * whole;
    double below = 0.0, before = 0.0;
    int64_t span = 0;
    for (int64_t i = 0; i < num_spans && below <= target; i++) { /* the last with any weight takes what rounding leaves */
        const double part = (double)(sum[i] * expf((top[i] - highest) * inverse_t));
        if (part <= 0.0) continue;
        span = i;
        before = below;
        below += part;
    }
    const int64_t first = span * SPAN, end = first + SPAN < V ? first + SPAN : V;
    for (int64_t j = first; j < end && before <= target; j++) {
        const double part = (double)expf((logits[j] - highest) * inverse_t);
        if (part <= 0.0) continue;
        *token = j;
        before += part;
    }
    *logprob = *sampling = (float)((double)(logits[*token] - highest) / (double)temperature - log_sum);
}

void draw(
    const float *logits, int64_t stride, int64_t R, int64_t V, const float *temperature, const uint64_t *seed,
    const uint64_t *index, const uint64_t *position, int64_t *token, float *logprob, float *sampling,
    int num_threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
    for (int64_t row = 0; row < R; row++)
        draw_row(
            logits + row * stride, V, temperature[row], seed[row], index[row], position[row], token + row,
            logprob + row, sampling + row);
}

/* ---------------------------------------------------------------------------------------------- between products */

static inline float square_sum(const float *x, int64_t E) {
    vf total = all(0.0f);
    int64_t e = 0;
    for (; e + W <= E; e += W) total += load(x + e) * load(x + e);
    float rest = 0.0f;
    for (; e < E; e++) rest += x[e] * x[e];
    return sum_of(total) + rest;
}

/* out = norm(x + residual) * (offset + weight), sum = x + residual; without a residual sum is not written. */
void rms_norm(
    const float *x, int64_t x_stride, const float *residual, const float *weight, float *out, float *sum, int64_t T,
    int64_t E, float eps, float offset, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t row = 0; row < T; row++) {
        const float *from = x + row * x_stride;
        float *to = out + row * E;
        if (residual != NULL) {
            float *both = sum + row * E;
            for (int64_t e = 0; e < E; e++) both[e] = residual[row * E + e] + from[e];
            from = both;
        }
        const float scale = 1.0f / sqrtf(square_sum(from, E) / (float)E + eps);
        for (int64_t e = 0; e < E; e++) to[e] = from[e] * scale * (offset + weight[e]);
    }
}

/* out = activation(gate) * up; gate_up has the two side by side. */
void gated(const float *gate_up, int64_t stride, float *out, int64_t T, int64_t F, int is_silu, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t row = 0; row < T; row++) {
        const float *gate = gate_up + row * stride, *up = gate + F;
        float *to = out + row * F;
        int64_t f = 0;
        for (; f + W <= F; f += W) {
            const vf x = load(gate + f);
            vf active;
            if (is_silu) {
                active = x / (all(1.0f) + exp_of(-x));
            } else {
                const vf inner = all(0.7978845608028654f) * (x + all(0.044715f) * x * x * x);
                active = all(0.5f) * x * (all(1.0f) + tanh_of(inner));
            }
            store(to + f, active * load(up + f));
        }
        for (; f < F; f++) {
            const float x = gate[f], inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
            to[f] = (is_silu ? x / (1.0f + expf(-x)) : 0.5f * x * (1.0f + tanhf(inner))) * up[f];
        }
    }
}

typedef struct {
    const float *q, *k, *v, *q_norm, *k_norm, *cos, *sin;
    const int64_t *positions, *slots;
    float *out, *k_cache, *v_cache;
    int64_t q_row, k_row, v_row, table_row, k_slot, k_head, v_slot, v_head;
    int64_t T, num_stored, H, K, D, turned;
    float eps, offset;
} Rope;

static inline void turn(const Rope *r, const float *from, const float *norm, int64_t position, float *to) {
    const int64_t D = r->D, half = r->turned / 2;
    float head[MAX_D];
    if (norm != NULL) {
        const float scale = 1.0f / sqrtf(square_sum(from, D) / (float)D + r->eps);
        for (int64_t d = 0; d < D; d++) head[d] = from[d] * scale * (r->offset + norm[d]);
        from = head;
    }
    if (r->turned) {
        const float *cosine = r->cos + position * r->table_row, *sine = r->sin + position * r->table_row;
        for (int64_t d = 0; d < half; d++) {
            const float a = from[d], b = from[d + half];
            to[d] = a * cosine[d] - b * sine[d];
            to[d + half] = b * cosine[d + half] + a * sine[d + half];
        }
    }
    for (int64_t d = r->turned; d < D; d++) to[d] = from[d];
}

/* Queries, normed and turned, to `out`; keys, the same, and values to the cache. */
void rope_and_store(const Rope *r, int num_threads) {
    const int64_t D = r->D;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t row = 0; row < r->T; row++) {
        const int64_t position = r->positions[row];
        for (int64_t h = 0; h < r->H; h++)
            turn(r, r->q + row * r->q_row + h * D, r->q_norm, position, r->out + (row * r->H + h) * D);
        if (row >= r->num_stored) continue;
        const int64_t slot = r->slots[row];
        for (int64_t h = 0; h < r->K; h++) {
            turn(r, r->k + row * r->k_row + h * D, r->k_norm, position, r->k_cache + slot * r->k_slot + h * r->k_head);
            memcpy(r->v_cache + slot * r->v_slot + h * r->v_head, r->v + row * r->v_row + h * D, (size_t)D * sizeof(float));
        }
    }
}
