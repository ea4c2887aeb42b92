/* Sums of words times factors mod 2^64, for the digest of weights (weights/digest.py, which says what the factors are). */

#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

typedef uint32_t word __attribute__((aligned(1), may_alias)); /* where bytes of a tensor begin in a message is anywhere */
enum { LINE = 16 }; /* words of a line of the cache */
typedef uint32_t words_of_line __attribute__((vector_size(4 * LINE), aligned(1), may_alias));
typedef uint32_t words_of_half __attribute__((vector_size(2 * LINE), may_alias));
typedef uint64_t sums_of_half __attribute__((vector_size(4 * LINE), aligned(8), may_alias));

#define GOLDEN 0x9E3779B97F4A7C15u
enum { BLOCK = 1 << 11, SPAN = 1 << 6 }; /* words of a block, blocks that a thread takes at once */

static uint64_t mixed(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (z ^ (z >> 31)) | 1;
}

static uint64_t sum_of(const word *words, const uint64_t *factors, int64_t count) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += words[i] * factors[i];
    return sum;
}

/* Write a line past the caches, where the processor can: `target` is aligned to it. */
static inline void stream(word *target, words_of_line line) {
#if defined(__AVX512F__)
    _mm512_stream_si512((void *)target, (__m512i)line);
#elif defined(__SSE2__)
    for (int i = 0; i < 4; i++) _mm_stream_si128((__m128i *)target + i, ((const __m128i *)&line)[i]);
#else
    memcpy(target, &line, sizeof line);
#endif
}

/* Copy whole lines and add up their words on the way. What is summed is what is written: it is read once. */
static inline __attribute__((always_inline)) uint64_t lines_copied(
    const word *words, const uint64_t *factors, int64_t count, word *target, const int streams) {
    sums_of_half low = {0}, high = {0};
    for (int64_t i = 0; i < count; i += LINE) {
        const words_of_line line = *(const words_of_line *)(words + i);
        const words_of_half *half = (const words_of_half *)&line;
        const sums_of_half *factor = (const sums_of_half *)(factors + i);
        if (streams) stream(target + i, line);
        else *(words_of_line *)(target + i) = line;
        low += __builtin_convertvector(half[0], sums_of_half) * factor[0];
        high += __builtin_convertvector(half[1], sums_of_half) * factor[1];
    }
    low += high;
    uint64_t sum = 0;
    for (int i = 0; i < LINE / 2; i++) sum += low[i];
    return sum;
}

/* Copy words and return their sum. With `streams` the target is memory that is not read soon. */
static uint64_t copy_and_sum(
    const word *words, const uint64_t *factors, int64_t count, word *target, const int streams) {
    const int64_t whole = count / LINE * LINE;
    const uint64_t sum = streams && (uintptr_t)target % (4 * LINE) == 0
                             ? lines_copied(words, factors, whole, target, 1)
                             : lines_copied(words, factors, whole, target, 0);
    memcpy(target + whole, words + whole, (size_t)(count - whole) * sizeof(word));
    return sum + sum_of(target + whole, factors + whole, count - whole);
}

/* The sum over words number `first` and following of a tensor. Where `target` is not NULL they are copied there, past the
 * caches if it `streams`, and it is what was copied that is summed. `factors` are those of the places in a block. */
uint64_t digest_words(
    const word *words, int64_t count, int64_t first, const uint64_t *factors, word *target, int streams, int num_threads) {
    uint64_t total = 0;
    const int64_t blocks = count > 0 ? (first + count - 1) / BLOCK - first / BLOCK + 1 : 0;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(dynamic, SPAN) reduction(+ : total)
        for (int64_t i = 0; i < blocks; i++) {
            const int64_t block = first / BLOCK + i;
            const int64_t begin = block * BLOCK < first ? first : block * BLOCK;
            const int64_t end = (block + 1) * BLOCK > first + count ? first + count : (block + 1) * BLOCK;
            const word *from = words + (begin - first);
            const uint64_t *places = factors + begin % BLOCK;
            const uint64_t sum = target == NULL
                                     ? sum_of(from, places, end - begin)
                                     : copy_and_sum(from, places, end - begin, target + (begin - first), streams);
            total += sum * mixed((uint64_t)(block + 1 + BLOCK) * GOLDEN);
        }
#if defined(__SSE2__)
        _mm_sfence(); /* what was streamed is there for every core before the threads meet */
#endif
    }
    return total;
}
