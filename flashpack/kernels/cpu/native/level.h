/* What each instruction set provides: see body.h. */
#ifndef FLASHPACK_LEVEL_H
#define FLASHPACK_LEVEL_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

/* A FORMAT of codes; the others are numbers of bits. */
enum { MXFP4 = 0 };

enum { ORDER_STRAIGHT, ORDER_NIBBLES, ORDER_PAIRS };

/* Of a product's inner dimension. */
struct Shape {
    int64_t width;
    int64_t units;  /* of 64 values */
    int64_t groups; /* with a scale each */
    int group;
    int order;
};

/* Activations of one token: as they are, and as 16-bit integers worth `scale` each, with sums by group. */
struct Activations {
    const float *values;
    const int16_t *codes;
    const float *sums;
    float scale;
};

struct Level {
    const char *name;
    float (*prepare)(const float *x, const Shape &shape, int16_t *codes, float *sums);
    /* rows [first, last) of a matrix times tokens: out[token * stride + row - first]. */
    void (*product)(
        const fp_matrix &matrix, const Shape &shape, int64_t first, int64_t last, const Activations *tokens,
        int64_t count, float *out, int64_t stride);
    void (*activate)(int function, float limit, const float *gate, const float *up, float *out, int64_t count);
    void (*normalize)(const float *x, const float *weight, float epsilon, int64_t width, float *out);
    void (*attend)(
        const fp_attention &attention, int kv_head, const float *query, const float *key, const float *value,
        int64_t position, const float *cosine, const float *sine, float *scores, float *out);
};

extern const Level level_portable;
#if defined(__x86_64__)
extern const Level level_avx2;
extern const Level level_vnni;
#elif defined(__aarch64__)
extern const Level level_neon;
#endif

/* Products take so many units, rows and tokens at a time: what lies in between stays in the first caches. */
enum { SEGMENT = 16, LONG_SEGMENT = 64, ROWS = 8, TOKENS = 64 };

/* Weights are asked for so many bytes before they are used, scales so many of theirs. */
enum { AHEAD = 6144, SCALES_AHEAD = 512 };

#endif
