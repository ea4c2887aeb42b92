/* Sums of words times factors mod 2^64, for the digest of weights (weights/digest.py, which says what the factors are). */

#include <stdint.h>
#include <string.h>

typedef uint32_t word __attribute__((aligned(1), may_alias)); /* where bytes of a tensor begin in a message is anywhere */

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

/* The sum over words number `first` and following of a tensor. Where `target` is not NULL they are copied there, and it
 * is the copy that is read. `factors` are those of the places in a block. */
uint64_t digest_words(
    const word *words, int64_t count, int64_t first, const uint64_t *factors, word *target, int num_threads) {
    uint64_t total = 0;
    const int64_t blocks = count > 0 ? (first + count - 1) / BLOCK - first / BLOCK + 1 : 0;
#pragma omp parallel for schedule(dynamic, SPAN) reduction(+ : total) num_threads(num_threads)
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t block = first / BLOCK + i;
        const int64_t begin = block * BLOCK < first ? first : block * BLOCK;
        const int64_t end = (block + 1) * BLOCK > first + count ? first + count : (block + 1) * BLOCK;
        const word *from = words + (begin - first);
        if (target != NULL) { /* a block is copied, and read again while it is in the first cache */
            memcpy(target + (begin - first), from, (size_t)(end - begin) * sizeof(word));
            from = target + (begin - first);
        }
        total += sum_of(from, factors + begin % BLOCK, end - begin) * mixed((uint64_t)(block + 1 + BLOCK) * GOLDEN);
    }
    return total;
}
