/* Vectors of floats as wide as this machine's registers, for the C of a CPU step. */

#ifndef CPU_VECTORS_H
#define CPU_VECTORS_H

#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

/* Floats of a register, and the sums that a product keeps in registers, ROWS x VECTORS: as many as leave some of them, of
 * 32 with AVX-512 and NEON, of 16 elsewhere, for a line of the other factor and one input. */
#define FOUR(f, i, step) f(i, step), f(i + 1, step), f(i + 2, step), f(i + 3, step)
#if defined(__AVX512F__)
enum { W = 16, ROWS = 6, VECTORS = 4 };
#define LANES(f, step) FOUR(f, 0, step), FOUR(f, 4, step), FOUR(f, 8, step), FOUR(f, 12, step)
#elif defined(__AVX__)
enum { W = 8, ROWS = 6, VECTORS = 2 };
#define LANES(f, step) FOUR(f, 0, step), FOUR(f, 4, step)
#elif defined(__aarch64__)
enum { W = 4, ROWS = 6, VECTORS = 4 };
#define LANES(f, step) FOUR(f, 0, step)
#else
enum { W = 4, ROWS = 6, VECTORS = 2 };
#define LANES(f, step) FOUR(f, 0, step)
#endif
enum { PANEL = VECTORS * W };
enum { LINE = 64 / sizeof(float) }; /* of a cache */
enum { MAX_D = 256 };               /* largest head dim */
typedef float vf __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));

/* A tile of sums stays in registers only if loops over it are unrolled early, and its number of rows is known. */
#define INLINED static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif
#define FOR_EACH_COUNT(call) case 1: call(1) case 2: call(2) case 3: call(3) case 4: call(4) case 5: call(5) case 6: call(6)

static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t parts_of(int64_t a, int64_t size) { return (a + size - 1) / size; }

static inline vf load(const float *p) { return *(const vf *)p; }
static inline void store(float *p, vf v) { *(vf *)p = v; }
static inline vf all(float x) { return x - (vf){0.0f}; }
static inline vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

/* a where it is larger, else b; b where one of them is NaN. */
static inline vf larger(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

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

/* Of two vectors: in every group of 2 x step lanes the first halves, or the second halves, of both. */
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
#define FIRST_HALF(lane, step) ((lane) & (step) ? W + (lane) - (step) : (lane))
#define SECOND_HALF(lane, step) ((lane) & (step) ? W + (lane) : (lane) + (step))
#define FIRST_HALVES(a, b, step) SHUFFLE(a, b, LANES(FIRST_HALF, step))
#define SECOND_HALVES(a, b, step) SHUFFLE(a, b, LANES(SECOND_HALF, step))

/* Put a vector into memory that is not read soon: past the caches, where the processor can. `p` is aligned to it. */
static inline void stream(float *p, vf v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#else
    store(p, v);
#endif
}

/* Transpose W rows of W floats each, that begin at float `at`: in rounds pairs of rows exchange halves, quarters, and so
 * on down to elements. The results lie `stride` apart; they are streamed if nobody reads them soon. */
INLINED void transpose(const float *const *rows, int64_t at, float *out, int64_t stride, const int streams) {
    vf a[W], b[W];
    UNROLLED for (int i = 0; i < W; i++) a[i] = load(rows[i] + at);
#define ROUND(from, to, step)                                                  \
    UNROLLED for (int i = 0; i < W; i++)                                       \
        if (!(i & (step))) {                                                   \
            to[i] = FIRST_HALVES(from[i], from[i + (step)], step);             \
            to[i + (step)] = SECOND_HALVES(from[i], from[i + (step)], step);   \
        }
#if defined(__AVX512F__)
    ROUND(a, b, 8)
    ROUND(b, a, 4)
#elif defined(__AVX__)
    ROUND(a, b, 4)
    UNROLLED for (int i = 0; i < W; i++) a[i] = b[i];
#endif
    ROUND(a, b, 2)
    ROUND(b, a, 1)
#undef ROUND
    UNROLLED for (int i = 0; i < W; i++) {
        if (streams) stream(out + i * stride, a[i]);
        else store(out + i * stride, a[i]);
    }
}

static inline float sum_of(vf v) {
    float total = 0.0f;
    for (int i = 0; i < W; i++) total += v[i];
    return total;
}

static inline float max_of(vf v) {
    if (W > 8) v = larger(v, SECOND_HALVES(v, v, 8 % W));
    if (W > 4) v = larger(v, SECOND_HALVES(v, v, 4 % W));
    v = larger(v, SECOND_HALVES(v, v, 2));
    return v[0] > v[1] ? v[0] : v[1];
}

#endif
