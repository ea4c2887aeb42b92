/* What stands between the matrix products of a step, on a CPU, in fp32. */

#include <math.h>

#include "cpu_calls.h"
#include "cpu_vectors.h"

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
        vi finite = ~(vi){0};
        for (int64_t j = 0; j < whole; j += W) {
            const vf x = load(z + j);
            most = larger(x, most);
            finite &= x < all(INFINITY); /* false for NaN */
        }
        float m = max_of(most);
        for (int j = 0; j < W; j++) sound &= finite[j];
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

/* Rows of a table; a row that it does not have is NaN, which no draw accepts. */
int64_t embed(const Embedding *c, Team *team) {
    for (int64_t row; (row = take(team, c->T)) >= 0;) {
        const int64_t id = c->ids[row];
        const int known = id >= 0 && id < c->V;
        const float *from = c->table + (known ? id : 0) * c->E, scale = known ? c->scale : NAN;
        float *to = c->out + row * c->E;
        for (int64_t e = 0; e < c->E; e++) to[e] = from[e] * scale;
    }
    return c->T;
}

/* out = norm(x + residual) * (offset + weight), sum = x + residual; without a residual sum is not written. */
int64_t norm(const Norm *c, Team *team) {
    const int64_t E = c->E;
    for (int64_t row; (row = take(team, c->T)) >= 0;) {
        const float *from = c->x + row * c->x_row;
        float *to = c->out + row * E;
        if (c->residual != NULL) {
            float *both = c->sum + row * E;
            for (int64_t e = 0; e < E; e++) both[e] = c->residual[row * E + e] + from[e];
            from = both;
        }
        const float scale = 1.0f / sqrtf(square_sum(from, E) / (float)E + c->eps), offset = c->offset;
        for (int64_t e = 0; e < E; e++) to[e] = from[e] * scale * (offset + c->weight[e]);
    }
    return c->T;
}

/* out = activation(gate) * up; gate_up has the two side by side. */
int64_t activate(const Gated *c, Team *team) {
    const int64_t F = c->F;
    const int is_silu = (int)c->is_silu;
    for (int64_t row; (row = take(team, c->T)) >= 0;) {
        const float *gate = c->gate_up + row * c->row, *up = gate + F;
        float *to = c->out + row * F;
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
    return c->T;
}

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
int64_t rotate_and_store(const Rope *r, Team *team) {
    const int64_t D = r->D;
    for (int64_t row; (row = take(team, r->T)) >= 0;) {
        const int64_t position = r->positions[row];
        for (int64_t h = 0; h < r->H; h++)
            turn(r, r->q + row * r->q_row + h * D, r->q_norm, position, r->out + (row * r->H + h) * D);
        if (row >= r->num_stored) continue;
        const int64_t block = r->slots[row] / r->B, place = r->slots[row] % r->B;
        float *k_cache = r->k_cache + block * r->k_block + place * r->k_place;
        float *v_cache = r->v_cache + block * r->v_block + place * r->v_place;
        for (int64_t h = 0; h < r->K; h++) {
            turn(r, r->k + row * r->k_row + h * D, r->k_norm, position, k_cache + h * r->k_head);
            memcpy(v_cache + h * r->v_head, r->v + row * r->v_row + h * D, (size_t)D * sizeof(float));
        }
    }
    return r->T;
}
