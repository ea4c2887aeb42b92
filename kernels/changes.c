/* What changed between two versions of a run of elements, and how to apply it (weights/delta.py, which has the layouts).
 * Elements are 2 or 4 bytes; a bitmap holds one bit for each, the first in the lowest bit of the first byte. */

#include <stdint.h>
#include <string.h>

enum { PLACES = 1 << 16 }; /* elements of a block, within which 16 bits name a place */

typedef uint16_t item16 __attribute__((aligned(1), may_alias)); /* where a run begins in a message is anywhere */
typedef uint32_t item32 __attribute__((aligned(1), may_alias));

/* One bit for each of eight flags of 0 or 1: the product moves flag i to bit 56 + i. */
static inline uint8_t packed_bits(const uint8_t *flags) {
    uint64_t eight;
    memcpy(&eight, flags, sizeof eight);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    eight = __builtin_bswap64(eight);
#endif
    return (uint8_t)((eight * 0x0102040810204080u) >> 56);
}

#define FUNCTIONS(ITEM)                                                                                              \
    static int64_t changed_##ITEM(const ITEM *new, const ITEM *old, int64_t count, uint8_t *bits) {                  \
        int64_t changed = 0;                                                                                         \
        for (int64_t i = 0; i < count; i += 64) {                                                                    \
            uint8_t flags[64] = {0};                                                                                 \
            const int64_t some = count - i < 64 ? count - i : 64;                                                    \
            if (some == 64)                                                                                          \
                for (int j = 0; j < 64; j++) flags[j] = new[i + j] != old[i + j];                                    \
            else                                                                                                     \
                for (int j = 0; j < some; j++) flags[j] = new[i + j] != old[i + j];                                  \
            for (int64_t j = 0; j < (some + 7) / 8; j++) {                                                           \
                bits[i / 8 + j] = packed_bits(flags + 8 * j);                                                        \
                changed += __builtin_popcount(bits[i / 8 + j]);                                                      \
            }                                                                                                        \
        }                                                                                                            \
        return changed;                                                                                              \
    }                                                                                                                \
    static void gathered_##ITEM(const ITEM *items, const uint8_t *bits, int64_t count, ITEM *elements) {             \
        for (int64_t i = 0; i < (count + 7) / 8; i++)                                                                \
            for (unsigned left = bits[i]; left; left &= left - 1) *elements++ = items[8 * i + __builtin_ctz(left)];  \
    }                                                                                                                \
    static void scattered_##ITEM(ITEM *items, const uint8_t *bits, int64_t count, const ITEM *elements) {            \
        for (int64_t i = 0; i < (count + 7) / 8; i++)                                                                \
            for (unsigned left = bits[i]; left; left &= left - 1) items[8 * i + __builtin_ctz(left)] = *elements++;  \
    }                                                                                                                \
    static int64_t placed_##ITEM(                                                                                    \
        ITEM *items, int64_t count, const item32 *counts, const item16 *places, const ITEM *elements) {              \
        for (int64_t start = 0; start < count; start += PLACES, counts++) {                                          \
            int64_t last = -1;                                                                                       \
            for (uint32_t n = *counts; n > 0; n--) {                                                                 \
                if (*places <= last || start + *places >= count) return -1;                                          \
                last = *places++;                                                                                    \
                items[start + last] = *elements++;                                                                   \
            }                                                                                                        \
        }                                                                                                            \
        return 0;                                                                                                    \
    }

FUNCTIONS(item16)
FUNCTIONS(item32)

/* Mark the elements that differ; return how many. */
int64_t changed_bits(const void *new, const void *old, int64_t count, int item_bytes, uint8_t *bits) {
    return item_bytes == 2 ? changed_item16(new, old, count, bits) : changed_item32(new, old, count, bits);
}

/* Write the elements that are marked, one after the other. */
void gather(const void *items, const uint8_t *bits, int64_t count, int item_bytes, void *elements) {
    if (item_bytes == 2) gathered_item16(items, bits, count, elements);
    else gathered_item32(items, bits, count, elements);
}

/* Write how many are marked in each block, and their places there. */
void places_of(const uint8_t *bits, int64_t count, item32 *counts, item16 *places) {
    for (int64_t start = 0; start < count; start += PLACES, counts++) {
        const item16 *first = places;
        const int64_t bytes = ((count - start < PLACES ? count - start : PLACES) + 7) / 8;
        for (int64_t i = 0; i < bytes; i++)
            for (unsigned left = bits[start / 8 + i]; left; left &= left - 1)
                *places++ = (uint16_t)(8 * i + __builtin_ctz(left));
        *counts = (uint32_t)(places - first);
    }
}

/* How many of `count` bits are set; -1 where one beyond them is. */
int64_t num_marked(const uint8_t *bits, int64_t count) {
    int64_t marked = 0;
    for (int64_t i = 0; i < (count + 7) / 8; i++) marked += __builtin_popcount(bits[i]);
    return count % 8 && bits[count / 8] >> (count % 8) ? -1 : marked;
}

/* Write elements where they are marked. */
void scatter(void *items, const uint8_t *bits, int64_t count, int item_bytes, const void *elements) {
    if (item_bytes == 2) scattered_item16(items, bits, count, elements);
    else scattered_item32(items, bits, count, elements);
}

/* Write elements at places; -1, and some of them written, where the places of a block do not rise or lie outside. */
int64_t scatter_at(
    void *items, int64_t count, int item_bytes, const item32 *counts, const item16 *places, const void *elements) {
    return item_bytes == 2 ? placed_item16(items, count, counts, places, elements)
                           : placed_item32(items, count, counts, places, elements);
}
