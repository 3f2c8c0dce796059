/* The quantizer, once for each instruction set: quantize.c includes this with TARGET (a function attribute) and
 * NAME(x) (x with a suffix) defined. Vectors are the compilers' own (gcc, clang), so this is AVX2, SSE2 or NEON; a GPU's
 * threads (kernels/cuda/quantize.cu) have one lane.
 *
 * The arithmetic is that of flashpack.formats.affine, operation by operation. Each is rounded exactly (IEEE
 * single precision, no contraction), so results do not depend on the instruction set.
 */

INLINE float NAME(as_float)(uint32_t word)
{
    float value;
    memcpy(&value, &word, 4);
    return value;
}

INLINE uint32_t NAME(as_word)(float value)
{
    uint32_t word;
    memcpy(&word, &value, 4);
    return word;
}

/* float16 bits of a value, rounded to nearest even; too large ones become infinite. */
INLINE uint16_t NAME(to_half)(float value)
{
    uint32_t word = NAME(as_word)(value), sign = word >> 16 & 0x8000, magnitude = word & 0x7FFFFFFF;
    if (magnitude >= 0x47800000) /* 65536 and more, infinity, NaN */
        return (uint16_t)(sign | (magnitude > 0x7F800000 ? 0x7E00 : 0x7C00));
    if (magnitude < 0x38800000) /* below 2^-14: a multiple of 2^-24, which adding 0.5 leaves in the lowest bits */
        return (uint16_t)(sign | (NAME(as_word)(NAME(as_float)(magnitude) + 0.5f) - 0x3F000000));
    return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13));
}

/* Stores a value as number `index` of an array of type `type`, rounded to nearest even; returns what is stored. */
INLINE float NAME(store_rounded)(float value, int type, uint8_t *array, size_t index)
{
    uint32_t word = NAME(as_word)(value);
    uint16_t half;
    if (type == TYPE_F32) {
        memcpy(array + 4 * index, &word, 4);
        return value;
    }
    if (type == TYPE_BF16) {
        half = (uint16_t)((word + 0x7FFF + (word >> 16 & 1)) >> 16);
        value = NAME(as_float)((uint32_t)half << 16);
    } else {
        half = NAME(to_half)(value);
        if ((half & 0x7C00) == 0x7C00)
            value = NAME(as_float)((uint32_t)(half & 0x8000) << 16 | 0x7F800000 | (uint32_t)(half & 0x3FF) << 13);
        else if (half & 0x7C00)
            value = NAME(as_float)((uint32_t)(half & 0x8000) << 16 | (((uint32_t)(half & 0x7FFF) << 13) + 0x38000000));
        else
            value = (half & 0x8000 ? -0x1p-24f : 0x1p-24f) * (float)(half & 0x3FF);
    }
    memcpy(array + 2 * index, &half, 2);
    return value;
}

INLINE void NAME(widen)(const uint8_t *source, int type, size_t first, const size_t size, float *values)
{
    size_t i;
    if (type == TYPE_F32) {
        memcpy(values, source + 4 * first, 4 * size);
    } else if (type == TYPE_BF16) {
        source += 2 * first;
        for (i = 0; i < size; i++) {
            uint16_t half;
            uint32_t word;
            memcpy(&half, source + 2 * i, 2);
            word = (uint32_t)half << 16;
            memcpy(values + i, &word, 4);
        }
    } else {
        source += 2 * first;
        for (i = 0; i < size; i++) {
            uint16_t half;
            uint32_t word, sign;
            float scaled;
            memcpy(&half, source + 2 * i, 2);
            sign = (uint32_t)(half & 0x8000) << 16;
            word = (uint32_t)(half & 0x7FFF) << 13;
            memcpy(&scaled, &word, 4);
            scaled *= 0x1p112f; /* exact, for subnormal numbers too */
            memcpy(&word, &scaled, 4);
            word |= (half & 0x7C00) == 0x7C00 ? 0x7F800000 : 0; /* infinity and NaN */
            word |= sign;
            memcpy(values + i, &word, 4);
        }
    }
}

/* Smallest and largest value of a group. Zeros count as +0; what is found if there is a NaN is left open. */
INLINE void NAME(extremes)(const float *values, const size_t size, float *low, float *high)
{
    VECTOR least, most;
    float a[LANES], b[LANES];
    size_t i;
    memcpy(&least, values, sizeof least);
    most = least;
    for (i = LANES; i < size; i += LANES) {
        VECTOR x;
        memcpy(&x, values + i, sizeof x);
        least = LESSER(x, least);
        most = GREATER(x, most);
    }
    memcpy(a, &least, sizeof least);
    memcpy(b, &most, sizeof most);
    for (i = 1; i < LANES; i++) {
        a[0] = a[i] < a[0] ? a[i] : a[0];
        b[0] = b[i] > b[0] ? b[i] : b[0];
    }
    *low = a[0] + 0.0f;
    *high = b[0] + 0.0f;
}

/* The sum of eight lanes in the order of flashpack.formats.starts.lane_sum. */
INLINE float NAME(total)(const VECTOR *sums)
{
    float lanes[8];
#if LANES > 1
    float4 low, high;
    memcpy(&low, sums, sizeof low);
    memcpy(&high, (const float *)sums + 4, sizeof high);
    low += high;
    memcpy(lanes, &low, sizeof low);
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
#else
    memcpy(lanes, sums, sizeof lanes);
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
#endif
}

/* `x` within 0 and `top`; NaN is 0. */
INLINE VECTOR NAME(clip)(VECTOR x, VECTOR top)
{
    const VECTOR zero = {0};
    return LESSER(GREATER(x, zero), top);
}

/* Codes of a group, one byte each, and what decoding them gives too much; returns the sum of squares of that. The
 * divisor is the scale, or instead of 0: 1, or infinity, for which every code is 0. */
INLINE float NAME(encode)(
    const float *values, const size_t size, float scale, float bias, float divisor, float levels, uint8_t *codes,
    float *wrong)
{
    const VECTOR zero = {0}, top = zero + levels;
    VECTOR error[STEP] = {{0}};
#if LANES > 1
    int32_t wide[MAX_GROUP]; /* narrowed in a loop of its own, which becomes a few instructions; NVRTC gets it wrong */
#endif
    size_t i, k;
    for (i = 0; i < size; i += 8) {
        for (k = 0; k < STEP; k++) {
            VECTOR x, code, difference;
            INTEGERS integer;
            memcpy(&x, values + i + k * LANES, sizeof x);
            /* Rounded to the nearest integer, ties to even, which is left in the lowest bits. */
            code = NAME(clip)((x - bias) / divisor, top) + ROUNDER;
            integer = BITS(code) & 0xFF;
            code -= ROUNDER;
            difference = code * scale + bias - x;
            error[k] += difference * difference;
            memcpy(wrong + i + k * LANES, &difference, sizeof difference);
#if LANES > 1
            memcpy(wide + i + k * LANES, &integer, sizeof integer);
#else
            codes[i + k] = (uint8_t)integer;
#endif
        }
    }
#if LANES > 1
    for (i = 0; i < size; i++)
        codes[i] = (uint8_t)wide[i];
#endif
    return NAME(total)(error);
}

/* flashpack.formats.starts.group_squares: the sum of squares of a group. */
INLINE double NAME(squares)(const float *values, const size_t size)
{
    VECTOR sums[STEP] = {{0}};
    double lanes[8] = {0};
    float sum;
    size_t i, k;
    for (i = 0; i < size; i += 8) {
        for (k = 0; k < STEP; k++) {
            VECTOR x;
            memcpy(&x, values + i + k * LANES, sizeof x);
            sums[k] += x * x;
        }
    }
    sum = NAME(total)(sums);
    if (sum > 1e-20f && sum < 1e30f)
        return sum;
    /* Squares may have left the range of single precision, or something is infinite or NaN. */
    for (i = 0; i < size; i++)
        lanes[i % 8] += (double)values[i] * values[i];
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

/* `size` codes into a little-endian bit stream; `room` bytes may be written from `words` on. */
INLINE void NAME(pack)(const uint8_t *codes, const size_t size, int bits, uint8_t *words, size_t room)
{
    const uint64_t one = (((uint64_t)1 << bits) - 1) * 0x0001000100010001;
    const uint64_t two = (((uint64_t)1 << 2 * bits) - 1) * 0x0000000100000001;
    const uint64_t four = ((uint64_t)1 << 4 * bits) - 1;
    uint64_t eight[MAX_GROUP / 8];
    size_t i;
    memcpy(eight, codes, size);
    for (i = 0; i < size / 8; i++) {
        uint64_t x = eight[i];
        x = (x & one) | ((x >> (8 - bits)) & (one << bits));
        x = (x & two) | ((x >> (16 - 2 * bits)) & (two << 2 * bits));
        eight[i] = (x & four) | ((x >> (32 - 4 * bits)) & ~four);
    }
    for (i = 0; i < size / 8; i++) {
        if (room >= 8)
            memcpy(words, &eight[i], 8); /* what is too much is overwritten by the next ones */
        else
            memcpy(words, &eight[i], (size_t)bits);
        words += bits;
        room -= (size_t)bits;
    }
}

#include "quantize_starts.h"
#include "quantize_dq.h"

INLINE void NAME(tiles)(
    const uint8_t *source, int source_type, size_t count, int bits, const size_t size, int scale_type, int starts,
    uint8_t *words, uint8_t *scales, uint8_t *biases, double *sums, size_t apart)
{
    const float levels = (float)((1 << bits) - 1);
    const size_t group_bytes = size * (size_t)bits / 8;
    size_t room = count / 8 * (size_t)bits, first = 0, index = 0;
    while (first < count) {
        /* Some groups at a time, so that the processor need not wait for the end of one before it begins the next. */
        float values[TILE], low[TILE / 32], high[TILE / 32], scale[TILE / 32], bias[TILE / 32];
        const size_t tile = count - first < TILE ? count - first : TILE, groups = tile / size;
        size_t g;
        NAME(widen)(source, source_type, first, tile, values);
        for (g = 0; g < groups; g++)
            NAME(extremes)(values + g * size, size, low + g, high + g);
        for (g = 0; g < groups; g++) {
            scale[g] = NAME(store_rounded)((high[g] - low[g]) / levels, scale_type, scales, index + g);
            bias[g] = NAME(store_rounded)(low[g], scale_type, biases, index + g);
        }
        for (g = 0; g < groups; g++) {
            const float *group = values + g * size;
            uint8_t codes[MAX_GROUP];
            float wrong[MAX_GROUP];
            const float divisor = scale[g] == 0 ? 1 : scale[g];
            float error = NAME(encode)(group, size, scale[g], bias[g], divisor, levels, codes, wrong);
            if (starts)
                NAME(improve)(
                    group, size, low[g], high[g], bits, error, scale_type, scales, biases, index + g, codes, wrong);
            NAME(pack)(codes, size, bits, words, room);
            sums[0] += NAME(squares)(wrong, size);
            sums[1] += NAME(squares)(group, size);
            sums += apart;
            words += group_bytes;
            room -= group_bytes;
        }
        first += tile;
        index += groups;
    }
}

/* Pairs of sums are `apart` from one group to the next; with 0, all groups add to one pair.
 *
 * Group sizes as constants, so that the loops over a group are unrolled. */
TARGET static void NAME(quantize)(
    const uint8_t *source, int source_type, size_t count, int bits, int size, int scale_type, int starts,
    uint8_t *words, uint8_t *scales, uint8_t *biases, double *sums, size_t apart)
{
    if (size == 32)
        NAME(tiles)(source, source_type, count, bits, 32, scale_type, starts, words, scales, biases, sums, apart);
    else if (size == 64)
        NAME(tiles)(source, source_type, count, bits, 64, scale_type, starts, words, scales, biases, sums, apart);
    else
        NAME(tiles)(source, source_type, count, bits, 128, scale_type, starts, words, scales, biases, sums, apart);
}

#undef TARGET
#undef NAME
#undef LANES
#undef VECTOR
#undef INTEGERS
#undef GREATER
#undef LESSER
