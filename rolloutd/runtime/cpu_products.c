/* Matrix products y = x W^T + b on a CPU, in fp32, for the few rows of a decoding step as well as for prompts.
 *
 * A weight is packed once into panels of PANEL outputs, in which the outputs of one input lie side by side. A tile of
 * ROWS x PANEL sums stays in registers while it goes through all inputs; on the way it asks memory for its share of the
 * panel that this thread comes to next.
 *
 * A sum is added up in the order of the inputs, in parts of PART inputs so that rounding does not grow with their number.
 * Other rows change nothing of it: a row's bits do not depend on the batch.
 */

#include "cpu_calls.h"
#include "cpu_vectors.h"

enum { PART = 256 };
enum { CHUNK_FLOATS = 1 << 17, MIN_CHUNK_ROWS = 48 }; /* of x: half a megabyte, which stays in a core's cache */
enum { TASKS = 8 };                                     /* for each thread, at least */

/* Floats of N outputs of K inputs, packed: outputs are filled up to whole panels by zeros. */
int64_t packed_size(int64_t N, int64_t K) { return parts_of(N, PANEL) * PANEL * K; }

/* Pack `whole` outputs, from input `first` on; what is missing of a panel is zero. */
static void pack_rest(const float *from, int64_t stride, int64_t whole, int64_t first, int64_t K, float *panel) {
    for (int64_t k = first; k < K; k++) {
        for (int64_t n = 0; n < whole; n++) panel[k * PANEL + n] = from[n * stride + k];
        for (int64_t n = whole; n < PANEL; n++) panel[k * PANEL + n] = 0.0f;
    }
}

/* Pack a panel of outputs that are all there. W rows at a time are read, so far that the processor sees where they go on. */
INLINED void pack_whole(const float *from, int64_t stride, int64_t K, float *panel, const int streams) {
    const int64_t vectors = K / W * W;
    for (int64_t first = 0; first < vectors; first += PART)
        for (int v = 0; v < VECTORS; v++) {
            const float *rows[W];
            for (int n = 0; n < W; n++) rows[n] = from + (v * W + n) * stride;
            for (int64_t k = first; k < at_most(first + PART, vectors); k += W)
                transpose(rows, k, panel + k * PANEL + v * W, PANEL, streams);
        }
    pack_rest(from, stride, PANEL, vectors, K, panel);
}

/* Panels are handed out one by one: the trainer's process may be busy on a core. */
void pack_weight(const float *weight, int64_t stride, int64_t N, int64_t K, float *packed, int num_threads) {
    const int streams = (uintptr_t)packed % (W * sizeof(float)) == 0;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t p = 0; p < parts_of(N, PANEL); p++) {
            float *panel = packed + p * PANEL * K;
            const float *from = weight + p * PANEL * stride;
            const int64_t whole = at_most(PANEL, N - p * PANEL);
            if (whole < PANEL) pack_rest(from, stride, whole, 0, K, panel);
            else if (streams) pack_whole(from, stride, K, panel, 1);
            else pack_whole(from, stride, K, panel, 0);
        }
#if defined(__AVX512F__)
        _mm_sfence(); /* what was streamed is there for every core before the threads meet */
#endif
    }
}

/* `rows` rows of the first `width` vectors of one panel; `next` are lines of memory to ask for on the way, one for each of
 * the first inputs. */
INLINED void tile(
    const Product *p, int64_t row, int64_t column, const int rows, const int width, const float *next, int64_t num_lines) {
    const float *x = p->x + row * p->x_row, *weight = p->packed + column * p->K;
    float *y = p->y + row * p->y_row + column;
    const int64_t num_outputs = at_most(width * W, p->N - column);
    const size_t num_bytes = (size_t)num_outputs * sizeof(float);
    float line[PANEL] = {0.0f}; /* of outputs, where those of a whole tile are not there */
    vf total[ROWS][VECTORS];
    if (p->bias != NULL) memcpy(line, p->bias + column, num_bytes);
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int v = 0; v < width; v++) total[i][v] = load(line + v * W);
    for (int64_t begin = 0; begin < p->K; begin += PART) {
        const int64_t end = at_most(begin + PART, p->K);
        vf sum[ROWS][VECTORS] = {{{0}}};
        for (int64_t k = begin; k < end; k++) {
            vf factor[VECTORS];
            UNROLLED for (int v = 0; v < width; v++) factor[v] = load(weight + k * PANEL + v * W);
            UNROLLED for (int i = 0; i < rows; i++) {
                const vf input = all(x[i * p->x_row + k]);
                UNROLLED for (int v = 0; v < width; v++) sum[i][v] += input * factor[v];
            }
            if (k < num_lines) __builtin_prefetch(next + k * LINE);
        }
        UNROLLED for (int i = 0; i < rows; i++)
            UNROLLED for (int v = 0; v < width; v++) total[i][v] += all(p->scale) * sum[i][v];
    }
    UNROLLED for (int i = 0; i < rows; i++) {
        float *to = num_outputs == width * W ? y + i * p->y_row : line;
        if (p->adds && to == line) memcpy(line, y + i * p->y_row, num_bytes);
        UNROLLED for (int v = 0; v < width; v++) {
            if (p->adds) total[i][v] += load(to + v * W);
            store(to + v * W, total[i][v]);
        }
        if (to == line) memcpy(y + i * p->y_row, line, num_bytes);
    }
}

/* The rows from `first` to `last` of one panel, of which only so many vectors are computed as have outputs. */
static void panel_of(const Product *p, int64_t first, int64_t last, int64_t column, const float *next) {
    const int64_t lines = next == NULL ? 0 : parts_of(PANEL * p->K, LINE), tiles = parts_of(last - first, ROWS);
    const int64_t share = parts_of(lines, tiles);
    const int is_narrow = p->N - column <= W;
    for (int64_t row = first; row < last; row += ROWS, next += share * LINE) {
        switch (at_most(ROWS, last - row)) {
#define CALL(n)                                                                          \
    if (is_narrow) tile(p, row, column, n, 1, next, share);                              \
    else tile(p, row, column, n, VECTORS, next, share);                                  \
    break;
            FOR_EACH_COUNT(CALL)
#undef CALL
        }
    }
}

int64_t multiply(const Product *p, Team *team) {
    const int64_t panels = parts_of(p->N, PANEL);
    /* Rows go in chunks that stay in the cache while all panels pass by; in more of them where a thread that others slow
     * down would be waited for. Threads have rows of their own then, which what follows comes back to. */
    int64_t rows = CHUNK_FLOATS / p->K < MIN_CHUNK_ROWS ? MIN_CHUNK_ROWS : CHUNK_FLOATS / p->K;
    rows = at_most(rows, parts_of(p->M, parts_of(TASKS * team->num_threads, panels)));
    rows = parts_of(rows, ROWS) * ROWS;
    const int64_t num_tasks = parts_of(p->M, rows) * panels;
    for (int64_t task; (task = take(team, num_tasks)) >= 0;) {
        const int64_t panel = task % panels, first = task / panels * rows;
        const int64_t after = panel + 1 + (team->num_helped > 0); /* likely the next one of this thread */
        const float *next = after < panels ? p->packed + after * PANEL * p->K : NULL;
        panel_of(p, first, at_most(first + rows, p->M), panel * PANEL, next);
    }
    return num_tasks;
}
