/* The plain C interface of the compute kernels (kernels.cpp, steps.cpp); what arrays hold is SPEC.md's.
 *
 * Activations are float32. For a product with stored codes, the activations of a token are rounded to 15-bit integers
 * (by at most 1/32766 of the largest). Few tokens are multiplied with the codes as they are, in exact integer sums of
 * 64 values: with n values the error is at most sqrt(n) / 56,000 of the norms' product. For more tokens weights are
 * unpacked to 13-bit integers first (many.h); `coarse` matrices of 4 bits, which experts' are, are multiplied with bytes
 * where the processor has instructions for that (bytes.h). All else is float32, in a fixed order.
 */
#ifndef FLASHPACK_KERNELS_H
#define FLASHPACK_KERNELS_H

#include <stddef.h>
#include <stdint.h>

enum { FP_BF16 = 0, FP_F16 = 1, FP_F32 = 2, FP_AFFINE = 3, FP_MXFP4 = 4, FP_NIBBLES = 5 };
enum { FP_SILU = 0, FP_GELU = 1, FP_GELU_TANH = 2, FP_RELU2 = 3, FP_SWIGLU_OAI = 4 };

/* A stored matrix [rows, width]: `kind` one of the enum above; scales and biases [rows, width / group].
 * FP_NIBBLES is a type of scales: those and biases are halves of bytes in `scales`, `biases` has the blocks (affine_dq). */
typedef struct {
    const uint8_t *weight;
    const uint8_t *scales;
    const uint8_t *biases;
    const uint8_t *add; /* [rows], numbers of `add_type` added to the product; or null */
    int64_t rows;
    int64_t width;
    int32_t kind;
    int32_t bits;
    int32_t group;
    int32_t scale_type; /* FP_BF16, FP_F16, FP_F32 or FP_NIBBLES; of affine matrices */
    int32_t add_type;
    int32_t coarse; /* of 4 bits: many tokens' activations may be rounded to 8 bits */
} fp_matrix;

/* An expert's network: rows of gate first, then of up, in `first` ([2I, H]), or in `first` and `second`. */
typedef struct {
    fp_matrix first;
    fp_matrix second;
    fp_matrix down;
    int64_t gated; /* 0: one matrix before the activation; 1: gate and up in `first`; 2: in `first` and `second` */
} fp_expert;

/* One layer's attention of one new token, with keys and values of [kv_heads, capacity, width] before and with it.
 *
 * Queries and keys may be normalized (weights [width], or null) and are turned (rotary, by halves, the first `rotary` of
 * their values). `query_stride`: values from one head's query to the next; `gate`: where in them a gate for the head's
 * result begins, 0 for none. */
typedef struct {
    float *keys;
    float *values;
    const float *query_norm;
    const float *key_norm;
    int64_t capacity;
    int32_t heads;
    int32_t kv_heads;
    int32_t width; /* a multiple of 8, at most FP_MAX_HEAD */
    int32_t rotary;
    int32_t query_stride;
    int32_t gate;
    float epsilon;
    float scale;
} fp_attention;

enum { FP_MAX_HEAD = 512 };

/* A layer of the gated delta rule, for one new token of some channels: the queries of all key heads, their keys, then
 * the values of all value heads; each key head belongs to value_heads / key_heads value heads in a row.
 *
 * What precedes the token is in `window`, the last inputs of the channels' convolution, and `state`; both are brought
 * up to date. A head's state fades by exp(rate * softplus(alpha + rate_bias)). */
typedef struct {
    float *window;            /* [channels, taps] */
    float *state;             /* [value_heads, key_width, value_width] */
    const float *filter;      /* [channels, taps] */
    const float *filter_bias; /* [channels], or null */
    const float *rate;        /* [value_heads] */
    const float *rate_bias;   /* [value_heads] */
    const float *norm;        /* [value_width], of the results */
    int32_t key_heads;
    int32_t value_heads;
    int32_t key_width; /* both multiples of 8, at most FP_MAX_HEAD */
    int32_t value_width;
    int32_t taps;
    int32_t key_stride;    /* values from one key head's query or key to the next one's */
    int32_t value_stride;  /* from its value heads' values and gates to the next one's */
    int32_t number_stride; /* from its value heads' betas and alphas to the next one's */
    float epsilon;
} fp_delta;

enum { FP_MOST_RESIDENT = 64 };

/* A layer's experts by number, null for those that are not in memory, and networks beside them that every token uses. */
typedef struct {
    const fp_expert *const *experts;
    const fp_expert *const *beside;
    int32_t count;
    int32_t beside_count;
    int32_t top_k; /* with beside_count at most FP_MOST_RESIDENT */
    int32_t function;
    float limit;
    double seconds; /* that computing them has taken so far */
} fp_resident;

/* How a router's logits become weights. */
enum { FP_SOFTMAX_TOP = 0, FP_TOP_SOFTMAX = 1, FP_SIGMOID_TOP = 2 };

/* One call of a sequence (flashpack_run): which function, and its arguments by their type, each in its order. */
enum { FP_LINEAR = 0, FP_ADD_NORM = 1, FP_ATTEND = 2, FP_DELTA = 3, FP_ROUTE = 4, FP_COMBINE = 5, FP_RESIDENT = 6, FP_ROW = 7 };

typedef struct {
    void *pointers[8];
    int64_t numbers[4];
    int32_t function;
    float real;
} fp_step;

#endif
