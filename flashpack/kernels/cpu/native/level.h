/* What each instruction set provides: see body.h. */
#ifndef FLASHPACK_LEVEL_H
#define FLASHPACK_LEVEL_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../../blocks.h"
#include "kernels.h"

#if defined(__GNUC__)
#define FP_INLINE inline __attribute__((always_inline))
#else
#define FP_INLINE inline
#endif

/* A FORMAT of codes; the others are numbers of bits. */
enum { MXFP4 = 0 };

enum { ORDER_STRAIGHT, ORDER_NIBBLES, ORDER_PAIRS };

/* Host code gives all kernels the same numbers. */
static_assert((int)FP_BF16 == blocks::BF16 && (int)FP_F16 == blocks::F16 && (int)FP_F32 == blocks::F32, "types");
static_assert((int)FP_NIBBLES == blocks::NIBBLES, "types");

constexpr bool are_twice_fp4(const int8_t (&table)[16])
{
    for (int i = 0; i < 16; i++)
        if (table[i] != blocks::twice_fp4(i))
            return false;
    return true;
}

namespace {

inline float float_of(uint32_t word)
{
    float value;
    memcpy(&value, &word, 4);
    return value;
}

inline float half_to_float(uint16_t half)
{
    uint32_t exponent = half & 0x7C00, sign = (uint32_t)(half & 0x8000) << 16;
    float size = float_of((uint32_t)(half & 0x7FFF) << 13) * 0x1p112f; /* exact, for subnormal numbers too */
    uint32_t word;
    memcpy(&word, &size, 4);
    return float_of((exponent == 0x7C00 ? word | 0x7F800000 : word) | sign);
}

typedef uint16_t __attribute__((may_alias)) word16;

} // namespace

/* Of a product's inner dimension. */
struct Shape {
    int64_t width;
    int64_t units;  /* of 64 values */
    int64_t groups; /* with a scale each */
    int group;
    int order;
    bool coarse; /* products with more than FEW_TOKENS tokens may be of bytes */
};

/* Activations of one token: as they are; as 16-bit integers worth `scale` each, with sums by group, which lie as they are
 * (`codes`) or, of each 64, as their upper bits and then their lower seven (`planes`); and as bytes, worth `byte_scales`
 * for each unit or its halves, with the sums of their values (prepare_bytes). */
struct Activations {
    const float *values;
    const int16_t *codes;
    const int8_t *planes;
    const float *sums;
    float scale;
    const int8_t *bytes;
    const float *byte_scales;
    const float *byte_sums;
};

struct Level {
    const char *name;
    bool planes; /* what up to FEW_TOKENS tokens are multiplied as */
    /* Codes or planes may be null. */
    float (*prepare)(const float *x, const Shape &shape, int16_t *codes, int8_t *planes, float *sums);
    /* Null, or what coarse products are made with. */
    void (*prepare_bytes)(const float *x, const Shape &shape, int8_t *bytes, float *scales, float *sums);
    /* rows [first, last) of a matrix times tokens: out[token * stride + row - first]. */
    void (*product)(
        const fp_matrix &matrix, const Shape &shape, int64_t first, int64_t last, const Activations *tokens,
        int64_t count, float *out, int64_t stride);
    void (*activate)(int function, float limit, const float *gate, const float *up, float *out, int64_t count);
    void (*normalize)(const float *x, const float *weight, float epsilon, int64_t width, float *out);
    void (*attend)(
        const fp_attention &attention, int kv_head, const float *query, const float *key, const float *value,
        int64_t position, const float *cosine, const float *sine, float *space, float *out);
    void (*convolve)(
        const float *x, float *window, const float *filter, const float *bias, int taps, int64_t count, float *out);
    void (*delta)(
        const fp_delta &layer, int head, const float *mixed, const float *gate, float beta, float alpha, float *out);
};

extern const Level level_portable;
#if defined(__x86_64__)
extern const Level level_avx2;
extern const Level level_avx512;
#elif defined(__aarch64__)
extern const Level level_neon;
#endif

/* Products take so many units, rows and tokens at a time: what lies in between stays in the first caches. */
enum { SEGMENT = 32, ROWS = 4, TOKENS = 64 };

/* From one unpacked row to the next: a multiple of 4 KB would have them share few sets of the first cache. */
enum { ROW_PITCH = 64 * SEGMENT + 32 };

/* So many tokens are taken one by one: to unpack weights for them would cost more. */
enum { FEW_TOKENS = 3 };

/* So much more than twice the value are MXFP4's codes as bytes, which have no sign. */
enum { MXFP4_SHIFT = 12 };

/* Units whose scales are taken together for products with many tokens. */
enum { PART = 8 };

/* In place of how many numbers a matrix has: 16 can be read. */
enum { READABLE = -1 };

/* The largest integer of a token's activations. */
enum { MOST_ACTIVATION = 16383 };

/* Weights are asked for so many bytes before they are used, at least, scales so many of theirs. */
enum { AHEAD = 6144, SCALES_AHEAD = 512 };

#endif
