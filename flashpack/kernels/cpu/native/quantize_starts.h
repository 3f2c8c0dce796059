/* The search of flashpack.formats.starts for a group's scale and bias, operation by operation; included by
 * quantize_body.h, once for each instruction set. */

/* Sums over the codes q that a group has at a scale and a bias: of q, of q * q and of q * y. */
INLINE void NAME(moments)(
    const float *y, const size_t size, float scale, float bias, float levels,
    float *codes, float *squares, float *products)
{
    const VECTOR zero = {0}, top = zero + levels, inverse = zero + 1.0f / scale, low = zero + bias;
    VECTOR a[STEP] = {{0}}, b[STEP] = {{0}}, c[STEP] = {{0}};
    size_t i, k;
    for (i = 0; i < size; i += 8) {
        for (k = 0; k < STEP; k++) {
            VECTOR x, q;
            memcpy(&x, y + i + k * LANES, sizeof x);
            q = NAME(clip)((x - low) * inverse, top) + ROUNDER - ROUNDER;
            a[k] += q;
            b[k] += q * q;
            c[k] += q * x;
        }
    }
    *codes = NAME(total)(a);
    *squares = NAME(total)(b);
    *products = NAME(total)(c);
}

/* Least squares of y ~ scale * q + bias for some fits of one group. */
INLINE void NAME(refit)(
    const float *y, const size_t size, float sum, float levels, const size_t count,
    float *scale, float *bias, float *gain, float *codes)
{
    const float n = (float)size;
    float squares[STARTS * STARTS], products[STARTS * STARTS];
    size_t i;
    for (i = 0; i < count; i++)
        NAME(moments)(y, size, scale[i], bias[i], levels, codes + i, squares + i, products + i);
    for (i = 0; i < count; i++) {
        const float covariance = n * products[i] - codes[i] * sum, variance = n * squares[i] - codes[i] * codes[i];
        scale[i] = covariance / variance;
        bias[i] = (sum - scale[i] * codes[i]) / n;
        gain[i] = covariance * scale[i];
    }
}

/* The two best fits of a group, the better first, of which `count` are refined `after` the choice; `low` and `high` are the smallest and the largest y. */
INLINE void NAME(fits)(
    const float *y, const size_t size, float sum, float low, float high, int bits, const size_t count, int before, int after,
    float *scale, float *bias, float *codes)
{
    const float levels = (float)((1 << bits) - 1), *part = starts_of[bits];
    float scales[STARTS * STARTS], biases[STARTS * STARTS], gains[STARTS * STARTS], sums[STARTS * STARTS];
    float first = 0, second = 0, gain[2];
    int round;
    size_t i;
    for (i = 0; i < STARTS * STARTS; i++) {
        biases[i] = low * part[i / STARTS];
        scales[i] = (high * part[i % STARTS] - biases[i]) / levels;
    }
    for (round = 0; round < before; round++)
        NAME(refit)(y, size, sum, levels, STARTS * STARTS, scales, biases, gains, sums);
    scale[0] = scale[1] = bias[0] = bias[1] = 0;
    for (i = 0; i < STARTS * STARTS; i++) {
        if (gains[i] > first) {
            second = first;
            scale[1] = scale[0];
            bias[1] = bias[0];
            first = gains[i];
            scale[0] = scales[i];
            bias[0] = biases[i];
        } else if (gains[i] > second) {
            second = gains[i];
            scale[1] = scales[i];
            bias[1] = biases[i];
        }
    }
    for (round = 0; round < after; round++)
        NAME(refit)(y, size, sum, levels, count, scale, bias, gain, codes);
}

/* The values less `middle`; returns their sum. */
INLINE float NAME(centre)(const float *values, const size_t size, float middle, float *y)
{
    VECTOR sums[STEP] = {{0}};
    size_t i, k;
    for (i = 0; i < size; i += 8) {
        for (k = 0; k < STEP; k++) {
            VECTOR x;
            memcpy(&x, values + i + k * LANES, sizeof x);
            x -= middle;
            sums[k] += x;
            memcpy(y + i + k * LANES, &x, sizeof x);
        }
    }
    return NAME(total)(sums);
}

/* What makes a group's squared error smaller than `error`, if the search finds it: its codes, what they are wrong by,
 * and number `index` of the scales and biases. */
INLINE void NAME(improve)(
    const float *values, const size_t size, float low, float high, int bits, float error, int scale_type,
    uint8_t *scales, uint8_t *biases, size_t index, uint8_t *codes, float *wrong)
{
    const float middle = low * 0.5f + high * 0.5f, n = (float)size, levels = (float)((1 << bits) - 1);
    const size_t width = scale_type == TYPE_F32 ? 4 : 2;
    float y[MAX_GROUP], scale[2], bias[2], sums[2], sum = NAME(centre)(values, size, middle, y);
    size_t i;
    NAME(fits)(y, size, sum, low - middle, high - middle, bits, 2, 2, 3, scale, bias, sums);
    for (i = 0; i < 2; i++) {
        uint8_t stored[2][4], trial[MAX_GROUP];
        float apart[MAX_GROUP], found;
        scale[i] = NAME(store_rounded)(scale[i], scale_type, stored[0], 0);
        bias[i] = NAME(store_rounded)((sum - scale[i] * sums[i]) / n + middle, scale_type, stored[1], 0);
        found = NAME(encode)(values, size, scale[i], bias[i], scale[i] == 0 ? 1 : scale[i], levels, trial, apart);
        if (found < error) {
            error = found;
            memcpy(scales + index * width, stored[0], width);
            memcpy(biases + index * width, stored[1], width);
            memcpy(codes, trial, size);
            memcpy(wrong, apart, size * sizeof *wrong);
        }
    }
}
